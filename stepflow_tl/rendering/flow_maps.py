"""StepFlow before and after: what each step draws on without the repair, with it, and what changed.

1. Head mean over a band of layers, rows as shares (they sum to 1): the plain map and the repaired one, on one
   logarithmic scale from 0.1 %.
2. Their difference in percentage points, on a scale that is symmetric about 0: red cells gained, blue cells
   lost; the one cell in a hundred that changed most may lie outside. A row's gains and losses cancel.

The picture shows where attribution moved, not whether the answer got better: that is for `evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from stepflow_tl.errors import ComparisonError, TraceError
from stepflow_tl.rendering.export import new_figure
from stepflow_tl.rendering.extras import require
from stepflow_tl.rendering.layout import POINTS_PER_INCH, layer_span, segment_runs, wrap_to_width
from stepflow_tl.rendering.map_axes import TEXT_SIZE, TICK_SIZE, TITLE_SIZE, draw_map, label_axes
from stepflow_tl.rendering.scales import DECADES, row_shares
from stepflow_tl.rendering.step_maps import COLOUR_MAP
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency

if TYPE_CHECKING:
    import matplotlib.figure

CHANGE_MAP = "RdBu_r"
_LEFT, _RIGHT, _BOTTOM, _TOP, _LINE = 0.52, 0.15, 0.95, 0.25, 0.14
_GAP, _BAR_HEIGHT, _BAR_AT = 0.14, 0.09, 0.36


def flow_figure(
    plain: StepSaliency,
    repaired: StepSaliency,
    *,
    layers: Iterable[int] | None = None,
    pooling: Pooling = "mean",
    width: float = 7.0,
    title: str | None = None,
) -> matplotlib.figure.Figure:
    """Draw the step maps of one trace without and with StepFlow, and their difference.

    Args:
        plain: From `step_saliency(model, trace)`.
        repaired: From `step_saliency(model, trace, stepflow=...)`; the panel says so where that StepFlow is a
            control.
        layers: Model layers to average over; all stored ones by default.
        pooling: How token saliency was pooled.
        width: Figure width in inches.
        title: First line; by default it names the model.

    Returns:
        A matplotlib figure that belongs to no window. Save it with `save_figure`.

    Raises:
        ComparisonError: If the maps are of different tokens, steps, models or objectives.
        ModelError: If a layer is not stored in both.
        TraceError: If the trace has no steps.
        MissingExtraError: If matplotlib is not installed.
    """
    _check_comparable(plain, repaired)
    n = len(plain.labels)
    if n == 0:
        raise TraceError("this trace has no steps, so there is no map to draw")
    colors = require("matplotlib.colors", purpose="Drawing step maps")
    chosen = plain.layers if layers is None else tuple(layers)
    shares = [
        row_shares(saliency.head_mean(pooling, layers=chosen).mean(0).double()).numpy()
        for saliency in (plain, repaired)
    ]
    change = 100 * (shares[1] - shares[0])
    above = np.triu(np.ones((n, n), dtype=bool), k=1)
    log = colors.LogNorm(10.0**-DECADES, 1, clip=True)
    # The few short rows at the top change most: a scale up to their value would leave the rest blank.
    largest = float(np.quantile(np.abs(change[~above]), 0.99)) or 1.0
    panels = [
        ("plain", np.maximum(shares[0], log.vmin), COLOUR_MAP, log),
        (_treatment(repaired), np.maximum(shares[1], log.vmin), COLOUR_MAP, log),
        ("change", change, CHANGE_MAP, colors.Normalize(-largest, largest)),
    ]

    subject = "StepFlow" if _treatment(repaired) == "with StepFlow" else "Control of StepFlow"
    heading = title or f"{subject}: {plain.provenance.model_name}"
    heading = wrap_to_width(heading, TITLE_SIZE, width - _LEFT)
    flow = repaired.provenance.notes.get("stepflow", "The StepFlow is not recorded")
    where = layer_span(chosen)
    where = f"Mean of {where}" if len(chosen) > 1 else where.capitalize()
    notes = wrap_to_width(f"{where}. {flow}", TEXT_SIZE, width - _LEFT)
    side = (width - _LEFT - _RIGHT - 2 * _GAP) / 3
    top = _TOP + _LINE * len([*heading, *notes])
    height = top + side + _BOTTOM
    figure = new_figure(width, height)
    runs = segment_runs(plain.trace.steps)
    cell = side * POINTS_PER_INCH / n
    images = []
    for i, (name, values, colour_map, norm) in enumerate(panels):
        x = _LEFT + i * (side + _GAP)
        axes = figure.add_axes((x / width, _BOTTOM / height, side / width, side / height))
        masked = np.ma.masked_array(values, above)
        images.append(draw_map(axes, masked, colour_map, norm, runs, cell))
        axes.set_title(name, fontsize=TEXT_SIZE, pad=2.5)
        label_axes(axes, plain.labels, runs, cell, left=i == 0, bottom=True)
    _colour_bar(
        figure, images[0], (_LEFT, 2 * side + _GAP), (width, height), "share of the row's saliency", True
    )
    change_at = (_LEFT + 2 * (side + _GAP), side)
    _colour_bar(figure, images[2], change_at, (width, height), "percentage points", False)
    rows = [
        *((line, TITLE_SIZE, "black") for line in heading),
        *((line, TEXT_SIZE, "0.35") for line in notes),
    ]
    for i, (line, size, colour) in enumerate(rows):
        y = 1 - (0.13 + _LINE * i) / height
        figure.text(_LEFT / width, y, line, fontsize=size, color=colour, va="center", parse_math=False)
    return figure


def _treatment(repaired: StepSaliency) -> str:
    """What the second panel is of: StepFlow, or what was put in its place."""
    placebo = repaired.provenance.notes.get("placebo")
    if placebo is None:
        return "with StepFlow"
    return "with the control" if placebo == "both" else f"with the {placebo}'s control"


def _check_comparable(plain: StepSaliency, repaired: StepSaliency) -> None:
    facts = {
        "tokens": (plain.trace.tokens.tolist(), repaired.trace.tokens.tolist()),
        "steps": (plain.trace.steps, repaired.trace.steps),
        "model": (plain.provenance.model_name, repaired.provenance.model_name),
        "objective": (plain.provenance.objective, repaired.provenance.objective),
    }
    for name, (one, other) in facts.items():
        if one != other:
            raise ComparisonError(
                f"the two maps differ in their {name}: map one trace twice, without and with stepflow="
            )


def _colour_bar(
    figure: Any, image: Any, at: tuple[float, float], size: tuple[float, float], label: str, percent: bool
) -> None:
    """A horizontal bar under the panels; positions in inches."""
    (x, length), (width, height) = at, size
    length = min(length, 2.2)
    axes = figure.add_axes((x / width, _BAR_AT / height, length / width, _BAR_HEIGHT / height))
    bar = figure.colorbar(image, cax=axes, orientation="horizontal", extend="min" if percent else "both")
    bar.set_label(label, fontsize=TEXT_SIZE, labelpad=2)
    bar.ax.tick_params(labelsize=TICK_SIZE, length=2, width=0.5, pad=1.5)
    bar.outline.set_linewidth(0.5)
    if percent:
        bar.ax.minorticks_off()
        bar.set_ticks([0.001, 0.01, 0.1, 1], labels=["0.1 %", "1 %", "10 %", "100 %"])
