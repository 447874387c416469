"""Numbers over depth: one trace's profiles, and two groups of traces with where they differ.

`profile_figure`, one diagnosis:

1. Left, thinking steps: `lock_in` (what a step keeps for itself) against `question_share`. Shallow Lock-in
   would show in the shaded shallow band.
2. Right, summary steps: `thinking_share` against `self_share`. Deep Decay would show in the shaded deep band.
3. A measure that does not apply to this trace (NaN: no summary, too few steps) leaves a gap, and a panel
   without any value says why.

`comparison_figure`, two groups:

1. One column per metric. Above, the mean of each group at each layer; below, their difference with its
   bootstrap interval, and zero.
2. A filled marker in the lower panel is a layer whose corrected p-value is at most `level`; a hollow one is
   not. An interval is for one layer alone, the p-value is corrected over all layers: where they disagree, the
   marker is the more careful of the two.

The bands in which the paper expects Shallow Lock-in and Deep Decay are shaded. One trace gives numbers, not
verdicts: its shading marks where to look, nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stepflow_tl.diagnosis.comparison_result import Comparison
from stepflow_tl.diagnosis.diagnosis import Diagnosis
from stepflow_tl.diagnosis.layer_metrics import LAYER_METRICS
from stepflow_tl.models.bands import deep_band, shallow_band
from stepflow_tl.rendering.layout import wrap_to_width
from stepflow_tl.rendering.sheet import TEXT_SIZE, TICK_SIZE, Margins, Sheet, style_plot
from stepflow_tl.statistics.effects import Effect

if TYPE_CHECKING:
    import matplotlib.figure

# Okabe and Ito's blue and vermilion, told apart further by marker and dash.
_FIRST: dict[str, Any] = {"color": "#0072b2", "marker": "o", "linestyle": "-"}
_SECOND: dict[str, Any] = {"color": "#d55e00", "marker": "s", "linestyle": (0, (4, 1.5))}
_PROFILE = Margins(left=0.58, right=0.12, bottom=0.40, top=0.45)
_PROFILE_GAP_X, _PROFILE_GAP_Y = 0.30, 0.60
_GROUPS = Margins(left=0.62, right=0.12, bottom=0.40, top=0.45)
_GROUPS_GAP_X, _GROUPS_GAP_Y = 0.55, 0.22
_PANELS = (
    ("Thinking steps", ("lock_in", "question_share")),
    ("Summary steps", ("thinking_share", "self_share")),
)


def profile_figure(
    diagnosis: Diagnosis, *, width: float = 7.0, title: str | None = None
) -> matplotlib.figure.Figure:
    """Draw shares of saliency over depth, with the shallow and deep bands shaded.

    Args:
        diagnosis: From `diagnose`.
        width: Figure width in inches; below 5 the two panels stand one above the other.
        title: First line above the panels; by default it names the model.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    columns = 2 if width >= 5 else 1
    rows = len(_PANELS) // columns
    panel_width = (_PROFILE.inner(width) - (columns - 1) * _PROFILE_GAP_X) / columns
    panel_height = min(2.0, 0.6 * panel_width)
    heading = title if title is not None else f"Step-Saliency over depth: {diagnosis.model_name}"
    sheet = Sheet(width, rows * panel_height + (rows - 1) * _PROFILE_GAP_Y, _PROFILE, heading)
    for panel, (name, metrics) in enumerate(_PANELS):
        row, column = divmod(panel, columns)
        x, down = column * (panel_width + _PROFILE_GAP_X), row * (panel_height + _PROFILE_GAP_Y)
        axes = sheet.panel(x, down, panel_width, panel_height)
        axes.set_title(name, fontsize=TEXT_SIZE, pad=13, loc="left", fontweight="bold")
        _prepare(axes, diagnosis.n_layers)
        axes.set_ylim(0, 1.1)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25 %", "50 %", "75 %", "100 %"])
        _draw_shares(axes, diagnosis, metrics, panel_width)
        if column == 0:
            axes.set_ylabel("share of a step's saliency", fontsize=TEXT_SIZE)
        else:
            axes.tick_params(labelleft=False)
        if row == rows - 1:
            axes.set_xlabel("layer", fontsize=TEXT_SIZE)
    return sheet.figure


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

    Raises:
        ComparisonError: If there is no such metric.
        ValueError: If `metrics` is empty or holds one that has no layers.
        MissingExtraError: If matplotlib is not installed.
    """
    families = [_by_depth(comparison, metric) for metric in metrics]
    if not families:
        raise ValueError("no metric to draw: expected at least one, such as 'lock_in'")
    last = max(effect.layer for family in families for effect in family if effect.layer is not None)
    depth = last + 1 if n_layers is None else n_layers
    (name, n), (other, other_n) = zip(comparison.names, comparison.n_traces, strict=True)
    heading = title or f"{name} ({n} traces) and {other} ({other_n}): {comparison.model_name}"
    columns = len(families) if width >= 5 else 1
    rows = len(families) // columns
    panel = (_GROUPS.inner(width) - (columns - 1) * _GROUPS_GAP_X) / columns
    upper, lower = min(1.7, 0.6 * panel), min(1.0, 0.38 * panel)
    inside = upper + _GROUPS_GAP_Y + lower
    block = _GROUPS.top + inside + _GROUPS.bottom
    sheet = Sheet(width, (rows - 1) * block + inside, _GROUPS, heading)
    for i, (metric, family) in enumerate(zip(metrics, families, strict=True)):
        row, column = divmod(i, columns)
        x, down = column * (panel + _GROUPS_GAP_X), row * block
        below = sheet.panel(x, down + upper + _GROUPS_GAP_Y, panel, lower)
        above = sheet.panel(x, down, panel, upper, sharex=below)
        above.set_title(metric, fontsize=TEXT_SIZE, pad=13, loc="left", fontweight="bold")
        _prepare(above, depth)
        _prepare(below, depth, named=False)
        above.tick_params(labelbottom=False)
        _draw_means(above, family, comparison.names)
        _draw_difference(below, family, level)
        below.set_xlabel("layer", fontsize=TEXT_SIZE)
        if column == 0:
            above.set_ylabel("mean", fontsize=TEXT_SIZE)
            below.set_ylabel("difference", fontsize=TEXT_SIZE)
    return sheet.figure


def _prepare(axes: Any, n_layers: int, *, named: bool = True) -> None:
    """Shade the bands and limit x to the model's layers; names of bands take a tenth of the height."""
    for band, name in ((shallow_band(n_layers), "shallow"), (deep_band(n_layers), "deep")):
        axes.axvspan(band.start - 0.5, band.stop - 0.5, color="0.93", linewidth=0, zorder=0)
        if named:
            at = ((band.start + band.stop - 1) / 2, 0.927)
            style = {"fontsize": TICK_SIZE, "color": "0.4", "ha": "center", "va": "bottom"}
            axes.text(*at, name, transform=axes.get_xaxis_transform(), **style)
    axes.set_xlim(-0.5, n_layers - 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    style_plot(axes, "y", "0.85")


def _legend_above(axes: Any) -> None:
    spacing = {"borderaxespad": 0, "borderpad": 0.3, "handlelength": 2.2, "columnspacing": 1.0}
    at = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
    axes.legend(fontsize=TICK_SIZE, frameon=False, **at, **spacing)


def _draw_shares(axes: Any, diagnosis: Diagnosis, metrics: tuple[str, str], width: float) -> None:
    order = np.argsort(diagnosis.layers)
    layers = np.asarray(diagnosis.layers)[order]
    drawn = False
    for metric, style in zip(metrics, (_FIRST, _SECOND), strict=True):
        shares = np.asarray(diagnosis.metrics[metric].tolist(), dtype=float)[order]
        if np.isnan(shares).all():
            continue
        name = LAYER_METRICS[metric].label
        if metric == "lock_in" and diagnosis.window:
            name = f"on itself and {diagnosis.window} before (lock-in)"
        axes.plot(layers, shares, label=name, linewidth=1.1, markersize=2.6, **style)
        drawn = True
    if drawn:
        _legend_above(axes)
        return
    reasons = [diagnosis.reasons[metric] for metric in metrics if metric in diagnosis.reasons]
    words = "\n".join(
        wrap_to_width(reasons[0] if reasons else "not defined for this trace", TEXT_SIZE, width)
    )
    axes.text(0.5, 0.4, words, fontsize=TEXT_SIZE, color="0.35", transform=axes.transAxes, ha="center")


def _by_depth(comparison: Comparison, metric: str) -> list[Effect]:
    effects = comparison.of(metric)
    if any(effect.layer is None for effect in effects):
        raise ValueError(
            f"{metric!r} has one value per trace, not one per layer: it cannot be drawn over depth"
        )
    return sorted(effects, key=lambda effect: effect.layer or 0)


def _draw_means(axes: Any, effects: Sequence[Effect], names: tuple[str, str]) -> None:
    layers = [effect.layer for effect in effects]
    for name, field, style in ((names[0], "mean", _FIRST), (names[1], "other_mean", _SECOND)):
        values = [getattr(effect, field) for effect in effects]
        axes.plot(layers, values, label=name, linewidth=1.1, markersize=2.6, **style)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.15 * (high - low))  # room for the bands' names
    _legend_above(axes)


def _draw_difference(axes: Any, effects: Sequence[Effect], level: float) -> None:
    layers = np.array([effect.layer for effect in effects])
    low, high, middle = (
        np.array([getattr(effect, field) for effect in effects], dtype=float)
        for field in ("low", "high", "difference")
    )
    axes.axhline(0, color="0.3", linewidth=0.6)
    axes.vlines(layers, low, high, color="0.25", linewidth=0.9)
    sure = np.array([effect.p_corrected <= level for effect in effects])
    style = {"markersize": 3, "color": "0.1", "markeredgewidth": 0.7}
    for chosen, face in ((sure, "0.1"), (~sure, "white")):
        axes.plot(layers[chosen], middle[chosen], "o", markerfacecolor=face, **style)
