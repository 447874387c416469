"""What a `StepPatching` file holds: effects, and the rest as JSON, the steps of both traces with their text.

`result_files` says how it is written and read.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor

from stepflow_tl.causal.alignment import Alignment, StepMatch
from stepflow_tl.results.files import Schema, TensorSpec, load_result, save_result, whole_numbers
from stepflow_tl.results.provenance import Provenance
from stepflow_tl.trace.steps import Segment, Step

if TYPE_CHECKING:
    from stepflow_tl.causal.patching_result import StepPatching

SCHEMA = Schema("stepflow_tl.StepPatching", 1, "a step-patching result", "StepPatching.save")
_PLAIN = {
    "method": str,
    "component": str,
    "alignment": str,
    "n_layers": int,
    "receiving_step": (str, type(None)),
    "corrupted_value": (int, float),
    "clean_value": (int, float, type(None)),
}
_STEP_NUMBERS = ("index", "token_start", "token_end", "char_start", "char_end")


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
    return load_result(path, SCHEMA, _tensors, _build)


def _tensors(document: dict[str, Any]) -> dict[str, TensorSpec]:
    return {"effects": TensorSpec("float", (len(document["layers"]), len(document["matches"])))}


def _plain(step: Step) -> dict[str, Any]:
    return {**asdict(step), "segment": int(step.segment)}


def _step(data: dict[str, Any]) -> Step:
    """The step; what a later minor version says beside it is passed over."""
    numbers = dict(zip(_STEP_NUMBERS, whole_numbers([data[name] for name in _STEP_NUMBERS]), strict=True))
    if not isinstance(data["label"], str) or not isinstance(data["text"], str):
        raise TypeError("a step's label and text must be strings")
    return Step(segment=Segment(data["segment"]), label=data["label"], text=data["text"], **numbers)


def _build(document: dict[str, Any], tensors: dict[str, Tensor]) -> StepPatching:
    from stepflow_tl.causal.patching_result import StepPatching

    plain = {name: _value(document, name) for name in _PLAIN}
    if plain["method"] not in ("patching", "attribution") or plain["alignment"] not in get_args(Alignment):
        raise ValueError(f"method {plain['method']!r} and alignment {plain['alignment']!r}: unknown")
    return StepPatching(
        effects=tensors["effects"],
        layers=whole_numbers(document["layers"]),
        matches=tuple(StepMatch(_step(clean), _step(corrupted)) for clean, corrupted in document["matches"]),
        provenance=Provenance.from_json(document["provenance"]),
        **plain,
    )


def _value(document: dict[str, Any], name: str) -> Any:
    value = document[name]
    if not isinstance(value, _PLAIN[name]) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}")
    return value
