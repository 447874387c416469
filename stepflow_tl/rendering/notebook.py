"""One copy of circuitsvis' script a notebook: which output carries it.

The kernel sees cells run; it does not see outputs being cleared or a page being reloaded. So:

1. The first view shown carries the script. Later ones carry nothing and share it, wherever they stand.
2. A cell that is run again carries the script itself: it may be the one that carried it before, whose output
   is gone now, or one whose view stays empty because the carrier was cleared. The former carrier, if it is
   another cell's, is sent again without the script, so there is still one copy.
3. Where outputs cannot share (Colab gives each a page of its own), every view carries it.

A cell is known by the id that Jupyter sends, or by its code where none is sent. A front end that was reloaded
in between no longer knows which output to replace; two copies then stay until the notebook is run afresh.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from stepflow_tl.rendering.circuitsvis_view import CircuitsvisView


@dataclass(frozen=True)
class Output:
    """A view that was shown: where, and under which name the front end can replace it."""

    view: CircuitsvisView
    cell: str
    display_id: str


class ScriptCarrier:
    """Decides for each view that is shown whether it carries the script."""

    def __init__(self) -> None:
        """No view was shown yet."""
        self._carrier: Output | None = None
        self._last_run: dict[str, str] = {}

    def place(self, view: CircuitsvisView, cell: str, run: str) -> tuple[bool, str, Output | None]:
        """Where the script of one more view comes from.

        Args:
            view: The view to show.
            cell: The cell that shows it.
            run: The execution of the cell.

        Returns:
            Whether this view carries the script, a display id for it, and the output that has to be sent
            again without it.
        """
        is_again = self._last_run.get(cell, run) != run
        self._last_run[cell] = run
        display_id = f"stepflow-tl-{uuid4().hex}"
        former = self._carrier
        if former is not None and not is_again:
            return False, display_id, None
        self._carrier = Output(view, cell, display_id)
        return True, display_id, former if former is not None and former.cell != cell else None


_CARRIER = ScriptCarrier()


def display_shared(view: CircuitsvisView) -> None:
    """Show a view through IPython, with the script or sharing another output's."""
    from IPython import get_ipython  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]
    from IPython.display import display, update_display  # pyright: ignore[reportMissingImports]

    place = _running_cell(get_ipython())
    if place is None or "google.colab" in sys.modules:
        display(_output(view, view.html), raw=True)
        return
    carries, display_id, former = _CARRIER.place(view, *place)
    display(_output(view, view.html if carries else view.fragment), raw=True, display_id=display_id)
    if former is not None:
        update_display(_output(former.view, former.view.fragment), raw=True, display_id=former.display_id)


def _output(view: CircuitsvisView, html: str) -> dict[str, str]:
    return {"text/html": html, "text/plain": repr(view)}


def _running_cell(shell: Any) -> tuple[str, str] | None:
    """The cell that runs and its execution; `None` outside a Jupyter kernel."""
    get_parent = getattr(shell, "get_parent", None)
    request = get_parent() if get_parent is not None else None
    if not request or "header" not in request:
        return None
    cell = request.get("metadata", {}).get("cellId") or request.get("content", {}).get("code", "")
    return str(cell), str(request["header"].get("msg_id", ""))
