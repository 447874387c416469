"""Saliency against knockout: does what a map ranks high do harm when it is cut?

1. One point for each pair of steps that knockout measured, key before query. Across: Step-Saliency of the
   pair, mean over heads and stored layers. Upward: size of the effect of cutting it. Both pooled alike, so
   that long steps do not agree merely by being long.
2. Colour and marker say which segments the edge joins, in reading order: from the step that is read to the
   step that reads. A hollow marker is a cut that helped (a negative effect).
3. An axis is logarithmic where its positive values span more than a factor of `_LINEAR_SPAN`. An effect is a
   difference of two losses, so six decades below the largest one there is only rounding: what is smaller,
   zeros included, stands on the axis' edge and is counted in the note.
4. The title has Spearman's rank correlation over all pairs drawn, the legend that of each kind of edge. Read
   both: kinds differ in level (a question's rows have large losses), and that alone can make the first one
   high. Neither scale nor edge enters them. Pairs of one trace are not independent, so there is no interval
   here; over traces `causal.agreement.summarise_agreement` has one.

Cost: nothing is run. Beyond `_MOST_VECTORS` points, SVG and PDF hold the points as one image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from stepflow_tl.causal.agreement import saliency_and_effects, spearman
from stepflow_tl.causal.knockout_result import StepKnockout
from stepflow_tl.errors import ComparisonError
from stepflow_tl.rendering.layout import PER_PAIR, SEGMENT_NAMES, layer_span
from stepflow_tl.rendering.sheet import TEXT_SIZE, Margins, Sheet, matplotlib_part, style_plot
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.trace.steps import Segment

if TYPE_CHECKING:
    import matplotlib.figure

_MARGINS = Margins(left=0.62, right=0.2, bottom=0.42, top=0.12, first=0.1, text=0.1)
_LINEAR_SPAN, _MOST_VECTORS = 30.0, 2000
_SALIENCY_DECADES, _EFFECT_DECADES = 12, 6  # an effect is a difference of two losses in float32
_Q, _T, _S = Segment.QUESTION, Segment.THINKING, Segment.SUMMARY
# Okabe and Ito's colours, told apart further by the marker; by (segment read, segment that reads).
_STYLES: dict[tuple[Segment, Segment], dict[str, Any]] = {
    (_Q, _Q): {"color": "#56b4e9", "marker": "v"},
    (_Q, _T): {"color": "#0072b2", "marker": "o"},
    (_T, _T): {"color": "#d55e00", "marker": "s"},
    (_Q, _S): {"color": "#cc79a7", "marker": "D"},
    (_T, _S): {"color": "#009e73", "marker": "^"},
    (_S, _S): {"color": "#000000", "marker": "P"},
}


def agreement_figure(
    saliency: StepSaliency,
    knockout: StepKnockout,
    *,
    pooling: Pooling = "mean",
    width: float = 3.5,
    title: str | None = None,
) -> matplotlib.figure.Figure:
    """Draw each measured pair of steps by its saliency and by the effect of cutting it.

    Args:
        saliency: The step map of one trace; its stored layers are averaged.
        knockout: Effects on the same trace.
        pooling: One for both, see `StepSaliency.pooled`.
        width: Figure width in inches; the default is a column of a paper.
        title: First line, before the correlation; by default it names the model.

    Raises:
        ComparisonError: If the two results are of different traces, or no pair with key before query was
            measured.
        ValueError: If `pooling` is unknown.
        ScoreError: If the map's score is signed.
        MissingExtraError: If matplotlib is not installed.
    """
    saliency.require_unsigned("agreement_figure")
    own, effects = saliency_and_effects(saliency, knockout, pooling)
    pairs = np.tril(knockout.measured.numpy(), -1)
    if not pairs.any():
        raise ComparisonError(
            "knockout measured no pair with the key step before the query step: none to draw"
        )
    lines = matplotlib_part("lines")
    queries, keys = np.nonzero(pairs)
    across, signed = own[pairs], effects[pairs]
    upward = np.abs(signed)
    (x, x_floor), (y, y_floor) = _placed(across, _SALIENCY_DECADES), _placed(upward, _EFFECT_DECADES)

    steps = saliency.trace.steps
    kinds = [(steps[key].segment, steps[query].segment) for query, key in zip(queries, keys, strict=True)]
    present = [kind for kind in _STYLES if kind in kinds]
    n = len(kinds)
    correlation = f"Spearman {_number(spearman(across, upward))}, n = {n}"
    first = f"{title}: {correlation}" if title else f"{correlation}: {saliency.provenance.model_name}"
    columns = 2 if width < 5 else 3
    inner = _MARGINS.inner(width)
    tall = min(0.8 * inner, 4.0)
    note = _note(saliency, knockout, signed, [(across, x_floor), (upward, y_floor)])
    sheet = Sheet(width, tall, _MARGINS, first, note, legend_rows=-(-len(present) // columns))
    axes = sheet.panel(0.0, 0.0, inner, tall)
    members = {kind: np.array([other == kind for other in kinds]) for kind in present}
    _draw_points(axes, x, y, signed < 0, members)
    _finish_axis(axes.xaxis, axes.set_xscale, axes.set_xlim, x, x_floor)
    _finish_axis(axes.yaxis, axes.set_yscale, axes.set_ylim, y, y_floor)
    unit = f"nats{PER_PAIR[pooling]}"
    own_unit = unit if knockout.measure in ("nll", "kl") else unit.replace("nats", knockout.measure)
    axes.set_xlabel(f"Step-Saliency, {unit}", fontsize=TEXT_SIZE, labelpad=2)
    axes.set_ylabel(f"size of the cut's effect,\n{own_unit}", fontsize=TEXT_SIZE, labelpad=2)
    style_plot(axes, "both", "0.9")
    axes.tick_params(which="minor", length=0)
    handles = []
    for kind, at in members.items():
        source, reader = (SEGMENT_NAMES[segment].lower() for segment in kind)
        label = f"{source} → {reader}  {_number(spearman(across[at], upward[at]))}"
        handles.append(lines.Line2D([], [], linestyle="", markersize=4, label=label, **_STYLES[kind]))
    spacing = {"handlelength": 0.8, "handletextpad": 0.5, "labelspacing": 0.35}
    sheet.legend(handles, columns=columns, gap=0.06, **spacing)
    return sheet.figure


def _draw_points(
    axes: Any,
    x: Float[np.ndarray, " pair"],
    y: Float[np.ndarray, " pair"],
    helped: Bool[np.ndarray, " pair"],
    members: Mapping[tuple[Segment, Segment], Bool[np.ndarray, " pair"]],
) -> None:
    """Smaller and paler with their number; hollow where the cut helped; the rarest kind on top."""
    n = len(x)
    size = float(np.clip(60 / np.sqrt(n), 1.6, 4.0))
    alpha = float(np.clip(12 / np.sqrt(n), 0.35, 0.9))
    style = {"linestyle": "", "markersize": size, "alpha": alpha, "markeredgewidth": 0.6}
    style |= {"clip_on": False, "rasterized": n > _MOST_VECTORS}
    for kind in sorted(members, key=lambda kind: -members[kind].sum()):
        for chosen, hollow in ((~helped, False), (helped, True)):
            drawn, face = members[kind] & chosen, {"markerfacecolor": "none"} if hollow else {}
            axes.plot(x[drawn], y[drawn], **_STYLES[kind], **face, **style)


def _placed(
    values: Float[np.ndarray, " pair"], decades: int
) -> tuple[Float[np.ndarray, " pair"], float | None]:
    """Where values stand on their axis, and its lower end if it is logarithmic (None if it is linear)."""
    positive = values[values > 0]
    if not len(positive) or positive.max() <= _LINEAR_SPAN * positive.min():
        return values, None
    floor = max(float(positive.min()), float(positive.max()) * 10.0**-decades)
    return np.maximum(values, floor), floor


def _finish_axis(axis: Any, set_scale: Any, set_limits: Any, placed: np.ndarray, floor: float | None) -> None:
    top = float(placed.max())
    if floor is None:
        set_limits(0, 1.05 * top or 1.0)
        return
    set_scale("log")
    set_limits(floor, top * (top / floor) ** 0.04)
    axis.set_major_locator(matplotlib_part("ticker").LogLocator(numticks=6))


def _note(
    saliency: StepSaliency,
    knockout: StepKnockout,
    signed: Float[np.ndarray, " pair"],
    axes: list[tuple[Float[np.ndarray, " pair"], float | None]],
) -> str:
    """Layers, what was measured, hollow markers, and what stands on an edge."""
    both = saliency.layers == knockout.layers
    mapped = f"saliency of {layer_span(saliency.layers)}, cut in {layer_span(knockout.layers)}"
    parts = [layer_span(saliency.layers) if both else mapped]
    if knockout.onto is not None:
        parts.append(f"effect on {knockout.onto}")
    if (signed < 0).any():
        parts.append("hollow: the cut helped")
    edge = int(np.any([values < (floor or 0) for values, floor in axes], axis=0).sum())
    if edge:
        parts.append(f"{edge} below the scale, on its edge")
    return "; ".join(parts)


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"
