"""Step maps as a grid of heatmaps, one panel per layer; and how any figure draws one map (`draw_map`).

1. The head mean of each chosen layer (the paper's map) is brought to one scale, shared by all panels and the
   colour bar. Row i is what step i draws on; column j is the step it comes from.
2. Cells above the diagonal are masked: no step draws on a later one.
3. Lines mark where Question, Thinking and Summary meet; bars with their names stand in the margins, beside as
   many step labels as fit. Positions are step indices: step i's cell covers [i - 0.5, i + 0.5].

Sizes are inches and points throughout, so text keeps its size whatever the number of steps. Nothing is drawn
over the cells but the boundary lines, and those are thin: with 120 steps the question's column is one point
wide. The colour map is perceptually even and safe for the common colour blindnesses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from stepflow_tl.rendering.layout import (
    DECADES,
    POINTS_PER_INCH,
    SegmentRun,
    boundaries,
    evenly_over_depth,
    margin_names,
    require_steps,
    row_shares,
    saliency_words,
    segment_runs,
    thin_ticks,
)
from stepflow_tl.rendering.sheet import MAP_TICK_SIZE, TEXT_SIZE, Margins, Sheet, matplotlib_part, style_ticks
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.saliency.scores import Score

if TYPE_CHECKING:
    import matplotlib.figure

Normalise = Literal["row", "row_linear", "log", "signed"]

MAX_DEFAULT_PANELS = 6
COLOUR_MAP = "magma_r"
DIVERGING_MAP = "RdBu_r"
PERCENT_TICKS = (0.001, 0.01, 0.1, 1.0)
BOUNDARY_COLOUR = "#00a08a"  # absent from the colour maps, and visible on both of their ends

_MARGINS = Margins(left=0.52, right=0.88, bottom=0.52, top=0.25, line=0.14, first=0.13)
_GAP_X, _GAP_Y = 0.14, 0.24
_BAR_WIDTH, _BAR_GAP, _BAR_LENGTH = 0.11, 0.14, 2.4
_UNIT = {
    "mean": "\n(nats per token pair)",
    "causal_mean": " (nats\nper causal token pair)",
    "sum": "\n(nats)",
}


def step_map_figure(
    saliency: StepSaliency,
    *,
    layers: Iterable[int] | None = None,
    pooling: Pooling = "mean",
    normalise: Normalise | None = None,
    columns: int | None = None,
    width: float = 7.0,
    title: str | None = None,
) -> matplotlib.figure.Figure:
    """Draw the head-mean step map of several layers.

    Args:
        saliency: The step map of one trace.
        layers: Model layers to draw, in this order. By default all of them when there are at most six, else
            six spread evenly over depth, first and last included; the title then says so.
        pooling: How token saliency was pooled, see `StepSaliency.pooled`.
        normalise: `"row"` and `"row_linear"` show each row's shares (they sum to 1 over the steps drawn on),
            coloured on a logarithmic scale from 0.1 % or a linear one from 0. `"log"` shows saliency itself,
            from the largest value of the panels down to a thousandth of it. `"signed"` shows it on a linear
            scale with a colour for each sign, and is the only one for maps whose score is signed. By default
            "row", or "signed" for those.
        columns: Panels side by side; by default as many as stay readable at `width`.
        width: Figure width in inches: 7 for a page, 3.3 for a column of a two-column paper. Text keeps its
            size.
        title: First line above the panels; by default it names the map and the model.

    Raises:
        ValueError: If `normalise`, `pooling` or `columns` is not one of those allowed.
        ModelError: If a layer is not among the stored ones.
        ScoreError: If `normalise` does not go with the map's score.
        TraceError: If the trace has no steps.
        MissingExtraError: If matplotlib is not installed.
    """
    if normalise is None:
        normalise = "signed" if saliency.signed else "row"
    if normalise not in get_args(Normalise):
        raise ValueError(f"unknown normalise {normalise!r}: expected one of {', '.join(get_args(Normalise))}")
    if normalise != "signed":
        saliency.require_unsigned(f"normalise={normalise!r}")
    n_steps = require_steps(saliency)
    chosen = evenly_over_depth(saliency.layers, MAX_DEFAULT_PANELS) if layers is None else tuple(layers)
    if not chosen:
        raise ValueError("layers is empty: name at least one layer, or pass None for a selection over depth")
    if columns is None:
        columns = _readable_columns(len(chosen), width)
    if columns < 1:
        raise ValueError(f"columns is {columns}: expected at least 1")
    columns = min(columns, len(chosen))

    maps = saliency.head_mean(pooling, layers=chosen).detach().cpu().to(torch.float64)
    values, norm, bar = _scale(maps, normalise, pooling, saliency.score)
    colour_map = DIVERGING_MAP if normalise == "signed" else COLOUR_MAP
    side = (_MARGINS.inner(width) - _GAP_X * (columns - 1)) / columns
    rows = -(-len(chosen) // columns)
    heading = title if title is not None else f"{saliency.title}, head mean: {saliency.provenance.model_name}"
    note = _note(saliency, chosen, by_default=layers is None)
    body = rows * side + (rows - 1) * _GAP_Y
    sheet = Sheet(width, body, _MARGINS, heading, note)
    runs = segment_runs(saliency.trace.steps)
    cell = side * POINTS_PER_INCH / n_steps
    for panel, layer in enumerate(chosen):
        row, column = divmod(panel, columns)
        axes = sheet.panel(column * (side + _GAP_X), row * (side + _GAP_Y), side, side)
        image = draw_map(axes, values[panel], colour_map, norm, runs, cell)
        axes.set_title(f"layer {layer}", fontsize=TEXT_SIZE, pad=2.5)
        outer = {"left": column == 0, "bottom": panel + columns >= len(chosen)}
        label_axes(axes, saliency.labels, runs, cell, **outer)
    at = (_MARGINS.inner(width) + _BAR_GAP, 0.0, _BAR_WIDTH, min(body, _BAR_LENGTH))
    sheet.colour_bar(image, at, **bar)
    return sheet.figure


def draw_map(
    axes: Any, values: np.ndarray, colour_map: str, norm: Any, runs: list[SegmentRun], cell: float
) -> Any:
    """Draw one map, masked above the diagonal, and the lines between its segments; the image is returned.

    `norm` brings values to colours; `cell` is the width of a step in points.
    """
    image = axes.imshow(values, cmap=colour_map, norm=norm, interpolation="nearest", aspect="auto")
    n = values.shape[-1]
    for at in boundaries(runs):
        # An L inside the lower triangle: along the first row after the boundary, and down from the diagonal.
        style = {"color": BOUNDARY_COLOUR, "solid_capstyle": "butt", "solid_joinstyle": "miter"}
        axes.plot([-0.5, at, at], [at, at, n - 0.5], linewidth=min(0.8, 0.35 * cell), **style)
    axes.set_xlim(-0.5, n - 0.5)
    axes.set_ylim(n - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    return image


def label_axes(
    axes: Any, labels: list[str], runs: list[SegmentRun], cell: float, *, left: bool, bottom: bool
) -> None:
    """Step labels along the outer panels only, then each segment's bar and name; `cell` is in points."""
    ticks = thin_ticks(runs, MAP_TICK_SIZE * 1.2 / cell)
    names = [labels[i] for i in ticks]
    axes.set_xticks(ticks, labels=names if bottom else [""] * len(ticks), rotation=90)
    axes.set_yticks(ticks, labels=names if left else [""] * len(ticks))
    style_ticks(axes, MAP_TICK_SIZE, pad=1.5)
    side = cell * len(labels)
    bar_at = -(5 + max(len(name) for name in names) * MAP_TICK_SIZE * 0.66) / side
    name_at = bar_at - 6 / side
    placed = margin_names(runs, TEXT_SIZE * 0.66 / cell, len(labels))
    for run, (name, centre) in zip(runs, placed, strict=True):
        extent = [run.start - 0.5 + 0.7 / cell, run.end - 0.5 - 0.7 / cell]
        if run.end - run.start < 2 / cell:  # too narrow for a gap at both ends
            extent = [run.start - 0.5, run.end - 0.5]
        bar = {"color": BOUNDARY_COLOUR, "linewidth": 1.5, "solid_capstyle": "butt", "clip_on": False}
        text = {"fontsize": TEXT_SIZE, "ha": "center", "va": "center"}
        if bottom:
            axes.plot(extent, [bar_at, bar_at], transform=axes.get_xaxis_transform(), **bar)
            axes.text(centre, name_at, name, transform=axes.get_xaxis_transform(), **text)
        if left:
            axes.plot([bar_at, bar_at], extent, transform=axes.get_yaxis_transform(), **bar)
            axes.text(name_at, centre, name, transform=axes.get_yaxis_transform(), rotation=90, **text)


