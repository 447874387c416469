"""Axes of one step map: the image, the lines between segments, step labels and segment names in the margins.

Positions are step indices: step i's cell covers [i - 0.5, i + 0.5]. Nothing is drawn over the cells but the
boundary lines, and those are thin: with 120 steps the question's column is one point wide.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stepflow_tl.rendering.layout import SegmentRun, boundaries, margin_names, thin_ticks

TICK_SIZE, TEXT_SIZE, TITLE_SIZE = 6.0, 7.0, 8.0
BOUNDARY_COLOUR = "#00a08a"  # absent from the colour maps, and visible on both of their ends


def draw_map(
    axes: Any, values: np.ndarray, colour_map: str, norm: Any, runs: list[SegmentRun], cell: float
) -> Any:
    """Draw one map and the lines between segments.

    Args:
        axes: Of a matplotlib figure.
        values: `[query_step, key_step]`, masked above the diagonal.
        colour_map: Name of a colour map.
        norm: What brings values to colours.
        runs: Segments, from `segment_runs`.
        cell: Width of a step in points.

    Returns:
        The image, for a colour bar.
    """
    image = axes.imshow(values, cmap=colour_map, norm=norm, interpolation="nearest", aspect="auto")
    n = values.shape[-1]
    for at in boundaries(runs):
        # An L inside the lower triangle: along the first row after the boundary, and down from the diagonal.
        axes.plot(
            [-0.5, at, at],
            [at, at, n - 0.5],
            color=BOUNDARY_COLOUR,
            linewidth=min(0.8, 0.35 * cell),
            solid_capstyle="butt",
            solid_joinstyle="miter",
        )
    axes.set_xlim(-0.5, n - 0.5)
    axes.set_ylim(n - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    return image


def label_axes(
    axes: Any, labels: list[str], runs: list[SegmentRun], cell: float, *, left: bool, bottom: bool
) -> None:
    """Step labels along the outer panels only, then a bar and a name a segment; `cell` is in points."""
    ticks = thin_ticks(runs, TICK_SIZE * 1.2 / cell)
    names = [labels[i] for i in ticks]
    axes.set_xticks(ticks, labels=names if bottom else [""] * len(ticks), rotation=90)
    axes.set_yticks(ticks, labels=names if left else [""] * len(ticks))
    axes.tick_params(labelsize=TICK_SIZE, length=2, width=0.5, pad=1.5)
    side = cell * len(labels)
    bar_at = -(5 + max(len(name) for name in names) * TICK_SIZE * 0.66) / side
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
