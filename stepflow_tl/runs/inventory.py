"""The traces of a run folder, one after the other, with their numbers: from the manifest, or from the file.

1. A trace that a manifest calls done: its numbers are the manifest's. Its file must be there, must not be
   shorter or longer than its own header says, and must be of the same model, objective, dtype and layers. The
   map itself is not read. `verify` also compares its SHA-256.
2. A result file that no manifest names (written by `StepSaliency.save`): its map is read, measured, and let
   go before the next one.
3. What is missing or damaged is a `Problem` with its reason, beside the traces that failed in the run.
4. Two analyses in one folder are an error: their numbers must not be averaged.

Paths: a manifest's `file` must be the bare name of a file in the folder. A symbolic link counts as being
where it points: within the folder it is followed, out of it it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stepflow_tl.diagnosis import Diagnosis, diagnose
from stepflow_tl.diagnosis.diagnosis import LAYER_METRICS
from stepflow_tl.errors import GradientError, ResultFileError, TraceError
from stepflow_tl.results.files import file_digest
from stepflow_tl.results.result import read_head
from stepflow_tl.runs.manifest_reading import Done, ManifestIndex
from stepflow_tl.saliency.result import StepSaliency

_ENDING = ".safetensors"


@dataclass(frozen=True)
class TraceNumbers:
    """What one trace contributes.

    Attributes:
        id: Its name; for a file that no manifest names, the file's name without ending.
        n_tokens: Tokens of the trace.
        seconds: Wall-clock time of its analysis; NaN where nobody wrote it down.
        group: Its group, or None.
        pair: Its problem, or None.
        dtype: Floating dtype of the model's weights.
        backend: Backend that ran.
        diagnosis: Its measures.
    """

    id: str
    n_tokens: int
    seconds: float
    group: bool | None
    pair: str | None
    dtype: str
    backend: str
    diagnosis: Diagnosis


@dataclass(frozen=True)
class Problem:
    """A trace without numbers: "failed" in the run, or its file is "missing", "damaged" or "unsafe"."""

    id: str
    kind: Literal["failed", "missing", "damaged", "unsafe"]
    reason: str


def traces(folder: Path, index: ManifestIndex, *, verify: bool = False) -> Iterator[TraceNumbers | Problem]:
    """The traces of a folder: those of the manifests in the order of the input, then the other files by name.

    Args:
        folder: The run folder.
        index: Its manifests.
        verify: Compare the SHA-256 of every file that has one in a manifest.

    Raises:
        ResultFileError: If the folder holds results of different analyses, or two traces share a file.
    """
    agreed: dict[str, object] = {}
    taken: set[str] = set()
    for done in index.done:
        if done.file in taken:
            raise ResultFileError(f"{folder}: two traces of the manifest share the file {done.file!r}")
        taken.add(done.file)
        found = _from_manifest(folder, done, index, verify)
        if isinstance(found, TraceNumbers):
            _check_agreement(folder, agreed, found, done.file)
        yield found
    for path in sorted(folder.glob(f"*{_ENDING}")):
        if path.name not in index.files:
            found = _from_file(folder, path)
            if isinstance(found, TraceNumbers):
                _check_agreement(folder, agreed, found, path.name)
            yield found


def inside(folder: Path, name: str) -> Path:
    """The result file of that name directly in the folder.

    Raises:
        ResultFileError: If the name is not a bare one, or the file is a link that leads out of the folder.
    """
    is_bare = name.isprintable() and not any(c in name for c in "/\\:") and not name.startswith(".")
    if not is_bare or not name.endswith(_ENDING) or len(name.encode()) > 255:
        raise ResultFileError(
            f"file {name[:80]!r} is not the bare name of a {_ENDING} file: a manifest may name files of its "
            "own folder only"
        )
    path = folder / name
    # realpath, because Path.resolve raises on links in a circle.
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ResultFileError(f"{path} is a link that leads out of its folder: put the file itself there")
    return path


def _from_manifest(folder: Path, done: Done, index: ManifestIndex, verify: bool) -> TraceNumbers | Problem:
    try:
        path = inside(folder, done.file)
    except ResultFileError as error:
        return Problem(done.id, "unsafe", str(error))
    if not path.is_file():
        return Problem(done.id, "missing", f"{path} is not there: run the same `analyze` again to make it")
    try:
        facts = read_head(path, StepSaliency)
        if verify and done.sha256 is not None and _sha256(path) != done.sha256:
            raise ResultFileError(f"{path} is not the file that was written (SHA-256 differs)")
        if facts.layers != done.layers:
            raise ResultFileError(
                f"{path} holds layers {list(facts.layers)}, the manifest has {list(done.layers)}"
            )
        settings, provenance = index.settings, facts.provenance
        assert settings is not None  # a manifest without a header has no entries
        for name in ("model_name", "objective", "dtype"):
            if getattr(settings, name) != getattr(provenance, name):
                raise ResultFileError(
                    f"{path} has {name} {getattr(provenance, name)!r}, the manifest "
                    f"{getattr(settings, name)!r}"
                )
        diagnosis = Diagnosis(
            layers=done.layers,
            n_layers=facts.n_layers,
            metrics=dict(zip(LAYER_METRICS, torch.from_numpy(done.metrics).unbind(), strict=True)),
            rows_without_mass=torch.zeros(len(done.layers), dtype=torch.int64),  # a manifest does not say
            decay_slope=done.decay_slope,
            window=done.window,
            recent=done.recent,
            pooling=done.pooling,
            model_name=provenance.model_name,
            objective=provenance.objective,
            n_question=done.n_question,
            n_thinking=done.n_thinking,
            n_summary=done.n_summary,
            reasons={},
        )
    except (ResultFileError, ValueError) as error:
        return Problem(done.id, "damaged", str(error))
    return TraceNumbers(
        done.id,
        done.n_tokens,
        done.seconds,
        done.group,
        done.pair,
        provenance.dtype,
        done.backend or provenance.backend,
        diagnosis,
    )


def _from_file(folder: Path, path: Path) -> TraceNumbers | Problem:
    try:
        saliency = StepSaliency.load(inside(folder, path.name))
        diagnosis = diagnose(saliency)
    except (ResultFileError, TraceError, GradientError, OSError) as error:
        return Problem(path.stem, "damaged", str(error))
    provenance = saliency.provenance
    return TraceNumbers(
        path.stem,
        len(saliency.trace),
        float("nan"),
        None,
        None,
        provenance.dtype,
        provenance.backend,
        diagnosis,
    )


def _check_agreement(folder: Path, agreed: dict[str, object], trace: TraceNumbers, file: str) -> None:
    diagnosis = trace.diagnosis
    facts: dict[str, object] = {
        name: getattr(diagnosis, name)
        for name in ("model_name", "objective", "n_layers", "layers", "window", "recent", "pooling")
    }
    facts["dtype"] = trace.dtype
    agreed.setdefault("file", file)
    for name, value in facts.items():
        if agreed.setdefault(name, value) != value:
            raise ResultFileError(
                f"{folder} mixes analyses: {file} has {name} {value!r}, {agreed['file']} has "
                f"{agreed[name]!r}. Put the results of each analysis into a folder of their own."
            )


def _sha256(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise ResultFileError(f"cannot read {path} ({error.strerror or error})") from error
