"""Activation patching as a map: layers upward, steps to the right, red where the patch raises the metric.

The colour scale is symmetric about 0 and reaches the largest effect; a cell is one pass of the corrupted run
in which one step's activations in one layer came from the clean run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepflow_tl.rendering.export import new_figure
from stepflow_tl.rendering.extras import require
from stepflow_tl.rendering.flow_maps import CHANGE_MAP
from stepflow_tl.rendering.layout import POINTS_PER_INCH, wrap_to_width
from stepflow_tl.rendering.map_axes import TEXT_SIZE, TICK_SIZE, TITLE_SIZE

if TYPE_CHECKING:
    import matplotlib.figure

    from stepflow_tl.causal.patching_result import StepPatching

_LEFT, _RIGHT, _BOTTOM, _TOP, _LINE = 0.5, 0.85, 0.5, 0.22, 0.14
_BAR_WIDTH, _BAR_GAP = 0.11, 0.14


def patching_figure(
    patching: StepPatching, *, width: float = 5.0, title: str | None = None
) -> matplotlib.figure.Figure:
    """Draw the effect of every layer and step.

    Args:
        patching: From `step_patching` or `attribution_patching`.
        width: Figure width in inches.
        title: First line; by default it names method, component and model.

    Returns:
        A matplotlib figure that belongs to no window. Save it with `save_figure`.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    colors = require("matplotlib.colors", purpose="Drawing a patching map")
    order = sorted(range(len(patching.layers)), key=lambda row: patching.layers[row])
    layers = [patching.layers[row] for row in order]
    values = patching.effects[order].numpy()
    largest = float(abs(values).max()) or 1.0
    path = f", read by {patching.receiving_step}" if patching.receiving_step else ""
    first = title or f"{patching.method} of {patching.component}{path}: {patching.provenance.model_name}"
    second = f"Metric: {patching.provenance.objective}; without a patch {patching.corrupted_value:.3g}."
    lines = [(line, TITLE_SIZE, "black") for line in wrap_to_width(first, TITLE_SIZE, width - _LEFT)]
    lines += [(line, TEXT_SIZE, "0.35") for line in wrap_to_width(second, TEXT_SIZE, width - _LEFT)]
    inner = width - _LEFT - _RIGHT
    tall = min(4.0, max(0.9, 0.16 * len(layers)))
    top = _TOP + _LINE * len(lines)
    height = top + tall + _BOTTOM
    figure = new_figure(width, height)
    axes = figure.add_axes((_LEFT / width, _BOTTOM / height, inner / width, tall / height))
    norm = colors.Normalize(-largest, largest)
    image = axes.imshow(
        values, cmap=CHANGE_MAP, norm=norm, aspect="auto", origin="lower", interpolation="nearest"
    )
    for count, setter, names in (
        (len(patching.labels), axes.set_xticks, patching.labels),
        (len(layers), axes.set_yticks, [str(layer) for layer in layers]),
    ):
        room = (inner if setter == axes.set_xticks else tall) * POINTS_PER_INCH / count
        stride = max(1, -(-int(TICK_SIZE * 1.3) // max(1, int(room))))
        shown = list(range(0, count, stride))
        setter(shown, labels=[names[i] for i in shown])
    axes.tick_params(labelsize=TICK_SIZE, length=2, width=0.5, pad=1.5)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("patched step", fontsize=TEXT_SIZE)
    axes.set_ylabel("layer", fontsize=TEXT_SIZE)
    axes.spines[:].set_linewidth(0.5)
    x = (width - _RIGHT + _BAR_GAP) / width
    bar_axes = figure.add_axes((x, _BOTTOM / height, _BAR_WIDTH / width, tall / height))
    bar = figure.colorbar(image, cax=bar_axes)
    bar.set_label("effect on the metric", fontsize=TEXT_SIZE)
    bar.ax.tick_params(labelsize=TICK_SIZE, length=2, width=0.5, pad=1.5)
    bar.outline.set_linewidth(0.5)
    for i, (line, size, colour) in enumerate(lines):
        y = 1 - (0.13 + _LINE * i) / height
        figure.text(_LEFT / width, y, line, fontsize=size, color=colour, va="center", parse_math=False)
    return figure