def _readable_columns(panels: int, width: float) -> int:
    fitting = max(1, int((_MARGINS.inner(width) + _GAP_X) // (0.85 + _GAP_X)))
    return {4: 2}.get(panels, min(panels, 3, fitting)) if fitting >= 2 else 1


def _scale(
    maps: torch.Tensor, normalise: Normalise, pooling: Pooling, score: Score
) -> tuple[np.ma.MaskedArray, Any, dict[str, Any]]:
    """Maps ready to draw, their colour norm, and the options of the colour bar."""
    colors = matplotlib_part("colors")
    label = f"share of the row's\n{saliency_words(pooling)}"
    bar: dict[str, Any] = {"label": label, "percent_ticks": PERCENT_TICKS, "extend": "min"}
    if normalise in ("log", "signed"):
        largest = float(maps.abs().max()) or 1.0
        bar |= {"label": saliency_words(pooling, score) + _UNIT[pooling], "percent_ticks": None}
    else:
        maps, largest = row_shares(maps), 1.0
    values = maps.numpy()
    if normalise == "row_linear":
        norm = colors.Normalize(0, 1)
        bar |= {"percent_ticks": (0.0, 0.25, 0.5, 0.75, 1.0), "extend": "neither"}
    elif normalise == "signed":
        norm = colors.Normalize(-largest, largest)
        bar |= {"extend": "neither"}
    else:  # matplotlib masks the logarithm of 0; a pair without saliency is pale, not absent
        norm = colors.LogNorm(largest / 10**DECADES, largest, clip=True)
        values = np.maximum(values, norm.vmin)
    above = np.triu(np.ones(maps.shape[-2:], dtype=bool), k=1)
    return np.ma.masked_array(values, np.broadcast_to(above, values.shape)), norm, bar


def _note(saliency: StepSaliency, chosen: tuple[int, ...], *, by_default: bool) -> str:
    if by_default and len(chosen) < len(saliency.layers):
        shown = f"{len(chosen)} of {len(saliency.layers)} layers, evenly over depth."
    else:
        shown = f"{len(chosen)} of {saliency.n_layers} layers."
    return f"{shown} Rows draw on columns. Objective: {saliency.provenance.objective}."
