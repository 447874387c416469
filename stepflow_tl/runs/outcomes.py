"""What became of each trace, and the numbers of the traces of a folder, one after the other.

1. A trace that the manifest calls done: its numbers are the manifest's. Its file must be there, must not be
   shorter or longer than its own header says, and must be of the same model, objective, dtype, layers and
   StepFlow. The map itself is not read. `verify` also compares its SHA-256.
2. A result file that no manifest names (written by `StepSaliency.save`): its map is read, measured, and let
   go before the next one.
3. What is missing or damaged is an outcome with its reason, beside the traces that failed in the run.
4. Two analyses in one folder are an error: their numbers must not be averaged.

Paths: a manifest's `file` must be the bare name of a file in the folder. A symbolic link counts as being
where it points: within the folder it is followed, out of it it is refused.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from stepflow_tl.causal.agreement import MEASURES, TraceAgreement
from stepflow_tl.diagnosis import LAYER_METRICS, Diagnosis, diagnose
from stepflow_tl.diagnosis.diagnosis import Band
from stepflow_tl.errors import GradientError, ResultFileError, ScoreError, TraceError
from stepflow_tl.results.files import file_digest
from stepflow_tl.results.provenance import Provenance
from stepflow_tl.results.result import read_head
from stepflow_tl.results.tables import printable
from stepflow_tl.runs.manifest import Done, Entry, ManifestIndex, RunSettings
from stepflow_tl.runs.row_files import Unit
from stepflow_tl.saliency.result import StepSaliency

Status = Literal["analysed", "kept", "failed", "missing", "damaged", "unsafe"]

_ENDING = ".safetensors"


@dataclass(frozen=True)
class Outcome:
    """What became of one trace.

    Attributes:
        id: Its id as the input has it; empty where a row could not be read.
        status: "analysed" in this run, "kept" from an earlier one (to `summarize` every result is), "failed",
            or its result file is "missing", "damaged", or "unsafe" to look for.
        reason: Why it has no numbers; empty where it has.
        line: Line or row number in the input.
        unit: What `line` counts.
        entry: Its line in the manifest; None where there is none, or where it is not at hand.
        seconds: Wall-clock time that this run spent on it.
        dtype: Floating dtype of the model's weights; empty where no file was looked at.
        backend: Backend that made the result; empty likewise.
        stepflow: The repair that the result was made under; None for none.
        notes: What happened on the way, for people.
    """

    id: str
    status: Status
    reason: str = ""
    line: int = 0
    unit: Unit = "line"
    entry: Entry | None = None
    seconds: float = 0.0
    dtype: str = ""
    backend: str = ""
    stepflow: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """The line, and the id where it is known, safe to print."""
        return f"{self.unit} {self.line}" + (f", id '{printable(self.id)}'" if self.id else "")

    @property
    def done(self) -> Done | None:
        """Its numbers, if it has any."""
        has_numbers = self.status in ("analysed", "kept")
        return self.entry if has_numbers and isinstance(self.entry, Done) else None

    @property
    def diagnosis(self) -> Diagnosis | None:
        """Its measures, or None where it has no numbers."""
        return None if self.done is None else self.done.diagnosis

    @property
    def agreement(self) -> TraceAgreement | None:
        """Agreement of its map with its knockout, or None."""
        return None if self.done is None else self.done.agreement

    @property
    def group(self) -> bool | None:
        """Value of the grouping field, or None."""
        return None if self.done is None else self.done.group

    @property
    def pair(self) -> str | None:
        """Value of the pairing field, or None."""
        return None if self.done is None else self.done.pair


def folder_outcomes(folder: Path, index: ManifestIndex, *, verify: bool = False) -> Iterator[Outcome]:
    """The traces of a folder: those of the manifests in the order of the input, then other files by name.

    Args:
        folder: The run folder.
        index: Its manifests.
        verify: Compare the SHA-256 of every file that has one in a manifest.

    Raises:
        ResultFileError: If the folder holds results of different analyses, or two traces share a file.
    """
    yield from (Outcome("", "damaged", reason) for reason in index.damaged)
    agreed: dict[str, object] = {}
    taken: set[str] = set()
    for entry in index.entries:
        if not isinstance(entry, Done):
            yield Outcome(entry.id, "failed", f"{entry.error}: {entry.reason}", entry.line, entry=entry)
            continue
        if entry.file in taken:
            raise ResultFileError(f"{folder}: two traces of the manifest share the file {entry.file!r}")
        taken.add(entry.file)
        assert index.settings is not None  # a manifest without a header has no entries
        found = with_file(folder, entry, index.settings, verify=verify)
        _check_one_analysis(folder, agreed, found)
        yield found
    for path in sorted(folder.glob(f"*{_ENDING}")):
        if path.name not in index.files:
            found = _from_map(folder, path)
            _check_one_analysis(folder, agreed, found)
            yield found


def with_file(folder: Path, done: Done, settings: RunSettings, *, verify: bool = False) -> Outcome:
    """A trace that the manifest calls done, after a look at its file; the map is not read.

    Args:
        folder: The run folder.
        done: The trace's line.
        settings: Of its manifest.
        verify: Compare the file's SHA-256 with the line's.
    """
    outcome = Outcome(done.id, "kept", line=done.line, entry=done)
    try:
        path = inside(folder, done.file)
    except ResultFileError as error:
        return replace(outcome, status="unsafe", reason=str(error))
    if not path.is_file():
        reason = f"{path} is not there: run the same `analyze` again to make it"
        return replace(outcome, status="missing", reason=reason)
    try:
        facts = read_head(path, StepSaliency)
        if verify and done.sha256 is not None and _digest(path) != done.sha256:
            raise ResultFileError(f"{path} is not the file that was written (SHA-256 differs)")
        measured, provenance = done.diagnosis, facts.provenance
        for name, found, stated in (
            ("layers", list(facts.layers), list(measured.layers)),
            ("n_layers", facts.n_layers, measured.n_layers),
            ("model_name", provenance.model_name, measured.model_name),
            ("objective", provenance.objective, measured.objective),
            ("model_name", provenance.model_name, settings.model_name),
            ("objective", provenance.objective, settings.objective),
            ("dtype", provenance.dtype, settings.dtype),
            ("stepflow", provenance.notes.get("stepflow"), settings.stepflow),
        ):
            if found != stated:
                raise ResultFileError(f"{path} has {name} {found!r}, the manifest {stated!r}")
    except ResultFileError as error:
        return replace(outcome, status="damaged", reason=str(error))
    return _made_by(outcome, provenance)


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


class CsvText:
    """A CSV file in memory, to which outcomes are added one by one; its text is `str(...)`."""

    def __init__(
        self, columns: Sequence[str], rows: Callable[[Outcome], Iterable[Mapping[str, Any]]]
    ) -> None:
        """Begin with the header.

        Args:
            columns: Of the file.
            rows: The rows of an outcome, by column; a column without a value is an empty cell.
        """
        self._buffer, self._rows = io.StringIO(), rows
        self._writer = csv.DictWriter(self._buffer, columns, lineterminator="\n")
        self._writer.writeheader()

    def add(self, outcome: Outcome) -> None:
        """The rows of one more outcome."""
        self._writer.writerows(self._rows(outcome))

    def __str__(self) -> str:
        """The text so far."""
        return self._buffer.getvalue()


def summary_csv() -> CsvText:
    """One row per outcome, with the band means of its trace."""
    bands = [f"{band}_{metric}" for band in get_args(Band) for metric in LAYER_METRICS]
    columns = ["line", "id", "status", "reason", "file", "n_tokens", "n_question", "n_thinking", "n_summary"]
    return CsvText([*columns, "seconds", "group", "pair", *bands, "decay_slope"], _summary_rows)


def agreement_csv() -> CsvText:
    """The agreement of each trace with its knockout, one row per pair of scores."""
    columns = ["line", "id", "score", "other_score", *MEASURES, "top_k_chance", "n_pairs", "n_grouped"]
    return CsvText(columns, _agreement_rows)


def _from_map(folder: Path, path: Path) -> Outcome:
    try:
        saliency = StepSaliency.load(inside(folder, path.name))
        diagnosis = diagnose(saliency)
    except (ResultFileError, ScoreError, TraceError, GradientError, OSError) as error:
        return Outcome(path.stem, "damaged", str(error))
    provenance = saliency.provenance
    numbers = Done(
        path.stem, 0, path.name, len(saliency.trace), math.nan, None, None, sha256=None, diagnosis=diagnosis
    )
    return _made_by(Outcome(path.stem, "kept", entry=numbers), provenance)


def _made_by(outcome: Outcome, provenance: Provenance) -> Outcome:
    how = provenance.notes.get("stepflow")
    return replace(outcome, dtype=provenance.dtype, backend=provenance.backend, stepflow=how)


def _check_one_analysis(folder: Path, agreed: dict[str, object], outcome: Outcome) -> None:
    if (done := outcome.done) is None:
        return
    agreed.setdefault("file", done.file)
    names = ("model_name", "objective", "n_layers", "layers", "window", "recent", "pooling")
    facts = {name: getattr(done.diagnosis, name) for name in names}
    facts |= {"dtype": outcome.dtype, "stepflow": outcome.stepflow}
    for name, value in facts.items():
        if agreed.setdefault(name, value) != value:
            raise ResultFileError(
                f"{folder} mixes analyses: {done.file} has {name} {value!r}, {agreed['file']} has "
                f"{agreed[name]!r}. Put the results of each analysis into a folder of their own."
            )


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise ResultFileError(f"cannot read {path} ({error.strerror or error})") from error


def _summary_rows(outcome: Outcome) -> Iterator[dict[str, Any]]:
    row: dict[str, Any] = {
        "line": outcome.line,
        "id": outcome.id,
        "status": outcome.status,
        "reason": outcome.reason,
        "seconds": f"{outcome.seconds:.3f}" if outcome.seconds else "",
    }
    if (done := outcome.done) is None:
        yield row
        return
    row |= {
        "file": done.file,
        "n_tokens": done.n_tokens,
        "group": "" if done.group is None else str(done.group).lower(),
        "pair": done.pair or "",
        "decay_slope": _cell(done.diagnosis.decay_slope),
        **{name: getattr(done.diagnosis, name) for name in ("n_question", "n_thinking", "n_summary")},
    }
    for band in get_args(Band):
        row |= {f"{band}_{metric}": _cell(value) for metric, value in done.diagnosis.band(band).items()}
    yield row


def _agreement_rows(outcome: Outcome) -> Iterator[dict[str, Any]]:
    if (agreement := outcome.agreement) is None:
        return
    for (name, other), values in agreement.values.items():
        yield {
            "line": outcome.line,
            "id": outcome.id,
            "score": name,
            "other_score": other,
            **{measure: _cell(values[measure]) for measure in MEASURES},
            "top_k_chance": _cell(agreement.top_k_chance),
            "n_pairs": agreement.n_pairs,
            "n_grouped": agreement.n_grouped,
        }


def _cell(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))
