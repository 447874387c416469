"""Each step's strongest sources as arcs over the text's order.

1. Head mean, averaged over a band of layers; each row is shared out over the steps before it, itself left
   out: an arc's weight is the part of what step i takes from earlier steps that it takes from step j.
2. The `per_step` largest weights of every step are drawn (the largest of all would be those of the first
   steps, which have few to share among), from the source (left end) to the step that draws on it (right end),
   wider and darker with weight, coloured and dashed by the segment of the source.
3. Steps stand on one line in reading order, with the segments' bars below: unlike a flow chart, the picture
   keeps how far an edge reaches.

An arc says which source comes first in its row. It does not say that the row's saliency is large.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from stepflow_tl.errors import TraceError
from stepflow_tl.models.bands import shallow_band
from stepflow_tl.rendering.layout import (
    POINTS_PER_INCH,
    SEGMENT_NAMES,
    layer_span,
    margin_names,
    segment_runs,
    thin_ticks,
)
from stepflow_tl.rendering.sheet import TEXT_SIZE, TICK_SIZE, Margins, Sheet, matplotlib_part
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.trace.steps import Segment

if TYPE_CHECKING:
    import matplotlib.figure

_MARGINS = Margins(left=0.15, right=0.15, bottom=0.52, top=0.22, first=0.1, text=0.15)
# Okabe and Ito's blue, vermilion and bluish green, told apart further by their dashes.
_STYLES: dict[Segment, dict[str, Any]] = {
    Segment.QUESTION: {"color": "#0072b2", "linestyle": "-"},
    Segment.THINKING: {"color": "#d55e00", "linestyle": (0, (5, 1))},
    Segment.SUMMARY: {"color": "#009e73", "linestyle": (0, (1.5, 1))},
}


def arc_figure(
    saliency: StepSaliency,
    *,
    layers: Iterable[int] | None = None,
    per_step: int = 2,
    pooling: Pooling = "mean",
    width: float = 7.0,
    title: str | None = None,
) -> matplotlib.figure.Figure:
    """Draw each step's strongest sources as arcs.

    Args:
        saliency: The step map of one trace.
        layers: Model layers to average over; the shallow band (of those stored) by default.
        per_step: Arcs that end in a step.
        pooling: How token saliency was pooled.
        width: Figure width in inches.
        title: First line; by default it names the model.

    Raises:
        ValueError: If `per_step` is below 1.
        ModelError: If a layer is not among the stored ones.
        TraceError: If the trace has fewer than two steps.
        ScoreError: If the map's score is signed.
        MissingExtraError: If matplotlib is not installed.
    """
    if per_step < 1:
        raise ValueError(f"per_step is {per_step}: expected at least 1")
    steps = saliency.trace.steps
    if len(steps) < 2:
        raise TraceError(f"this trace has {len(steps)} step: an edge needs two")
    chosen = _layers(saliency) if layers is None else tuple(layers)
    weights = edge_weights(saliency, chosen, pooling)
    patches, lines = matplotlib_part("patches"), matplotlib_part("lines")

    strongest = np.argsort(-weights, axis=1, kind="stable")[:, :per_step]
    shown = [(i, int(j)) for i, row in enumerate(strongest) for j in row if weights[i, j] > 0]
    shown.sort(key=lambda pair: weights[pair])  # the strongest on top
    of = "strongest source" if per_step == 1 else f"{per_step} strongest sources"
    inner = _MARGINS.inner(width)
    reach = max((query - key for query, key in shown), default=1)
    tall = min(2.6, inner / len(steps) * reach / 2 + 0.15)
    heading = title or f"Strongest sources: {saliency.provenance.model_name}"
    note = f"{layer_span(chosen)}; each step's {of} among earlier steps"
    sheet = Sheet(width, tall, _MARGINS, heading, note)
    axes = sheet.panel(0.0, 0.0, inner, tall)
    axes.set_xlim(-0.5, len(steps) - 0.5)
    axes.set_ylim(0, reach / 2 * 1.05)
    for query, key in shown:
        weight = float(weights[query, key])
        arc = patches.Arc(
            ((query + key) / 2, 0),
            query - key,
            query - key,
            theta2=180,
            linewidth=0.5 + 2.1 * weight,
            alpha=0.35 + 0.65 * weight**0.5,  # of 120 steps the strongest source often has a tenth
            **_STYLES[steps[key].segment],
        )
        axes.add_patch(arc)
    _label(axes, saliency, inner * POINTS_PER_INCH / len(steps), tall)
    handles = [
        lines.Line2D([], [], linewidth=1.4, label=f"from {SEGMENT_NAMES[segment].lower()}", **style)
        for segment, style in _STYLES.items()
        if any(steps[key].segment == segment for _, key in shown)
    ]
    sheet.legend(handles, columns=3, gap=0.09, handlelength=2.0)
    return sheet.figure


def edge_weights(
    saliency: StepSaliency, layers: tuple[int, ...], pooling: Pooling = "mean"
) -> Float[np.ndarray, "query_step key_step"]:
    """Shares of what each step takes from the steps before it; rows sum to 1, empty ones to 0."""
    saliency.require_unsigned("a share of a row")
    mean = saliency.head_mean(pooling, layers=layers).mean(0).numpy().astype(np.float64)
    below = np.tril(mean, -1)
    total = below.sum(-1, keepdims=True)
    return np.divide(below, total, out=np.zeros_like(below), where=total > 0)


def _layers(saliency: StepSaliency) -> tuple[int, ...]:
    band = shallow_band(saliency.n_layers)
    return tuple(layer for layer in saliency.layers if layer in band) or saliency.layers


def _label(axes: Any, saliency: StepSaliency, cell: float, tall: float) -> None:
    """Dots, step labels, then each segment's bar and name; `cell` is a step's width in points."""
    runs, labels = segment_runs(saliency.trace.steps), saliency.labels
    for run in runs:
        colour = _STYLES[run.segment]["color"]
        at = range(run.start, run.end)
        axes.plot(at, [0] * len(at), "o", color=colour, markersize=min(3.0, 0.7 * cell), clip_on=False)
    names = [labels[i] for i in thin_ticks(runs, TICK_SIZE * 1.2 / cell)]
    axes.set_xticks(thin_ticks(runs, TICK_SIZE * 1.2 / cell), labels=names, rotation=90)
    axes.tick_params(labelsize=TICK_SIZE, length=0, pad=4)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    below = axes.get_xaxis_transform()
    bar_at = -(8 + max(map(len, names)) * TICK_SIZE * 0.66) / (tall * POINTS_PER_INCH)
    name_at = bar_at - 7 / (tall * POINTS_PER_INCH)
    placed = margin_names(runs, TEXT_SIZE * 0.66 / cell, len(labels))
    for run, (name, centre) in zip(runs, placed, strict=True):
        colour = _STYLES[run.segment]["color"]
        extent = [run.start - 0.4, run.end - 0.6]
        axes.plot(extent, [bar_at, bar_at], color=colour, linewidth=1.5, transform=below, clip_on=False)
        axes.text(centre, name_at, name, fontsize=TEXT_SIZE, ha="center", va="center", transform=below)
