"""Axes over a model's depth: layers along x, the shallow and the deep band shaded, two line styles."""

from __future__ import annotations

from typing import Any

from stepflow_tl.models.bands import deep_band, shallow_band

TICK_SIZE, TEXT_SIZE, TITLE_SIZE = 6.5, 7.0, 8.0
# Okabe and Ito's blue and vermilion, told apart further by marker and dash.
FIRST: dict[str, Any] = {"color": "#0072b2", "marker": "o", "linestyle": "-"}
SECOND: dict[str, Any] = {"color": "#d55e00", "marker": "s", "linestyle": (0, (4, 1.5))}


def prepare_depth_axes(axes: Any, n_layers: int, *, named: bool = True) -> None:
    """Shade the bands, limit x to the model's layers, thin lines and a light grid.

    Args:
        axes: Of a matplotlib figure.
        n_layers: Layers of the whole model.
        named: Whether the bands' names stand inside, at the top: leave a tenth of the height free.
    """
    for band, name in ((shallow_band(n_layers), "shallow"), (deep_band(n_layers), "deep")):
        axes.axvspan(band.start - 0.5, band.stop - 0.5, color="0.93", linewidth=0, zorder=0)
        if named:
            middle = (band.start + band.stop - 1) / 2
            above = axes.get_xaxis_transform()
            axes.text(
                middle,
                0.927,
                name,
                fontsize=TICK_SIZE,
                color="0.4",
                ha="center",
                va="bottom",
                transform=above,
            )
    axes.set_xlim(-0.5, n_layers - 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="0.85", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=TICK_SIZE, length=2, width=0.5, pad=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_linewidth(0.5)
