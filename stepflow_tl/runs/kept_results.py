"""Can a result file of an earlier run, a saliency map or a knockout, stand for this trace in this one?

1. No file: no.
2. A file that is cut off or inconsistent: no, and it is replaced.
3. A whole result of the same trace, model, objective, score, layers, dtype and StepFlow: yes.
4. Anything else at that place (another analysis, another trace, foreign tensors, a later version): an
   error. To keep it would mix analyses, to replace it would destroy what someone may want.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from stepflow_tl.causal import StepKnockout
from stepflow_tl.errors import ResultFileError
from stepflow_tl.results.files import Schema
from stepflow_tl.saliency import StepSaliency
from stepflow_tl.trace import ReasoningTrace

Result = TypeVar("Result", StepSaliency, StepKnockout)


@dataclass(frozen=True)
class KeptIf:
    """What must agree between a kept result and this run; names and values as in `RunSettings`.

    `screening` is how a knockout's pairs were screened (`causal.screening.screening_note`), None where all
    were cut.
    """

    model_name: str
    objective: str
    dtype: str
    layers: tuple[int, ...]
    stepflow: str | None
    score: str = "saliency"
    screening: str | None = None


def kept_result(path: Path, trace: ReasoningTrace, wanted: KeptIf, kind: type[Result]) -> Result | None:
    """The result at `path`, or None if there is none; the objective of a knockout is its measure.

    Raises:
        DamagedResultError: If the file is damaged: compute it again.
        ResultFileError: If the file is whole but something else: leave it alone.
    """
    if not path.exists():
        return None
    try:
        result = kind.load(path)
    except ResultFileError as error:
        if _is_whole_but_foreign(path, kind.schema):
            raise ResultFileError(f"{error}. It was left alone: choose another --out") from error
        raise DamagedResultError(str(error)) from error
    provenance = result.provenance
    made_with = (provenance.model_name, provenance.objective, provenance.dtype, result.layers)
    score = result.score if isinstance(result, StepSaliency) else wanted.score
    notes = provenance.notes
    found = vars(KeptIf(*made_with, notes.get("stepflow"), score, notes.get("screening")))
    for name, value in vars(wanted).items():
        if found[name] != value:
            raise ResultFileError(
                f"{path} is kept from an analysis with {name} {_show(found[name])}, this one has "
                f"{_show(value)}: choose another --out, or replace it with --overwrite"
            )
    if result.trace != trace:
        raise ResultFileError(
            f"{path} is kept from another trace (text, format or splitter differ): choose another --out, "
            "or replace it with --overwrite"
        )
    return result


class DamagedResultError(ResultFileError):
    """A result file that nobody can want: cut off or inconsistent."""


def _is_whole_but_foreign(path: Path, schema: Schema) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return False
    if schema.name not in metadata:
        return True
    try:
        version = json.loads(metadata[schema.name])["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return isinstance(version, int) and version > schema.version


def _show(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
