"""A circuitsvis element as HTML that runs anywhere: offline, escaped, one copy of the script a notebook.

circuitsvis' own HTML probes the network for a second and then takes its script from a CDN where it can, so a
page would depend on the machine that made it. Here:

1. The bundle that ships in the circuitsvis wheel (1.3 MB) stands in a script element of its own, the carrier.
   It defines one drawing function for the page and draws whatever waits for it.
2. A view is a frame, its data as JSON with every "<" escaped, and three lines of script: draw now if the page
   has the function, else wait. Carrier and views may come in any order.
3. A saved page has both, and forbids every request by its content security policy. In a notebook one output
   has the carrier and the others share it; `notebook` decides which.

The HTML depends on nothing but the data, so the same view gives the same HTML.
"""

from __future__ import annotations

import hashlib
import html
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from stepflow_tl.rendering.extras import require
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
_CARRIER = Template("""\
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
        from stepflow_tl.rendering.notebook import display_shared

        display_shared(self)

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
    data = _script_json({"element": element, "props": props})
    key = hashlib.sha256(data.encode("ascii")).hexdigest()[:16]
    fragment = _FRAME.substitute(
        caption=html.escape(caption),
        key=key,
        style=style,
        page=_PAGE,
        view=_script_json({"key": key, "element": element, "props": props}),
    )
    return CircuitsvisView(fragment, title)


def carrier_script() -> str:
    """The script element with circuitsvis' bundle and the drawing function.

    Raises:
        MissingExtraError: If circuitsvis is not installed.
    """
    return _carrier(str(require("circuitsvis", purpose="The interactive view").__file__))


@cache
def _carrier(package: str) -> str:
    bundle = Path(package).with_name("dist").joinpath("cdn", "iife.js").read_text(encoding="utf-8")
    # The same string to JavaScript, and no end of the element to HTML. The source map is not there to load.
    bundle = bundle.replace("</script", r"<\/script").partition("\n//# sourceMappingURL=")[0]
    return _CARRIER.substitute(page=_PAGE, bundle=bundle)


def _script_json(value: Any) -> str:
    """JSON that a script element can hold: ASCII, and no "<"."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
