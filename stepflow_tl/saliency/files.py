"""What a `StepSaliency` file holds: both tensors of sums, and layers, provenance and trace as JSON.

`result_files` says how it is written and read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stepflow_tl.result_files import Schema, floating, load_result, save_result
from stepflow_tl.saliency.provenance import Provenance
from stepflow_tl.trace import ReasoningTrace

if TYPE_CHECKING:
    from stepflow_tl.saliency.result import StepSaliency

SCHEMA = Schema("stepflow_tl.StepSaliency", 1, "a step-saliency result", "StepSaliency.save")


def save_saliency(saliency: StepSaliency, path: str | Path) -> Path:
    """Write `saliency` to `path` atomically and return the path.

    Raises:
        ResultFileError: If the folder does not exist or the disk refuses the write; `path` is then as it was.
    """
    document = {
        "layers": list(saliency.layers),
        "n_layers": saliency.n_layers,
        "provenance": saliency.provenance.to_json(),
        "trace": saliency.trace.to_json(),
    }
    tensors = {"sums": saliency.sums, "template_sums": saliency.template_sums}
    return save_result(path, SCHEMA, tensors, document)


def load_saliency(path: str | Path) -> StepSaliency:
    """Read a file written by `save_saliency`.

    Raises:
        ResultFileError: If the file is missing, truncated, foreign or of an unknown version; the message
            says which.
    """
    return load_result(path, SCHEMA, ("sums", "template_sums"), _build)


def _build(document: dict[str, Any], tensors: dict[str, Tensor]) -> StepSaliency:
    from stepflow_tl.saliency.result import StepSaliency

    return StepSaliency(
        sums=floating(tensors["sums"], 4),
        template_sums=floating(tensors["template_sums"], 3),
        trace=ReasoningTrace.from_json(document["trace"]),
        layers=tuple(int(layer) for layer in document["layers"]),
        n_layers=int(document["n_layers"]),
        provenance=Provenance.from_json(document["provenance"]),
    )
