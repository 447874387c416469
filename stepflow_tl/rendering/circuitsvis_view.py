"""A circuitsvis element as HTML that runs anywhere: offline, escaped, one copy of the script per notebook.

circuitsvis' own HTML probes the network for a second and then takes its script from a CDN where it can, so a
page would depend on the machine that made it. Here:

1. The bundle that ships in the circuitsvis wheel (1.3 MB) stands in a script element of its own, the carrier.
   It defines one drawing function for the page and draws whatever waits for it.
2. A view is a frame, its data as JSON with every "<" escaped, and three lines of script: draw now if the page
   has the function, else wait. Carrier and views may come in any order.
3. A saved page has both, and forbids every request by its content security policy. In a notebook one output
   has the carrier and the others share it: `ScriptCarrier` decides which.

The HTML depends on nothing but the data, so the same view gives the same HTML.
"""

from __future__ import annotations

import hashlib
import html
import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Any
from uuid import uuid4

from stepflow_tl.errors import require
from stepflow_tl.results.files import write_atomically

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"

# A new name whenever carrier and view would no longer understand each other.
_PAGE = "window.stepflowTlViews1 ??= {waiting: []}"

_FRAME = Template("""\
<div style="background: white; color: black; padding: 10px; overflow-x: auto">
<p style="max-width: 60em; margin: 5px">$caption</p>
<div data-stepflow-view="$key" style="margin: 10px 5px; min-height: 2em; $style">
<p style="color: #595959">Nothing drawn yet: the script of this view stands in another output of the
notebook. If that output was removed, run this cell again.</p>
</div>
</div>
<script>
(() => {
  const page = $page;
  const view = $view;
  page.draw ? page.draw(view) : page.waiting.push(view);
})();
</script>
""")
_SCRIPT = Template("""\
<script>
(() => {
  const page = $page;
  if (page.draw) return;
  $bundle
  let drawn = 0;
  page.draw = ({key, element, props}) => {
    for (const frame of document.querySelectorAll(`[data-stepflow-view="$${key}"]:not([id])`)) {
      frame.id = `stepflow-view-$${key}-$${drawn++}`;
      CircuitsVis.render(frame.id, CircuitsVis[element], props);
    }
  };
  page.waiting.splice(0).forEach(page.draw);
})();
</script>
""")


@dataclass(frozen=True)
class CircuitsvisView:
    """An interactive view as HTML; a notebook shows it, `save` makes a page of it.

    Attributes:
        fragment: The view without circuitsvis' script: for a page that has `carrier_script` elsewhere.
        title: Plain text for the page's title.
    """

    fragment: str
    title: str

    @property
    def html(self) -> str:
        """The view with its script, about 1.3 MB. It loads nothing."""
        return self.fragment + carrier_script()

    def save(self, path: str | Path) -> Path:
        """Write a page that opens from disk without any network, and return its path.

        Raises:
            ResultFileError: If the file cannot be written; `path` is then as it was.
        """
        page = (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            f"<title>{html.escape(self.title)}</title>\n"
            "<style>body { font-family: system-ui, sans-serif; background: white; color: black }</style>\n"
            f"</head>\n<body>\n{self.html}\n</body>\n</html>\n"
        )
        target = Path(path)
        write_atomically(target, page.encode("utf-8", "replace"))
        return target

    def _repr_html_(self) -> str:
        return self.html

    def _ipython_display_(self) -> None:
        """Show it through IPython, with the script or sharing another output's."""
        from IPython import get_ipython  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]
        from IPython.display import display, update_display  # pyright: ignore[reportMissingImports]

        place = _running_cell(get_ipython())
        if place is None or "google.colab" in sys.modules:
            display(_output(self, self.html), raw=True)
            return
        carries, display_id, former = _THE_CARRIER.place(self, *place)
        display(_output(self, self.html if carries else self.fragment), raw=True, display_id=display_id)
        if former is not None:
            update_display(_output(former.view, former.view.fragment), raw=True, display_id=former.display_id)

    def __repr__(self) -> str:
        """One line; the fragment itself is long."""
        return f"CircuitsvisView({self.title!r}, {len(self.html) / 1e6:.1f} MB of HTML)"


def circuitsvis_view(
    element: str, props: dict[str, Any], *, title: str, caption: str, style: str = ""
) -> CircuitsvisView:
    """Make a view of a circuitsvis element.

    Args:
        element: Name of the React element, such as "AttentionHeads".
        props: Its properties, plain JSON values. circuitsvis sets tokens as innerHTML: the caller escapes
            them. Nothing else in them can become markup.
        title: Plain text for a saved page's title.
        caption: Plain text above the view.
        style: CSS declarations for the frame; fixed text, never data.

    Raises:
        MissingExtraError: If circuitsvis is not installed.
    """
    carrier_script()  # a missing circuitsvis is an error now, not when a page is opened
    data = {"element": element, "props": props}
    key = hashlib.sha256(_script_json(data).encode("ascii")).hexdigest()[:16]
    view = _script_json({"key": key, **data})
    return CircuitsvisView(
        _FRAME.substitute(caption=html.escape(caption), key=key, style=style, page=_PAGE, view=view), title
    )


def carrier_script() -> str:
    """The script element with circuitsvis' bundle and the drawing function.

    Raises:
        MissingExtraError: If circuitsvis is not installed.
    """
    return _carrier(str(require("circuitsvis", purpose="The interactive view", extra="plots").__file__))


@cache
def _carrier(package: str) -> str:
    bundle = Path(package).with_name("dist").joinpath("cdn", "iife.js").read_text(encoding="utf-8")
    # The same string to JavaScript, and no end of the element to HTML. The source map is not there to load.
    bundle = bundle.replace("</script", r"<\/script").partition("\n//# sourceMappingURL=")[0]
    return _SCRIPT.substitute(page=_PAGE, bundle=bundle)


def _script_json(value: Any) -> str:
    """JSON that a script element can hold: ASCII, and no "<"."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


@dataclass(frozen=True)
class Output:
    """A view that was shown: where, and under which name the front end can replace it."""

    view: CircuitsvisView
    cell: str
    display_id: str


class ScriptCarrier:
    """Decides for each view that is shown whether it carries the script.

    The kernel sees cells run; it does not see outputs being cleared or a page being reloaded. So:

    1. The first view shown carries the script. Later ones carry nothing and share it, wherever they stand.
    2. A cell that is run again carries the script itself: it may be the one that carried it before, whose
       output is gone now, or one whose view stays empty because the carrier was cleared. The former carrier,
       if it is another cell's, is sent again without the script, so there is still one copy.
    3. Where outputs cannot share (Colab gives each a page of its own), every view carries it.

    A cell is known by the id that Jupyter sends, or by its code where none is sent. A front end that was
    reloaded in between no longer knows which output to replace; two copies then stay until the notebook is
    run afresh.
    """

    def __init__(self) -> None:
        """No view was shown yet."""
        self._carrier: Output | None = None
        self._last_run: dict[str, str] = {}

    def place(self, view: CircuitsvisView, cell: str, run: str) -> tuple[bool, str, Output | None]:
        """Where the script of one more view comes from, shown by this execution of this cell.

        Returns whether this view carries the script, a display id for it, and the output that has to be sent
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


_THE_CARRIER = ScriptCarrier()


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
