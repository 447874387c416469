"""Lock-in and decay over depth: the per-layer numbers of one diagnosis as two panels.

1. Left, thinking steps: `lock_in` (what a step keeps for itself) against `question_share`. Shallow Lock-in
   would show in the shaded shallow band.
2. Right, summary steps: `thinking_share` against `self_share`. Deep Decay would show in the shaded deep band.
3. A measure that does not apply to this trace (NaN: no summary, too few steps) leaves a gap, and a panel
   without any value says why.

One trace gives numbers, not verdicts: the shading marks where to look, nothing more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stepflow_tl.diagnosis.diagnosis import Diagnosis
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

if TYPE_CHECKING:
    import matplotlib.figure

_LEFT, _RIGHT, _BOTTOM, _TOP = 0.58, 0.12, 0.40, 0.45
_GAP_X, _GAP_Y, _LINE = 0.30, 0.60, 0.15
_PANELS = (
    ("Thinking steps", ("lock_in", "on the step itself (lock-in)"), ("question_share", "on the question")),
    ("Summary steps", ("thinking_share", "on the thinking"), ("self_share", "on the summary itself")),
)


def profile_figure(
    diagnosis: Diagnosis, *, width: float = 7.0, title: str | None = None
) -> matplotlib.figure.Figure:
    """Draw shares of saliency over depth, with the shallow and deep bands shaded.

    Args:
        diagnosis: From `diagnose`.
        width: Figure width in inches; below 5 the two panels stand one above the other.
        title: First line above the panels; by default it names the model.

    Returns:
        A matplotlib figure that belongs to no window. Save it with `save_figure`.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    require("matplotlib", purpose="Drawing a profile")
    columns = 2 if width >= 5 else 1
    rows = len(_PANELS) // columns
    panel_width = (width - _LEFT - _RIGHT - (columns - 1) * _GAP_X) / columns
    panel_height = min(2.0, 0.6 * panel_width)
    heading = title if title is not None else f"Step-Saliency over depth: {diagnosis.model_name}"
    lines = wrap_to_width(heading, TITLE_SIZE, width - _LEFT)
    top = _TOP + _LINE * len(lines)
    height = top + rows * panel_height + (rows - 1) * _GAP_Y + _BOTTOM
    figure = new_figure(width, height)
    for panel, (name, first, second) in enumerate(_PANELS):
        row, column = divmod(panel, columns)
        x = _LEFT + column * (panel_width + _GAP_X)
        y = height - top - panel_height - row * (panel_height + _GAP_Y)
        axes = figure.add_axes((x / width, y / height, panel_width / width, panel_height / height))
        axes.set_title(name, fontsize=TEXT_SIZE, pad=13, loc="left", fontweight="bold")
        prepare_depth_axes(axes, diagnosis.n_layers)
        axes.set_ylim(0, 1.1)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25 %", "50 %", "75 %", "100 %"])
        _draw_shares(axes, diagnosis, (first, second), panel_width)
        axes.tick_params(labelsize=TICK_SIZE, length=2, width=0.5, pad=2)
        if column == 0:
            axes.set_ylabel("share of a step's saliency", fontsize=TEXT_SIZE)
        else:
            axes.tick_params(labelleft=False)
        if row == rows - 1:
            axes.set_xlabel("layer", fontsize=TEXT_SIZE)
    for i, line in enumerate(lines):
        y = 1 - (0.15 + _LINE * i) / height
        figure.text(_LEFT / width, y, line, fontsize=TITLE_SIZE, va="center", parse_math=False)
    return figure


def _draw_shares(
    axes: Any, diagnosis: Diagnosis, lines: tuple[tuple[str, str], tuple[str, str]], width: float
) -> None:
    order = np.argsort(diagnosis.layers)
    layers = np.asarray(diagnosis.layers)[order]
    drawn = False
    for (metric, name), style in zip(lines, (FIRST, SECOND), strict=True):
        shares = np.asarray(getattr(diagnosis, metric).tolist(), dtype=float)[order]
        if np.isnan(shares).all():
            continue
        if metric == "lock_in" and diagnosis.window:
            name = f"on itself and {diagnosis.window} before (lock-in)"
        axes.plot(layers, shares, label=name, linewidth=1.1, markersize=2.6, **style)
        drawn = True
    if drawn:
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
        return
    reasons = [diagnosis.reasons[metric] for metric, _ in lines if metric in diagnosis.reasons]
    words = "\n".join(
        wrap_to_width(reasons[0] if reasons else "not defined for this trace", TEXT_SIZE, width)
    )
    axes.text(0.5, 0.4, words, fontsize=TEXT_SIZE, color="0.35", transform=axes.transAxes, ha="center")
