"""Figures to files and notebooks, without pyplot.

1. The figure is written into memory first, so a failed drawing leaves the target as it was.
2. The bytes go to a temporary file beside the target and are renamed over it.
3. Dates and random ids are left out of SVG and PDF: the same figure gives the same file.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stepflow_tl.errors import ResultFileError
from stepflow_tl.rendering.extras import require
from stepflow_tl.results.files import write_atomically

if TYPE_CHECKING:
    import matplotlib.figure

_UNDATED: dict[str, dict[str, None]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
_NOTEBOOK_DPI = 150


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
    write_atomically(target, figure_bytes(figure, kind, dpi))
    return target


def figure_bytes(figure: matplotlib.figure.Figure, kind: str, dpi: int) -> bytes:
    """Draw a figure into memory as `"png"`, `"svg"` or `"pdf"`."""
    matplotlib = require("matplotlib", purpose="Saving a figure")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "stepflow_tl"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=_UNDATED[kind])
    return buffer.getvalue()


def new_figure(width: float, height: float) -> matplotlib.figure.Figure:
    """Make a figure of a size in inches that belongs to no window and is freed with its last reference.

    A notebook shows it even where pyplot was never imported: IPython asks objects for `_repr_png_`.
    """
    figure_module = require("matplotlib.figure", purpose="Drawing a figure")
    agg = require("matplotlib.backends.backend_agg", purpose="Drawing a figure")
    figure = figure_module.Figure(figsize=(width, height), facecolor="white")
    agg.FigureCanvasAgg(figure)
    figure._repr_png_ = partial(figure_bytes, figure, "png", _NOTEBOOK_DPI)
    return figure
