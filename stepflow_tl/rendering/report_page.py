"""The report page: template, style, script and data in one HTML file that asks for nothing.

1. The script is the files of `assets/` in the order of `_SCRIPTS`, in one strict function scope.
2. The data is JSON in a script element of type application/json, which no browser runs; every "<" in it is
   written as an escape, so no text of the trace can end the element.
3. The content security policy allows this script and this style, by their hashes, and nothing else: no
   request, no inline handler, no form, no base address. The script writes text with `textContent` only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from stepflow_tl.errors import ResultFileError
from stepflow_tl.rendering.report_payload import report_payload
from stepflow_tl.results.files import write_atomically
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency

_SCRIPTS = ("decode.js", "colours.js", "text.js", "map.js", "steps.js", "profiles.js", "page.js")
_ENDINGS = (".html", ".htm")


def report(
    saliency: StepSaliency, path: str | Path, *, pooling: Pooling = "mean", title: str | None = None
) -> Path:
    """Write one trace's report as a single HTML page that opens from disk without any network.

    Args:
        saliency: The step map of one trace.
        path: Target, ending in .html; an existing file is replaced once the new one is whole.
        pooling: How token saliency was pooled, see `StepSaliency.pooled`.
        title: Heading; by default it names the model.

    Returns:
        The path.

    Raises:
        ValueError: If `pooling` is unknown.
        TraceError: If the trace has no steps.
        ResultFileError: If the ending is another, or the file cannot be written; `path` is then as it was.

    Cost: a second or two, and 1.3 to 2.7 bytes of page for each head's cell (`report_payload`): under 6 MB
    for 28 layers of 32 heads at 60 steps.
    """
    target = Path(path)
    if target.suffix.lower() not in _ENDINGS:
        raise ResultFileError(f"cannot write a report as {target.name!r}: expected a name that ends in .html")
    heading = title if title is not None else f"Step-Saliency: {saliency.provenance.model_name}"
    page = report_html(report_payload(saliency, pooling=pooling), heading)
    write_atomically(target, page.encode("utf-8", "replace"))
    return target


def report_html(payload: dict[str, Any], title: str) -> str:
    """Fill the template with data from `report_payload`."""
    style = _asset("page.css")
    script = "(() => {\n'use strict';\n" + "\n".join(map(_asset, _SCRIPTS)) + "})();\n"
    policy = (
        f"default-src 'none'; script-src {_hash_source(script)}; style-src {_hash_source(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_asset("page.html")).substitute(
        policy=html.escape(policy, quote=False),
        title=html.escape(title),
        style=style,
        data=json.dumps(payload, separators=(",", ":")).replace("<", "\\u003c"),
        script=script,
    )


def _asset(name: str) -> str:
    """A file of `assets/`, with the line ends a browser would make of it before it takes the hash."""
    text = files("stepflow_tl.rendering").joinpath("assets").joinpath(name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def _hash_source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{digest}'"
