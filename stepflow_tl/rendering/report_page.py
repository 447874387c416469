"""The report page: template, style, script and data in one HTML file that asks for nothing.

1. The script is the files of `assets/` in the order of `_SCRIPTS`, in one strict function scope.
2. The data is JSON in a script element of type application/json, which no browser runs; every "<" in it is
   written as an escape, so no text of the trace can end the element.
3. The content security policy allows this script and this style, by their hashes, and nothing else: no
   request, no inline handler, no form, no base address. The script writes text with `textContent` only.
4. The data holds the head mean of every stored layer in two bytes per cell; every head's map in two bytes per
   cell while they take at most 4 MB, in one byte up to 16 MB, and not at all beyond that (the page states
   which); and the trace's pieces, the per-layer numbers of `diagnose`, bands and provenance. The same result
   gives the same page, whenever and wherever it is made.

A map is quantised (`quantise`) with a stated error:

1. It is causal, so only its lower triangle is kept, row by row.
2. A row's largest value is kept as float32; every other cell as its logarithm relative to it: code 0 is
   nothing, the highest code is the largest value, and the codes between are even steps of the logarithm over
   `decades` decades. What lies below the last decade becomes 0.
3. Hence the relative error of a cell is at most half a step, whatever the level of its row.

Two bytes over 8 decades err by at most 0.014 %, one byte over 4 decades by 1.83 %. Memory: the codes, and a
few copies of one map.
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from stepflow_tl.causal.spot_check import SpotCheck
from stepflow_tl.diagnosis import diagnose
from stepflow_tl.diagnosis.diagnosis import LAYER_METRICS
from stepflow_tl.errors import GradientError, ResultFileError, TraceError
from stepflow_tl.models.bands import deep_band, shallow_band
from stepflow_tl.rendering.document import asset, hash_source
from stepflow_tl.rendering.layout import DECADES, PER_PAIR, require_steps, saliency_words
from stepflow_tl.results.files import write_atomically
from stepflow_tl.results.plain_data import to_plain
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.version import __version__

_SCRIPTS = ("decode.js", "colours.js", "text.js", "map.js", "steps.js", "profiles.js", "page.js")
_MOST_BYTES_AT_16_BITS = 4_000_000
_MOST_BYTES_AT_8_BITS = 16_000_000
_SUPERSCRIPT = {4: "⁻⁴", 8: "⁻⁸"}
_DECADES_OF = {8: 4, 16: 8}
Bits = Literal[8, 16]


def report(
    saliency: StepSaliency,
    path: str | Path,
    *,
    pooling: Pooling = "mean",
    title: str | None = None,
    check: SpotCheck | None = None,
) -> Path:
    """Write one trace's report as a single HTML page that opens from disk without any network.

    Args:
        saliency: The step map of one trace.
        path: Target, ending in .html; an existing file is replaced once the new one is whole.
        pooling: How token saliency was pooled, see `StepSaliency.pooled`.
        title: Heading; by default it names the model.
        check: A `spot_check` of this map; the page opens with what it found.

    Returns:
        The path.

    Raises:
        ValueError: If `pooling` is unknown.
        TraceError: If the trace has no steps.
        ComparisonError: If the check is of another map.
        ScoreError: If the map's score is signed.
        ResultFileError: If the ending is another, or the file cannot be written; `path` is then as it was.

    Cost: a second or two, and 1.3 to 2.7 bytes of page for each head's cell (`report_payload`): under 6 MB
    for 28 layers of 32 heads at 60 steps.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ResultFileError(f"cannot write a report as {target.name!r}: expected a name that ends in .html")
    heading = title if title is not None else f"Step-Saliency: {saliency.provenance.model_name}"
    data = json.dumps(report_payload(saliency, pooling=pooling, check=check), separators=(",", ":"))
    style = asset("shared.css") + asset("page.css")
    script = "(() => {\n'use strict';\n" + "\n".join(map(asset, _SCRIPTS)) + "})();\n"
    policy = (
        f"default-src 'none'; script-src {hash_source(script)}; style-src {hash_source(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    page = Template(asset("page.html")).substitute(
        policy=html.escape(policy, quote=False),
        title=html.escape(heading),
        style=style,
        data=data.replace("<", "\\u003c"),
        script=script,
    )
    write_atomically(target, page.encode("utf-8", "replace"))
    return target


def report_payload(
    saliency: StepSaliency, *, pooling: Pooling = "mean", check: SpotCheck | None = None
) -> dict[str, Any]:
    """Everything the page shows, as plain JSON values.

    Raises:
        ValueError: If `pooling` is unknown.
        TraceError: If the trace has no steps.
        ComparisonError: If the check is of another map.
        ScoreError: If the map's score is signed.
    """
    saliency.require_unsigned("the report page")
    require_steps(saliency)
    found = None if check is None else check.line_for(saliency)
    maps = saliency.pooled(pooling).detach().cpu()
    mean = quantise(maps.mean(dim=1, dtype=torch.float64), 16)
    bits = head_bits(maps.shape[0] * maps.shape[1], len(saliency.labels))
    heads = None if bits is None else quantise(maps.flatten(0, 1), bits)
    return {
        "pieces": [
            {"label": p.label, "segment": p.segment.name.lower(), "step": p.index, "text": p.text}
            for p in saliency.trace.pieces
        ],
        "layers": list(saliency.layers),
        "n_layers": saliency.n_layers,
        "n_heads": saliency.n_heads,
        "bands": {
            "shallow": list(shallow_band(saliency.n_layers)),
            "deep": list(deep_band(saliency.n_layers)),
        },
        "quantity": f"{saliency_words(pooling)}, nats{PER_PAIR[pooling]}",
        "decades": DECADES,
        "mean": _packed(mean),
        "heads": None if heads is None else _packed(heads),
        "profiles": _profiles(saliency, pooling),
        "provenance": _provenance(saliency, pooling),
        "precision": _precision(mean, heads),
        "check": found,
    }


