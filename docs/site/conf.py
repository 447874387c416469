"""The documentation as a site: `make docs` writes it to out/docs.

1. The source folder is the repository, so every page is the file that GitHub shows, with links that work in
   both.
2. docs/README.md is the table of contents: its headings are the captions of the site's menu, its links the
   entries.
3. A link to a Python file leads to a page with that file's text; a link to a folder leads to its README.md.
4. Formulas become MathML when the site is built, so that it needs no script and no network to be read.

A link that leads nowhere, a page that is in no menu and an unknown sign in a formula are warnings, and
`make docs` treats warnings as errors. (An unknown command before a brace is dropped by latex2mathml without a
word: look at the page.)
"""

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from stepflow_tl.version import __version__  # noqa: E402

project = "stepflow_tl"
author = "The stepflow-tl contributors"
html_show_copyright = False
release = __version__

extensions = ["myst_parser"]
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**.md",
    "benchmarks/**.md",
    "notebooks/*.md",
]
exclude_patterns = [".*", "out", "dist", "build"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4

highlight_language = "none"
html_theme = "furo"
html_title = f"stepflow_tl {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "github-dark"

CONTENTS = "docs/README"
#: Pages whose entries are every page of a folder.
FOLDERS = {"docs/api/README": "/docs/api/stepflow_tl*"}


def add_menu(app: Sphinx, page: str, source: list[str]) -> None:
    """Append the menu to the front page, and to the page of a folder its entries."""
    if page == root_doc:
        source[0] += toctree([f"/{CONTENTS}"], ":maxdepth: 1")
        text = (ROOT / CONTENTS).with_suffix(".md").read_text("utf-8")
        for caption, entries in sections(text):
            source[0] += toctree(entries, f":caption: {caption}")
    elif page in FOLDERS:
        source[0] += toctree([FOLDERS[page]], ":glob:")


def sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """Heading and pages of each section of the table of contents."""
    for section in text.split("\n## ")[1:]:
        caption, _, body = section.partition("\n")
        links = re.findall(r"\[([^]]+)\]\(([^)#:]+)\.md\)", body)
        yield caption, [f"{text} <{posixpath.normpath(f'/docs/{page}')}>" for text, page in links]


def toctree(entries: list[str], option: str) -> str:
    """The directive, which is not seen on the page itself."""
    return "\n".join(["\n\n```{toctree}", ":hidden:", option, *entries, "```\n"])


class LocalLinks(SphinxTransform):
    """Links to folders and to Python files, which are no pages of their own."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        """Point them to what the site has in their place."""
        for link in list(self.document.findall(addnodes.pending_xref)):
            name, _ = self.env.relfn2path(link["reftarget"])
            if link["refdomain"] is None and (ROOT / name / "README.md").is_file():
                link["refdomain"], link["reftarget"], link["reftargetid"] = "doc", f"{name}/README", None
        for link in list(self.document.findall(addnodes.download_reference)):
            name, _ = self.env.relfn2path(link["reftarget"])
            if name.endswith(".py"):
                page = posixpath.relpath(f"source/{name}.html", posixpath.dirname(self.env.docname) or ".")
                link.replace_self(nodes.reference("", "", *link.children, refuri=page, internal=True))


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each Python file that a page links to."""
    linked: set[str] = set()
    for page in app.env.found_docs:
        links = re.findall(r"\]\(([^):]+\.py)\)", Path(app.env.doc2path(page)).read_text("utf-8"))
        linked |= {posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in links}
    for name in sorted(linked):
        body = highlight((ROOT / name).read_text("utf-8"), PythonLexer(), HtmlFormatter())
        yield f"source/{name}", {"title": name, "body": f"<h1>{name}</h1>{body}"}, "page.html"


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Lead from the address of the site to its front page, which is called README."""
    if error is None and app.builder.format == "html":
        leads_on = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">'
        page = f'<!doctype html><meta charset="utf-8"><title>{project}</title>{leads_on}\n'
        Path(app.outdir, "index.html").write_text(page, "utf-8")


def write_mathml(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula."""
    is_block = isinstance(node, nodes.math_block)
    formula = convert(node.astext(), display="block" if is_block else "inline")
    # What latex2mathml leaves out: "+=" is one sign, and the name of a function stands apart from a letter.
    formula = re.sub(r"<mo><mrow><mo>([^<]*)</mo></mrow></mo><mo>&#x0003D;</mo>", r"<mo>\1=</mo>", formula)
    formula = re.sub(r"(<mi>(?:log|max|min|tanh)</mi>)(?!<mo)", r"\1<mspace width='0.17em'/>", formula)
    if unknown := re.findall(r"\\\w+", formula):
        logging.getLogger(__name__).warning("latex2mathml does not know %s", unknown, location=node)
    translator.body.append(formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Add the above to Sphinx."""
    app.add_html_math_renderer("mathml", (write_mathml, None), (write_mathml, None))
    app.add_transform(LocalLinks)
    app.connect("source-read", add_menu)
    app.connect("html-collect-pages", source_pages)
    app.connect("build-finished", add_index)
