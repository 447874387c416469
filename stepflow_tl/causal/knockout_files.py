"""What a `StepKnockout` file holds: effects, the mask of measured pairs, and the rest as JSON.

`result_files` says how it is written and read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stepflow_tl.results.files import Schema, TensorSpec, load_result, save_result, whole_numbers
from stepflow_tl.results.provenance import Provenance
from stepflow_tl.trace import ReasoningTrace

if TYPE_CHECKING:
    from stepflow_tl.causal.knockout_result import StepKnockout

SCHEMA = Schema("stepflow_tl.StepKnockout", 1, "a step-knockout result", "StepKnockout.save")


def save_knockout(knockout: StepKnockout, path: str | Path) -> Path:
    """Write `knockout` to `path` atomically and return the path.

    Raises:
        ResultFileError: If the folder does not exist or the disk refuses the write; `path` is then as it was.
    """
    document = {
        "layers": list(knockout.layers),
        "n_layers": knockout.n_layers,
        "heads": None if knockout.heads is None else list(knockout.heads),
        "measure": knockout.measure,
        "onto": knockout.onto,
        "provenance": knockout.provenance.to_json(),
        "trace": knockout.trace.to_json(),
    }
    return save_result(path, SCHEMA, {"effects": knockout.effects, "measured": knockout.measured}, document)


def load_knockout(path: str | Path) -> StepKnockout:
    """Read a file written by `save_knockout`.

    Raises:
        ResultFileError: If the file is missing, truncated, foreign or of an unknown version; the message
            says which.
    """
    return load_result(path, SCHEMA, _tensors, _build)


def _tensors(document: dict[str, Any]) -> dict[str, TensorSpec]:
    n_steps = len(document["trace"]["steps"])
    return {
        "effects": TensorSpec("float", (n_steps, n_steps)),
        "measured": TensorSpec("bool", (n_steps, n_steps)),
    }


def _build(document: dict[str, Any], tensors: dict[str, Tensor]) -> StepKnockout:
    from stepflow_tl.causal.knockout_result import StepKnockout

    heads, onto, measure = document["heads"], document["onto"], document["measure"]
    if not isinstance(measure, str) or not (onto is None or isinstance(onto, str)):
        raise TypeError(f"measure {measure!r} and onto {onto!r}: expected names")
    return StepKnockout(
        effects=tensors["effects"],
        measured=tensors["measured"],
        trace=ReasoningTrace.from_json(document["trace"]),
        layers=whole_numbers(document["layers"]),
        n_layers=whole_numbers([document["n_layers"]])[0],
        heads=None if heads is None else whole_numbers(heads),
        measure=measure,
        onto=onto,
        provenance=Provenance.from_json(document["provenance"]),
    )
