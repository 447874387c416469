"""Two groups of traces over depth: where the groups' means run, and where they differ.

1. A column a metric. Above, the mean of each group at each layer; below, their difference with its
   bootstrap interval, and zero.
2. A filled marker in the lower panel is a layer whose corrected p-value is at most `level`; a hollow one is
   not. An interval is for one layer alone, the p-value is corrected over all layers: where they disagree, the
   marker is the more careful of the two.
3. The bands in which the paper expects Shallow Lock-in and Deep Decay are shaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stepflow_tl.diagnosis.comparison import Comparison
from stepflow_tl.rendering.depth_axes import (
    FIRST,
    SECOND,
    TEXT_SIZE,
    TICK_SIZE,
    TITLE_SIZE,
    prepare_depth_axes,
)
from stepflow_tl.rendering.export import new_figure
from stepflow_tl.rendering.extras import require
from stepflow_tl.rendering.layout import wrap_to_width
from stepflow_tl.statistics.effects import Effect

if TYPE_CHECKING:
    import matplotlib.figure

_LEFT, _RIGHT, _BOTTOM, _TOP = 0.62, 0.12, 0.40, 0.45
_GAP_X, _GAP_Y, _LINE = 0.55, 0.22, 0.15


def comparison_figure(
    comparison: Comparison,
    metrics: Sequence[str] = ("lock_in", "thinking_share"),
    *,
    n_layers: int | None = None,
    width: float = 7.0,
    level: float = 0.05,
    title: str | None = None,
) -> matplotlib.figure.Figure:
    """Draw the groups of a comparison over depth, and their difference.

    Args:
        comparison: From `compare`.
        metrics: Metrics that have a value at every layer, one column each.
        n_layers: Layers of the whole model, for the bands; by default up to the last one compared.
        width: Figure width in inches; below 5 the metrics stand one below the other.
        level: Corrected p-value up to which a layer's marker is filled.
        title: First line; by default it names groups and model.

    Returns:
        A matplotlib figure that belongs to no window. Save it with `save_figure`.

    Raises:
        ComparisonError: If there is no such metric.
        ValueError: If `metrics` is empty or holds one that has no layers.
        MissingExtraError: If matplotlib is not installed.
    """
    require("matplotlib", purpose="Drawing a comparison")
    families = [_by_depth(comparison, metric) for metric in metrics]
    if not families:
        raise ValueError("no metric to draw: expected at least one, such as 'lock_in'")
    last = max(effect.layer for family in families for effect in family if effect.layer is not None)
    depth = last + 1 if n_layers is None else n_layers
    (name, n), (other, other_n) = zip(comparison.names, comparison.n_traces, strict=True)
    heading = title or f"{name} ({n} traces) and {other} ({other_n}): {comparison.model_name}"
    lines = wrap_to_width(heading, TITLE_SIZE, width - _LEFT)
    columns = len(families) if width >= 5 else 1
    rows = len(families) // columns
    panel = (width - _LEFT - _RIGHT - (columns - 1) * _GAP_X) / columns
    upper, lower = min(1.7, 0.6 * panel), min(1.0, 0.38 * panel)
    block = _TOP + upper + _GAP_Y + lower + _BOTTOM
    height = _LINE * len(lines) + rows * block
    figure = new_figure(width, height)
    for i, (metric, family) in enumerate(zip(metrics, families, strict=True)):
        row, column = divmod(i, columns)
        x = (_LEFT + column * (panel + _GAP_X)) / width
        foot = (rows - 1 - row) * block + _BOTTOM
        below = figure.add_axes((x, foot / height, panel / width, lower / height))
        bottom = (foot + lower + _GAP_Y) / height
        above = figure.add_axes((x, bottom, panel / width, upper / height), sharex=below)
        above.set_title(metric, fontsize=TEXT_SIZE, pad=13, loc="left", fontweight="bold")
        prepare_depth_axes(above, depth)
        prepare_depth_axes(below, depth, named=False)
        above.tick_params(labelbottom=False)
        _draw_means(above, family, comparison.names)
        _draw_difference(below, family, level)
        below.set_xlabel("layer", fontsize=TEXT_SIZE)
        if column == 0:
            above.set_ylabel("mean", fontsize=TEXT_SIZE)
            below.set_ylabel("difference", fontsize=TEXT_SIZE)
    for i, line in enumerate(lines):
        y = 1 - (0.15 + _LINE * i) / height
        figure.text(_LEFT / width, y, line, fontsize=TITLE_SIZE, va="center", parse_math=False)
    return figure


def _by_depth(comparison: Comparison, metric: str) -> list[Effect]:
    effects = comparison.of(metric)
    if any(effect.layer is None for effect in effects):
        raise ValueError(f"{metric!r} has one value a trace, not one a layer: it cannot be drawn over depth")
    return sorted(effects, key=lambda effect: effect.layer or 0)


def _draw_means(axes: Any, effects: Sequence[Effect], names: tuple[str, str]) -> None:
    layers = [effect.layer for effect in effects]
    for name, field, style in ((names[0], "mean", FIRST), (names[1], "other_mean", SECOND)):
        values = [getattr(effect, field) for effect in effects]
        axes.plot(layers, values, label=name, linewidth=1.1, markersize=2.6, **style)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.15 * (high - low))  # room for the bands' names
    axes.legend(
        fontsize=TICK_SIZE,
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        borderaxespad=0,
        borderpad=0.3,
        handlelength=2.2,
        columnspacing=1.0,
    )


def _draw_difference(axes: Any, effects: Sequence[Effect], level: float) -> None:
    layers = np.array([effect.layer for effect in effects])
    low, high, middle = (
        np.array([getattr(effect, field) for effect in effects], dtype=float)
        for field in ("low", "high", "difference")
    )
    axes.axhline(0, color="0.3", linewidth=0.6)
    axes.vlines(layers, low, high, color="0.25", linewidth=0.9)
    sure = np.array([effect.p_corrected <= level for effect in effects])
    for chosen, face in ((sure, "0.1"), (~sure, "white")):
        axes.plot(
            layers[chosen],
            middle[chosen],
            "o",
            markersize=3,
            color="0.1",
            markerfacecolor=face,
            markeredgewidth=0.7,
        )
