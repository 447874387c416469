"""Activation patching as a map: layers upward, steps to the right, red where the patch raises the metric.

The colour scale is symmetric about 0 and reaches the largest effect; a cell is one pass of the corrupted run
in which one step's activations in one layer came from the clean run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepflow_tl.causal.patching_result import StepPatching
from stepflow_tl.rendering.flow_maps import CHANGE_MAP
from stepflow_tl.rendering.layout import POINTS_PER_INCH
from stepflow_tl.rendering.sheet import MAP_TICK_SIZE, TEXT_SIZE, Margins, Sheet, matplotlib_part, style_ticks

if TYPE_CHECKING:
    import matplotlib.figure

_MARGINS = Margins(left=0.5, right=0.85, bottom=0.5, top=0.22, line=0.14, first=0.13)
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
    colors = matplotlib_part("colors")
    order = sorted(range(len(patching.layers)), key=lambda row: patching.layers[row])
    layers = [patching.layers[row] for row in order]
    values = patching.effects[order].numpy()
    largest = float(abs(values).max()) or 1.0
    path = f", read by {patching.receiving_step}" if patching.receiving_step else ""
    heading = title or f"{patching.method} of {patching.component}{path}: {patching.provenance.model_name}"
    note = f"Metric: {patching.provenance.objective}; without a patch {patching.corrupted_value:.3g}."
    inner = _MARGINS.inner(width)
    tall = min(4.0, max(0.9, 0.16 * len(layers)))
    sheet = Sheet(width, tall, _MARGINS, heading, note)
    axes = sheet.panel(0.0, 0.0, inner, tall)
    norm = colors.Normalize(-largest, largest)
    image = axes.imshow(
        values, cmap=CHANGE_MAP, norm=norm, aspect="auto", origin="lower", interpolation="nearest"
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
    sheet.colour_bar(image, (inner + _BAR_GAP, 0.0, _BAR_WIDTH, tall), "effect on the metric")
    return sheet.figure
