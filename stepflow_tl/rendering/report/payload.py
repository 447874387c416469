"""What the report page knows: one JSON document, everything of it data.

1. The head mean of every stored layer, two bytes a cell.
2. Every head's map, at the best precision that keeps the page small: two bytes a cell while they take at
   most 4 MB, one byte up to 16 MB, and none beyond that. The page states which.
3. The trace's pieces (steps and the template between them), the per-layer numbers of `diagnose`, bands and
   provenance. Lists of numbers are compressed (zlib) and written in base64.

Nothing here depends on when or where it runs: the same result gives the same document.
"""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

import numpy as np
import torch

from stepflow_tl.diagnosis import Diagnosis, diagnose
from stepflow_tl.diagnosis.diagnosis import LAYER_METRICS
from stepflow_tl.errors import GradientError, TraceError
from stepflow_tl.models.bands import deep_band, shallow_band
from stepflow_tl.rendering.report.quantise import Bits, QuantisedMaps, quantise
from stepflow_tl.rendering.scales import DECADES
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.version import __version__

_MOST_BYTES_AT_16_BITS = 4_000_000
_MOST_BYTES_AT_8_BITS = 16_000_000
_SUPERSCRIPT = {4: "⁻⁴", 8: "⁻⁸"}
_QUANTITY = {
    "mean": "mean saliency, nats per token pair",
    "causal_mean": "mean saliency, nats per causal token pair",
    "sum": "summed saliency, nats",
}


def report_payload(saliency: StepSaliency, *, pooling: Pooling = "mean") -> dict[str, Any]:
    """Everything the page shows, as plain JSON values.

    Raises:
        ValueError: If `pooling` is unknown.
        TraceError: If the trace has no steps.
    """
    if not saliency.labels:
        raise TraceError(
            "this trace has no steps, so there is nothing to report: give it a question or thinking"
        )
    maps = saliency.pooled(pooling).detach().cpu()
    mean = quantise(maps.mean(dim=1, dtype=torch.float64), 16)
    bits = head_bits(maps.shape[0] * maps.shape[1], len(saliency.labels))
    heads = None if bits is None else quantise(maps.flatten(0, 1), bits)
    return {
        "pieces": _pieces(saliency),
        "layers": list(saliency.layers),
        "n_layers": saliency.n_layers,
        "n_heads": saliency.n_heads,
        "bands": {
            "shallow": list(shallow_band(saliency.n_layers)),
            "deep": list(deep_band(saliency.n_layers)),
        },
        "quantity": _QUANTITY[pooling],
        "decades": DECADES,
        "mean": _packed(mean),
        "heads": None if heads is None else _packed(heads),
        "profiles": _profiles(saliency, pooling),
        "provenance": _provenance(saliency, pooling),
        "precision": _precision(mean, heads),
    }


def head_bits(n_maps: int, n_steps: int) -> Bits | None:
    """Bits a cell at which all heads' maps fit the page, or `None` where they do not."""
    cells = n_maps * n_steps * (n_steps + 1) // 2
    if 2 * cells <= _MOST_BYTES_AT_16_BITS:
        return 16
    return 8 if cells <= _MOST_BYTES_AT_8_BITS else None


def _pieces(saliency: StepSaliency) -> list[dict[str, Any]]:
    return [
        {"label": piece.label, "segment": piece.segment.name.lower(), "step": piece.index, "text": piece.text}
        for piece in saliency.trace.pieces
    ]


def _packed(maps: QuantisedMaps) -> dict[str, Any]:
    return {
        "bits": maps.bits,
        "decades": maps.decades,
        "codes": _compressed(maps.codes),
        "row_max": _compressed(maps.row_max),
    }


def _compressed(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), level=9)).decode("ascii")


def _profiles(saliency: StepSaliency, pooling: Pooling) -> dict[str, Any]:
    """Per-layer numbers of `diagnose`; where nothing can be stated, the reason."""
    try:
        diagnosis = diagnose(saliency, pooling=pooling)
    except (TraceError, GradientError) as error:
        return {"refusal": str(error)}
    return {
        "metrics": {name: _numbers(diagnosis, name) for name in LAYER_METRICS},
        "decay_slope": None if math.isnan(diagnosis.decay_slope) else diagnosis.decay_slope,
        "reasons": dict(diagnosis.reasons),
    }


def _numbers(diagnosis: Diagnosis, metric: str) -> list[float | None]:
    return [None if math.isnan(value) else value for value in getattr(diagnosis, metric).tolist()]


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
