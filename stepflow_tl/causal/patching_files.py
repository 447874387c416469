"""What a `StepPatching` file holds: effects, and the rest as JSON, the steps of both traces with their text.

`result_files` says how it is written and read.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor

from stepflow_tl.causal.alignment import Alignment, StepMatch
from stepflow_tl.result_files import Schema, floating, load_result, save_result
from stepflow_tl.saliency.provenance import Provenance
from stepflow_tl.segment import Segment, Step

if TYPE_CHECKING:
    from stepflow_tl.causal.patching_result import StepPatching

SCHEMA = Schema("stepflow_tl.StepPatching", 1, "a step-patching result", "StepPatching.save")
_PLAIN = ("method", "component", "alignment", "n_layers", "receiving_step", "corrupted_value", "clean_value")


def save_patching(patching: StepPatching, path: str | Path) -> Path:
    """Write `patching` to `path` atomically and return the path.

    Raises:
        ResultFileError: If the folder does not exist or the disk refuses the write; `path` is then as it was.
    """
    document = {name: getattr(patching, name) for name in _PLAIN}
    document["layers"] = list(patching.layers)
    document["matches"] = [[_plain(match.clean), _plain(match.corrupted)] for match in patching.matches]
    document["provenance"] = patching.provenance.to_json()
    return save_result(path, SCHEMA, {"effects": patching.effects}, document)


def load_patching(path: str | Path) -> StepPatching:
    """Read a file written by `save_patching`.

    Raises:
        ResultFileError: If the file is missing, truncated, foreign or of an unknown version; the message
            says which.
    """
    return load_result(path, SCHEMA, ("effects",), _build)


def _plain(step: Step) -> dict[str, Any]:
    return {**asdict(step), "segment": int(step.segment)}


def _step(data: dict[str, Any]) -> Step:
    return Step(**{**data, "segment": Segment(data["segment"])})


def _build(document: dict[str, Any], tensors: dict[str, Tensor]) -> StepPatching:
    from stepflow_tl.causal.patching_result import StepPatching

    if document["method"] not in ("patching", "attribution") or document["alignment"] not in get_args(
        Alignment
    ):
        raise ValueError(f"method {document['method']!r} and alignment {document['alignment']!r}: unknown")
    return StepPatching(
        effects=floating(tensors["effects"], 2),
        layers=tuple(int(layer) for layer in document["layers"]),
        matches=tuple(StepMatch(_step(clean), _step(corrupted)) for clean, corrupted in document["matches"]),
        provenance=Provenance.from_json(document["provenance"]),
        **{name: document[name] for name in _PLAIN},
    )
