"""Maps of change, red up and blue down: StepFlow before and after, and activation patching.

`flow_figure`, what each step draws on without the repair, with it, and what changed:

1. Head mean over a band of layers, rows as shares (they sum to 1): the plain map and the repaired one, on one
   logarithmic scale from 0.1 %.
2. Their difference in percentage points, on a scale that is symmetric about 0: red cells gained, blue cells
   lost; the one cell in a hundred that changed most may lie outside. A row's gains and losses cancel.

The picture shows where attribution moved, not whether the answer got better: that is for `evaluate`.

`patching_figure`: layers upward, steps to the right, red where the patch raises the metric. The scale is
symmetric about 0 and reaches the largest effect; a cell is one pass of the corrupted run in which one step's
activations in one layer came from the clean run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from stepflow_tl.causal.patching_result import StepPatching
from stepflow_tl.errors import ComparisonError
from stepflow_tl.rendering.layout import (
    DECADES,
    POINTS_PER_INCH,
    layer_span,
    require_steps,
    row_shares,
    segment_runs,
)
from stepflow_tl.rendering.sheet import MAP_TICK_SIZE, TEXT_SIZE, Margins, Sheet, matplotlib_part, style_ticks
from stepflow_tl.rendering.step_maps import COLOUR_MAP, DIVERGING_MAP, PERCENT_TICKS, draw_map, label_axes
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency

if TYPE_CHECKING:
    import matplotlib.figure

_FLOW = Margins(left=0.52, right=0.15, bottom=0.95, top=0.25, line=0.14, first=0.13)
_PATCHING = Margins(left=0.5, right=0.85, bottom=0.5, top=0.22, line=0.14, first=0.13)
_PATCHING_BAR_WIDTH, _PATCHING_BAR_GAP = 0.11, 0.14
_GAP, _BAR_HEIGHT, _BAR_LENGTH, _BAR_AT = 0.14, 0.09, 2.2, 0.36


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

    Raises:
        ComparisonError: If the maps are of different tokens, steps, models or objectives.
        ModelError: If a layer is not stored in both.
        TraceError: If the trace has no steps.
        ScoreError: If a map's score is signed.
        MissingExtraError: If matplotlib is not installed.
    """
    for saliency in (plain, repaired):
        saliency.require_unsigned("flow_figure")
    _check_comparable(plain, repaired)
    n = require_steps(plain)
    colors = matplotlib_part("colors")
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
        ("change", change, DIVERGING_MAP, colors.Normalize(-largest, largest)),
    ]

    subject = "StepFlow" if _treatment(repaired) == "with StepFlow" else "Control of StepFlow"
    flow = repaired.provenance.notes.get("stepflow", "The StepFlow is not recorded")
    where = f"Mean of {layer_span(chosen)}" if len(chosen) > 1 else layer_span(chosen).capitalize()
    side = (_FLOW.inner(width) - 2 * _GAP) / 3
    heading = title or f"{subject}: {plain.provenance.model_name}"
    sheet = Sheet(width, side, _FLOW, heading, f"{where}. {flow}")
    runs = segment_runs(plain.trace.steps)
    cell = side * POINTS_PER_INCH / n
    images = []
    for i, (name, values, colour_map, norm) in enumerate(panels):
        axes = sheet.panel(i * (side + _GAP), 0.0, side, side)
        masked = np.ma.masked_array(values, above)
        images.append(draw_map(axes, masked, colour_map, norm, runs, cell))
        axes.set_title(name, fontsize=TEXT_SIZE, pad=2.5)
        label_axes(axes, plain.labels, runs, cell, left=i == 0, bottom=True)
    down = side + _FLOW.bottom - _BAR_AT - _BAR_HEIGHT
    at = (0.0, down, min(2 * side + _GAP, _BAR_LENGTH), _BAR_HEIGHT)
    share = "share of the row's saliency"
    sheet.colour_bar(images[0], at, share, percent_ticks=PERCENT_TICKS, extend="min", lying=True)
    at = (2 * (side + _GAP), down, min(side, _BAR_LENGTH), _BAR_HEIGHT)
    sheet.colour_bar(images[2], at, "percentage points", extend="both", lying=True)
    return sheet.figure


def patching_figure(
    patching: StepPatching, *, width: float = 5.0, title: str | None = None
) -> matplotlib.figure.Figure:
    """Draw the effect of every layer and step.

    Args:
        patching: From `step_patching` or `attribution_patching`.
        width: Figure width in inches.
        title: First line; by default it names method, component and model.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    colors = matplotlib_part("colors")
    order = sorted(range(len(patching.layers)), key=lambda row: patching.layers[row])
    layers = [patching.layers[row] for row in order]
    values = patching.effects[order].numpy()
    largest = float(abs(values).max()) or 1.0
    path = f", read by {patching.receiving_step}" if patching.receiving_step else ""
    heading = title or f"{patching.method} of {patching.component}{path}: {patching.provenance.model_name}"
    note = f"Metric: {patching.provenance.objective}; without a patch {patching.corrupted_value:.3g}."
    inner = _PATCHING.inner(width)
    tall = min(4.0, max(0.9, 0.16 * len(layers)))
    sheet = Sheet(width, tall, _PATCHING, heading, note)
    axes = sheet.panel(0.0, 0.0, inner, tall)
    norm = colors.Normalize(-largest, largest)
    image = axes.imshow(
        values, cmap=DIVERGING_MAP, norm=norm, aspect="auto", origin="lower", interpolation="nearest"
    )
    for names, setter, length in (
        (patching.labels, axes.set_xticks, inner),
        ([str(layer) for layer in layers], axes.set_yticks, tall),
    ):
        room = length * POINTS_PER_INCH / len(names)
        stride = max(1, -(-int(MAP_TICK_SIZE * 1.3) // max(1, int(room))))
        shown = list(range(0, len(names), stride))
        setter(shown, labels=[names[i] for i in shown])
    style_ticks(axes, MAP_TICK_SIZE, pad=1.5)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("patched step", fontsize=TEXT_SIZE)
    axes.set_ylabel("layer", fontsize=TEXT_SIZE)
    axes.spines[:].set_linewidth(0.5)
    at = (inner + _PATCHING_BAR_GAP, 0.0, _PATCHING_BAR_WIDTH, tall)
    sheet.colour_bar(image, at, "effect on the metric")
    return sheet.figure


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
