"""Step maps as a grid of heatmaps, one panel a layer.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from stepflow_tl.errors import TraceError
from stepflow_tl.rendering.export import new_figure
from stepflow_tl.rendering.extras import require
from stepflow_tl.rendering.layout import (
    POINTS_PER_INCH,
    evenly_over_depth,
    segment_runs,
    wrap_to_width,
)
from stepflow_tl.rendering.map_axes import TEXT_SIZE, TICK_SIZE, TITLE_SIZE, draw_map, label_axes
from stepflow_tl.rendering.scales import DECADES, row_shares
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency

if TYPE_CHECKING:
    import matplotlib.figure

Normalise = Literal["row", "row_linear", "log"]

MAX_DEFAULT_PANELS = 6
COLOUR_MAP = "magma_r"

# Margins and gaps in inches.
_LEFT, _RIGHT, _BOTTOM, _TOP, _LINE = 0.52, 0.88, 0.52, 0.25, 0.14
_GAP_X, _GAP_Y = 0.14, 0.24
_BAR_WIDTH, _BAR_GAP, _BAR_LENGTH = 0.11, 0.14, 2.4
_UNIT = {
    "mean": "mean saliency\n(nats per token pair)",
    "causal_mean": "mean saliency (nats\nper causal token pair)",
    "sum": "summed saliency\n(nats)",
}


@dataclass(frozen=True)
class _Scaled:
    """Maps ready to draw: values, colour norm, and the words of the colour bar."""

    values: np.ndarray
    norm: Any
    label: str
    floor: bool
    percent: bool


def step_map_figure(
    saliency: StepSaliency,
    *,
    layers: Iterable[int] | None = None,
    pooling: Pooling = "mean",
    normalise: Normalise = "row",
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
            from the largest value of the panels down to a thousandth of it.
        columns: Panels side by side; by default as many as stay readable at `width`.
        width: Figure width in inches: 7 for a page, 3.3 for a column of a two-column paper. Text keeps its
            size.
        title: First line above the panels; by default it names the map and the model.

    Returns:
        A matplotlib figure that belongs to no window. Save it with `save_figure`.

    Raises:
        ValueError: If `normalise`, `pooling` or `columns` is not one of those allowed.
        ModelError: If a layer is not among the stored ones.
        TraceError: If the trace has no steps.
        MissingExtraError: If matplotlib is not installed.
    """
    if normalise not in get_args(Normalise):
        raise ValueError(f"unknown normalise {normalise!r}: expected one of {', '.join(get_args(Normalise))}")
    n_steps = len(saliency.labels)
    if n_steps == 0:
        raise TraceError(
            "this trace has no steps, so there is no map to draw: give it a question or thinking"
        )
    chosen = evenly_over_depth(saliency.layers, MAX_DEFAULT_PANELS) if layers is None else tuple(layers)
    if not chosen:
        raise ValueError("layers is empty: name at least one layer, or pass None for a selection over depth")
    if columns is None:
        columns = _readable_columns(len(chosen), width)
    if columns < 1:
        raise ValueError(f"columns is {columns}: expected at least 1")
    columns = min(columns, len(chosen))

    maps = saliency.head_mean(pooling, layers=chosen).detach().cpu().to(torch.float64)
    scaled = _scale(maps, normalise, pooling)
    heading = _heading(saliency, chosen, layers is None, title, width)
    side = (width - _LEFT - _RIGHT - _GAP_X * (columns - 1)) / columns
    rows = -(-len(chosen) // columns)
    top = _TOP + _LINE * len(heading)
    height = top + rows * side + (rows - 1) * _GAP_Y + _BOTTOM
    figure = new_figure(width, height)
    runs = segment_runs(saliency.trace.steps)
    cell = side * POINTS_PER_INCH / n_steps

    for panel, layer in enumerate(chosen):
        row, column = divmod(panel, columns)
        x = _LEFT + column * (side + _GAP_X)
        y = height - top - side - row * (side + _GAP_Y)
        axes = figure.add_axes((x / width, y / height, side / width, side / height))
        image = draw_map(axes, scaled.values[panel], COLOUR_MAP, scaled.norm, runs, cell)
        axes.set_title(f"layer {layer}", fontsize=TEXT_SIZE, pad=2.5)
        outer = {"left": column == 0, "bottom": panel + columns >= len(chosen)}
        label_axes(axes, saliency.labels, runs, cell, **outer)
    _colour_bar(figure, image, scaled, width, height, top)
    for i, (line, size, colour) in enumerate(heading):
        y = 1 - (0.13 + _LINE * i) / height
        figure.text(_LEFT / width, y, line, fontsize=size, color=colour, va="center", parse_math=False)
    return figure


def _readable_columns(panels: int, width: float) -> int:
    fitting = max(1, int((width - _LEFT - _RIGHT + _GAP_X) // (0.85 + _GAP_X)))
    return {4: 2}.get(panels, min(panels, 3, fitting)) if fitting >= 2 else 1


def _scale(maps: torch.Tensor, normalise: Normalise, pooling: Pooling) -> _Scaled:
    colors = require("matplotlib.colors", purpose="Drawing a step map")
    above = np.triu(np.ones(maps.shape[-2:], dtype=bool), k=1)
    percent = normalise != "log"
    if percent:
        maps = row_shares(maps)
        label = f"share of the row's\n{'summed' if pooling == 'sum' else 'mean'} saliency"
    else:
        label = _UNIT[pooling]
    if normalise == "row_linear":
        norm = colors.Normalize(0, 1)
    else:
        largest = 1.0 if percent else float(maps.max()) or 1.0
        norm = colors.LogNorm(largest / 10**DECADES, largest, clip=True)
    floor = isinstance(norm, colors.LogNorm)
    values = maps.numpy()
    if floor:  # matplotlib masks the logarithm of 0; a pair without saliency is pale, not absent
        values = np.maximum(values, norm.vmin)
    masked = np.ma.masked_array(values, np.broadcast_to(above, values.shape))
    return _Scaled(masked, norm, label, floor, percent)


def _heading(
    saliency: StepSaliency, chosen: tuple[int, ...], by_default: bool, title: str | None, width: float
) -> list[tuple[str, float, str]]:
    """Lines above the panels, each with its font size and colour."""
    first = title if title is not None else f"Step-Saliency, head mean: {saliency.provenance.model_name}"
    if by_default and len(chosen) < len(saliency.layers):
        shown = f"{len(chosen)} of {len(saliency.layers)} layers, evenly over depth."
    else:
        shown = f"{len(chosen)} of {saliency.n_layers} layers."
    second = f"{shown} Rows draw on columns. Objective: {saliency.provenance.objective}."
    lines = []
    for text, size, colour in ((first, TITLE_SIZE, "black"), (second, TEXT_SIZE, "0.35")):
        lines += [(line, size, colour) for line in wrap_to_width(text, size, width - _LEFT)]
    return lines


def _colour_bar(figure: Any, image: Any, scaled: _Scaled, width: float, height: float, top: float) -> None:
    x = width - _RIGHT + _BAR_GAP
    length = min(height - top - _BOTTOM, _BAR_LENGTH)
    y = height - top - length
    bar_axes = figure.add_axes((x / width, y / height, _BAR_WIDTH / width, length / height))
    bar = figure.colorbar(image, cax=bar_axes, extend="min" if scaled.floor else "neither")
    bar.set_label(scaled.label, fontsize=TEXT_SIZE)
    bar.ax.tick_params(labelsize=TICK_SIZE, length=2, width=0.5, pad=1.5)
    bar.outline.set_linewidth(0.5)
    if scaled.percent:
        bar.ax.minorticks_off()
        ticks = [0.001, 0.01, 0.1, 1] if scaled.floor else [0, 0.25, 0.5, 0.75, 1]
        bar.set_ticks(ticks, labels=[f"{100 * tick:g} %" for tick in ticks])
