"""The sheet that every figure is drawn on: sizes, heading, panels, colour bars, legends, and how it is saved.

1. All lengths are inches, so text keeps its size whatever a figure shows. A sheet is the heading (title, then
   notes, wrapped to the width), the body that the caller asked for, and margins around it.
2. Panels are placed in the body, from its upper left corner.
3. Saving writes the figure into memory first, so a failed drawing leaves the target as it was; then the bytes
   go to a temporary file beside the target and are renamed over it. Dates and random ids are left out of SVG
   and PDF: the same figure gives the same file.

No pyplot: a figure belongs to no window and is freed with its last reference.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from stepflow_tl.errors import ResultFileError, require
from stepflow_tl.rendering.layout import wrap_to_width
from stepflow_tl.results.files import write_atomically

if TYPE_CHECKING:
    import matplotlib.figure

TICK_SIZE, TEXT_SIZE, TITLE_SIZE = 6.5, 7.0, 8.0
MAP_TICK_SIZE = 6.0  # a map has a label for each step
_UNDATED: dict[str, dict[str, None]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
_NOTEBOOK_DPI = 150


class Margins(NamedTuple):
    """Room around the body of a sheet, in inches.

    Attributes:
        left: Left of the body.
        right: Right of it.
        bottom: Below it.
        top: Above it, the lines of the heading apart.
        line: Height of a line of the heading.
        first: From the upper edge to the middle of the first line.
        text: Left and right of the heading; None begins it at the body's left and ends it at the edge.
    """

    left: float
    right: float
    bottom: float
    top: float
    line: float = 0.15
    first: float = 0.15
    text: float | None = None

    def inner(self, width: float) -> float:
        """Width of the body on a sheet of this width."""
        return width - self.left - self.right


class Sheet:
    """A figure with its heading; panels, bars and legends are added to it."""

    def __init__(
        self,
        width: float,
        body: float,
        margins: Margins,
        title: str,
        note: str = "",
        *,
        legend_rows: int = 0,
    ) -> None:
        """Make a figure with a body of this height, and write its heading: the title black, the note grey.

        `legend_rows` lines are left free for `legend`. A notebook shows the figure even where pyplot was
        never imported: IPython asks objects for `_repr_png_`.

        Raises:
            MissingExtraError: If matplotlib is not installed.
        """
        left, room = margins.left, width - margins.left
        if margins.text is not None:
            left, room = margins.text, width - 2 * margins.text
        lines = [(line, TITLE_SIZE, "black") for line in wrap_to_width(title, TITLE_SIZE, room)]
        lines += [(line, TEXT_SIZE, "0.35") for line in wrap_to_width(note, TEXT_SIZE, room)]
        self.margins = margins
        self.width = width
        self.height = margins.top + margins.line * (len(lines) + legend_rows) + body + margins.bottom
        size = (width, self.height)
        self.figure: matplotlib.figure.Figure = matplotlib_part("figure").Figure(size, facecolor="white")
        matplotlib_part("backends.backend_agg").FigureCanvasAgg(self.figure)
        self.figure._repr_png_ = partial(_figure_bytes, self.figure, "png", _NOTEBOOK_DPI)  # pyright: ignore
        self._body, self._text_left, self._n_lines = body, left, len(lines)
        for i, (line, size, colour) in enumerate(lines):
            at = left / width, 1 - (margins.first + margins.line * i) / self.height
            self.figure.text(*at, line, fontsize=size, color=colour, va="center", parse_math=False)

    def panel(self, x: float, down: float, width: float, height: float, **options: Any) -> Any:
        """Axes in the body: `x` from its left, `down` from its top, and their size."""
        left = self.margins.left + x
        bottom = self.margins.bottom + (self._body - down - height)
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box, **options)

    def colour_bar(
        self,
        image: Any,
        at: tuple[float, float, float, float],
        label: str,
        *,
        extend: Literal["neither", "min", "both"] = "neither",
        lying: bool = False,
        percent_ticks: Sequence[float] | None = None,
    ) -> None:
        """A colour bar for `image`, placed as a panel is.

        Args:
            image: What `imshow` or `draw_map` returned.
            at: As in `panel`.
            label: What the colours mean, with the unit.
            extend: Ends beyond which values may lie.
            lying: Whether it lies below its panels, instead of standing beside them.
            percent_ticks: Parts of 1 to label as percentages; matplotlib's own ticks by default.
        """
        orientation = "horizontal" if lying else "vertical"
        bar = self.figure.colorbar(image, cax=self.panel(*at), orientation=orientation, extend=extend)
        bar.set_label(label, fontsize=TEXT_SIZE, labelpad=2 if lying else 4)
        style_ticks(bar.ax, MAP_TICK_SIZE, pad=1.5)
        bar.outline.set_linewidth(0.5)
        if percent_ticks is not None:
            bar.ax.minorticks_off()
            bar.set_ticks(list(percent_ticks), labels=[f"{100 * tick:g} %" for tick in percent_ticks])

    def legend(self, handles: list[Any], *, columns: int, gap: float, **options: Any) -> None:
        """A legend without a frame, `gap` below the heading's last line."""
        down = gap + self.margins.line * self._n_lines
        self.figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(self._text_left / self.width, 1 - down / self.height),
            ncols=columns,
            fontsize=TICK_SIZE,
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            columnspacing=1.2,
            **options,
        )


def style_ticks(axes: Any, size: float, *, pad: float = 2) -> None:
    """Short thin ticks with labels of this size in points."""
    axes.tick_params(labelsize=size, length=2, width=0.5, pad=pad)


def style_plot(axes: Any, grid: str, colour: str) -> None:
    """A light grid ("both", "y") below the data, thin axes on the left and below, none around the rest."""
    axes.grid(axis=grid, color=colour, linewidth=0.4)
    axes.set_axisbelow(True)
    style_ticks(axes, TICK_SIZE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_linewidth(0.5)


def matplotlib_part(name: str) -> ModuleType:
    """A module of matplotlib, such as "colors".

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    return require(f"matplotlib.{name}", purpose="Drawing a figure", extra="plots")


def save_figure(figure: matplotlib.figure.Figure, path: str | Path, *, dpi: int = 300) -> Path:
    """Write a figure as PNG, SVG or PDF, by the path's ending.

    Args:
        figure: From `step_map_figure` or any other matplotlib figure.
        path: Target; an existing file is replaced once the new one is whole.
        dpi: Dots per inch of a PNG, and of the map images inside SVG and PDF.

    Returns:
        The path.

    Raises:
        ResultFileError: If the ending is none of the three, or the file cannot be written.
        MissingExtraError: If matplotlib is not installed.
    """
    target = Path(path)
    kind = target.suffix.lower().removeprefix(".")
    if kind not in _UNDATED:
        raise ResultFileError(
            f"cannot save a figure as {target.name!r}: expected a name that ends in .png, .svg or .pdf"
        )
    write_atomically(target, _figure_bytes(figure, kind, dpi))
    return target


def _figure_bytes(figure: matplotlib.figure.Figure, kind: str, dpi: int) -> bytes:
    """Draw a figure into memory as `"png"`, `"svg"` or `"pdf"`."""
    matplotlib = require("matplotlib", purpose="Saving a figure", extra="plots")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "stepflow_tl"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=_UNDATED[kind])
    return buffer.getvalue()