def head_bits(n_maps: int, n_steps: int) -> Bits | None:
    """Bits per cell at which all heads' maps fit the page, or `None` where they do not."""
    cells = n_maps * n_steps * (n_steps + 1) // 2
    if 2 * cells <= _MOST_BYTES_AT_16_BITS:
        return 16
    return 8 if cells <= _MOST_BYTES_AT_8_BITS else None


def _packed(maps: QuantisedMaps) -> dict[str, Any]:
    arrays = {"codes": maps.codes, "row_max": maps.row_max}
    packed = {name: _base64(zlib.compress(array.tobytes(), level=9)) for name, array in arrays.items()}
    return {"bits": maps.bits, "decades": maps.decades, **packed}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _profiles(saliency: StepSaliency, pooling: Pooling) -> dict[str, Any]:
    """Per-layer numbers of `diagnose`; where nothing can be stated, the reason."""
    try:
        diagnosis = diagnose(saliency, pooling=pooling)
    except (TraceError, GradientError) as error:
        return {"refusal": str(error)}
    return {
        "metrics": to_plain(diagnosis.metrics),
        "labels": {name: metric.label for name, metric in LAYER_METRICS.items()},
        "decay_slope": to_plain(diagnosis.decay_slope),
        "reasons": dict(diagnosis.reasons),
    }


def _provenance(saliency: StepSaliency, pooling: Pooling) -> list[list[str]]:
    p = saliency.provenance
    steps = len(saliency.labels)
    rows = [
        ["Model", p.model_name],
        ["Objective", p.objective],
        ["Pooling", pooling],
        ["Backend", p.backend],
        ["Weights", f"{p.dtype} on {p.device}"],
        ["Layers", f"{len(saliency.layers)} of {saliency.n_layers}, {saliency.n_heads} heads each"],
        ["Trace", f"{len(saliency.trace)} tokens, {steps} steps, format {saliency.trace.format}"],
        ["Page", f"stepflow_tl {__version__}"],
    ]
    rows += [[f"Version of {name}", version] for name, version in p.versions.items()]
    return rows + [[f"Note: {name}", note] for name, note in p.notes.items()]


def _precision(mean: QuantisedMaps, heads: QuantisedMaps | None) -> str:
    words = f"Head means are kept {_error(mean)}."
    if heads is None:
        return f"{words} Maps of single heads are left out: this trace is too long for them to fit one page."
    same = heads.bits == mean.bits
    return f"{words} Single heads are kept {'alike' if same else _error(heads)}."


def _error(maps: QuantisedMaps) -> str:
    return (
        f"in {maps.bits} bits on a logarithmic scale, exact to {100 * maps.relative_error:.2g} %; a value "
        f"below 10{_SUPERSCRIPT[maps.decades]} of its row's largest counts as 0"
    )


@dataclass(frozen=True)
class QuantisedMaps:
    """Lower triangles of step maps as codes.

    Attributes:
        bits: Bits per code: 8 or 16.
        codes: Unsigned codes, one row per map, its cells in the order (0, 0), (1, 0), (1, 1), (2, 0) ...
        row_max: Largest value of each row, float32.
    """

    bits: Bits
    codes: Shaped[np.ndarray, "map cell"]
    row_max: Shaped[np.ndarray, "map step"]

    @property
    def decades(self) -> int:
        """Decades below a row's largest value that are told from 0."""
        return _DECADES_OF[self.bits]

    @property
    def relative_error(self) -> float:
        """Largest relative error of a cell that is not 0."""
        return 10 ** (self.decades / (_highest_code(self.bits) - 1) / 2) - 1


def quantise(maps: Float[Tensor, "map query_step key_step"], bits: Bits) -> QuantisedMaps:
    """Quantise the lower triangles of non-negative maps; what lies above the diagonal is not looked at."""
    n_maps, n_steps, _ = maps.shape
    queries, keys = np.tril_indices(n_steps)
    codes = np.zeros((n_maps, len(queries)), dtype=f"<u{bits // 8}")
    row_max = np.zeros((n_maps, n_steps), dtype="<f4")
    highest, decades = _highest_code(bits), _DECADES_OF[bits]
    for index in range(n_maps):  # one map at a time: the logarithms take eight bytes per cell
        values = maps[index].tril().to("cpu", torch.float32).numpy()
        row_max[index] = values.max(axis=-1)
        above = row_max[index, queries].astype(np.float64)
        relative = np.divide(values[queries, keys], above, out=np.zeros_like(above), where=above > 0)
        with np.errstate(divide="ignore"):
            exact = highest + np.log10(relative) * ((highest - 1) / decades)
        # Code 1 is the last decade's end; what rounds below it is 0, as is the logarithm of 0.
        codes[index] = np.where(exact < 0.5, 0, np.rint(np.maximum(exact, 0)))
    return QuantisedMaps(bits, codes, row_max)


def _highest_code(bits: Bits) -> int:
    return 2**bits - 1
