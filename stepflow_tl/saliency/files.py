"""What a `StepSaliency` file holds: both tensors of sums, and layers, provenance and trace as JSON.

`result_files` says how it is written and read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stepflow_tl.errors import ResultFileError
from stepflow_tl.results.files import (
    Schema,
    TensorSpec,
    load_result,
    read_document,
    save_result,
    whole_numbers,
)
from stepflow_tl.results.provenance import Provenance
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
    return load_result(path, SCHEMA, _tensors, _build)


@dataclass(frozen=True)
class SaliencyFacts:
    """What a file says of its analysis, without its map."""

    layers: tuple[int, ...]
    n_layers: int
    provenance: Provenance


def read_facts(path: str | Path) -> SaliencyFacts:
    """Layers and provenance of a file written by `save_saliency`; trace and tensors are left unread.

    Raises:
        ResultFileError: As `load_saliency`.
    """
    document = read_document(path, SCHEMA)
    try:
        return SaliencyFacts(
            whole_numbers(document["layers"]),
            n_layers=_count(document["n_layers"]),
            provenance=Provenance.from_json(document["provenance"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultFileError(
            f"{path}: its layers or provenance cannot be read ({error!r}). Run the analysis of this "
            "trace again."
        ) from error


def _count(value: Any) -> int:
    (number,) = whole_numbers([value])
    return number


def _tensors(document: dict[str, Any]) -> dict[str, TensorSpec]:
    n_layers, n_steps = len(document["layers"]), len(document["trace"]["steps"])
    return {
        "sums": TensorSpec("float", (n_layers, None, n_steps, n_steps)),
        "template_sums": TensorSpec("float", (n_layers, None, n_steps)),
    }


def _build(document: dict[str, Any], tensors: dict[str, Tensor]) -> StepSaliency:
    from stepflow_tl.saliency.result import StepSaliency

    return StepSaliency(
        sums=tensors["sums"],
        template_sums=tensors["template_sums"],
        trace=ReasoningTrace.from_json(document["trace"]),
        layers=whole_numbers(document["layers"]),
        n_layers=_count(document["n_layers"]),
        provenance=Provenance.from_json(document["provenance"]),
    )
