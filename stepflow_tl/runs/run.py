"""`analyze_dataset`: every trace of a data set, so that a kill at any moment costs nothing.

1. `sources` streams the rows, `plan` names, shards and orders them.
2. An engine (`engines`, `ray_engine`) has one `Worker` a model replica; a worker writes one result file a
   trace.
3. The driver, here, appends each trace's line to the `manifest`. A result whose line a kill has cost is found
   by its name and taken over; a line whose result is missing or damaged is done again; failures are
   remembered.
4. At the end, after Ctrl-C and on a full disk too, `report` reads the manifest.

Equal inputs, settings, software and machine, with equal numbers of threads, give result files that are equal
byte for byte, whatever the order, the shards, or how often the run was killed; in the manifest only `seconds`
differs. Memory: one trace at a time a replica, a window of records, and a few hundred bytes of names a trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from stepflow_tl.diagnosis import DEFAULT_PAIR_FIELD
from stepflow_tl.errors import DiskFullError, InputFileError, ResultFileError, require
from stepflow_tl.runs.engines import Engine, Job, LocalEngine
from stepflow_tl.runs.entries import Done, Entry, Failed, RunSettings
from stepflow_tl.runs.knockouts import FOLDER as KNOCKOUTS
from stepflow_tl.runs.leftovers import Leftovers
from stepflow_tl.runs.manifest import Manifest, manifest_path
from stepflow_tl.runs.options import AnalysisOptions
from stepflow_tl.runs.outcomes import Outcome, Status
from stepflow_tl.runs.plan import Plan, Rejected, Shard, Task
from stepflow_tl.runs.records import Unit
from stepflow_tl.runs.report import DatasetReport, GroupOptions, Stop, make_report
from stepflow_tl.runs.sources import open_source, read_records
from stepflow_tl.runs.worker import Taken, digest

# Failures that a look at the folder decides, which costs nothing and may have changed.
_NOT_REMEMBERED = (ResultFileError.__name__, DiskFullError.__name__)


@runtime_checkable
class Watcher(Protocol):
    """Is told how a run goes on."""

    def begin(self, total: int, settings: RunSettings, replicas: int) -> None:
        """The model is loaded, the first trace is next.

        Args:
            total: Rows of the input, or of the shard.
            settings: What all results have in common.
            replicas: Models that work at once.
        """
        ...

    def note(self, message: str) -> None:
        """Something worth saying happened.

        Args:
            message: What.
        """
        ...

    def advance(self, n_tokens: int, seconds: float, tokens_left: float) -> None:
        """A row is dealt with.

        Args:
            n_tokens: Of its trace; 0 where it failed.
            seconds: Wall-clock time of its analysis; 0 where there was none.
            tokens_left: Tokens of the rows still to come, estimated from the rows read so far.
        """
        ...


class _Silence:
    """Nobody watches."""

    def begin(self, total: int, settings: RunSettings, replicas: int) -> None:
        """Say nothing."""

    def note(self, message: str) -> None:
        """Say nothing."""

    def advance(self, n_tokens: int, seconds: float, tokens_left: float) -> None:
        """Say nothing."""


def analyze_dataset(
    model: Any,
    source: str | Path,
    out: str | Path,
    *,
    objective: str = "per_token",
    layers: Sequence[int] | None = None,
    splitter: str = "paragraph",
    format: str = "auto",
    causal: bool = False,
    figures: bool = False,
    group_by: str | None = None,
    pair_by: str | None = None,
    unpaired: bool = False,
    overwrite: bool = False,
    retry_failed: bool = False,
    limit: int | None = None,
    shard: str | Shard | None = None,
    engine: str = "local",
    replicas: int | None = None,
    watcher: Watcher | None = None,
) -> DatasetReport:
    """Step-Saliency and diagnosis of every trace of a data set, resumable after a kill at any moment.

    Call it again with the same arguments to go on: what is done is kept. Ctrl-C ends the run and returns the
    report of what is done, `stopped="interrupted"`.

    Args:
        model: A TransformerLens model; a name or path for `models.load_model`; or a function without
            arguments that loads one, which is what other processes need (`functools.partial` makes one).
        source: A file of JSON lines, a Parquet file or a folder of them, or a data set that `datasets` saved.
            Fields: question, thinking, summary, or text; and id.
        out: Folder for one result file a trace, `manifest.jsonl` and `summary.csv`; made if it does not
            exist.
        objective: As in `step_saliency`, by name.
        layers: Layers to keep; all by default.
        splitter: How thinking and summary are cut into steps, by name.
        format: Reasoning format; "auto" reads it off the tokenizer's chat template.
        causal: Also measure a knockout of every pair of steps, and how well the maps agree.
        figures: Also draw step maps and profiles beside each result.
        group_by: Compare the traces where this field is true with those where it is false.
        pair_by: Pair the two groups by this field; `problem_id` where the records have it.
        unpaired: Compare without pairing.
        overwrite: Analyse again where a result is there already.
        retry_failed: Try again what failed in an earlier run and is remembered.
        limit: Read the first rows only.
        shard: Take the part "i/n" of the input, i from 0; n runs may share the folder.
        engine: "local" runs here; "ray" on the replicas of a Ray cluster, which is started here if none is.
        replicas: Models at once, for "ray": one a GPU by default, or one if there is none.
        watcher: Is told how the run goes on.

    Raises:
        InputFileError: If the source cannot be read or is empty, the folder cannot be made, or the shard does
            not exist.
        ModelError: If the model cannot be loaded or serve the analysis.
        FormatError: If the format is unknown or cannot be told from the model's tokenizer.
        ResultFileError: If the folder is in use by another run, or holds another analysis.
        MissingExtraError: If a package that the source, the figures or the engine need is not installed.
        ValueError: If `engine` is unknown.
    """
    out = Path(out)
    part = shard if isinstance(shard, Shard) else Shard() if shard is None else Shard.parse(shard)
    opened = open_source(Path(source))
    total = opened.count(limit)
    if not total:
        raise InputFileError(f"{source} holds no {opened.unit}: expected one trace a {opened.unit}")
    if engine not in ("local", "ray"):
        raise ValueError(f"unknown engine {engine!r}: expected 'local' or 'ray'")
    _make_folder(out)
    if figures:
        require("matplotlib", purpose="Drawing figures", extra="plots")
    options = AnalysisOptions(
        objective, None if layers is None else tuple(layers), splitter, format, causal, figures, overwrite
    )
    groups = GroupOptions(group_by, pair_by, unpaired)
    records = read_records(
        opened,
        group_by=group_by,
        pair_by=(pair_by or DEFAULT_PAIR_FIELD) if group_by else None,
        limit=limit,
    )
    plan = Plan(records, total, shard=part)
    place = _engine(engine, model, options, out, replicas)
    watch = watcher or _Silence()
    try:
        with Manifest(
            manifest_path(out, part), place.settings, overwrite=overwrite, note=watch.note
        ) as manifest:
            watch.begin(plan.total, place.settings, place.replicas)
            driver = _Driver(plan, manifest, options, watch, retry_failed, Leftovers(out, out / KNOCKOUTS))
            stopped = driver.run(place)
            return make_report(
                driver.outcomes,
                out=out,
                settings=place.settings,
                total=plan.total,
                stopped=stopped,
                groups=groups,
                shard=part,
            )
    finally:
        place.close()


@dataclass(frozen=True)
class _Seen:
    """A row that is dealt with; what else is known of it stands in the manifest."""

    line: int
    id: str
    status: Status
    unit: Unit
    seconds: float = 0.0
    reason: str = ""


class _Driver:
    """Hands out jobs, writes the manifest, keeps count."""

    def __init__(
        self,
        plan: Plan,
        manifest: Manifest,
        options: AnalysisOptions,
        watcher: Watcher,
        retry_failed: bool,
        leftovers: Leftovers,
    ) -> None:
        self._plan, self._manifest, self._options, self._watcher = plan, manifest, options, watcher
        self._retry_failed, self._leftovers = retry_failed or options.overwrite, leftovers
        self._seen: list[_Seen] = []
        self._size_done = self._tokens_done = 0

    def run(self, engine: Engine) -> Stop:
        """Deal with every row; why it ended early, if it did."""
        try:
            for job, taken in engine.results(self._jobs()):
                self._record(job, taken)
        except KeyboardInterrupt:
            self._say_stopped("interrupted after", "run the same command again to go on")
            return "interrupted"
        except DiskFullError as error:
            self._watcher.note(f"the disk is full: {error}")
            self._say_stopped("stopped after", "free some space and run the same command again to go on")
            return "disk full"
        return ""

    def outcomes(self) -> Iterator[Outcome]:
        """What became of each row, in the order of the input."""
        for seen in sorted(self._seen, key=lambda seen: seen.line):
            outcome = Outcome(seen.line, seen.id, seen.status, seen.reason, unit=seen.unit)
            entry = None if seen.status == "failed" else self._manifest.last(seen.id)
            if not isinstance(entry, Done):
                yield outcome
                continue
            yield dataclasses.replace(
                outcome,
                file=entry.file,
                n_tokens=entry.n_tokens,
                seconds=seen.seconds,
                diagnosis=entry.read_diagnosis(),
                group=entry.group,
                pair=entry.pair,
                agreement=entry.read_agreement() if self._options.causal else None,
            )

    def _jobs(self) -> Iterator[Job]:
        """Tasks that need a worker; the other rows are recorded at once."""
        for task in self._plan:
            if isinstance(task, Rejected):
                entry = Failed(task.id, task.line, task.reason, InputFileError.__name__)
                self._fail(entry, task.trace_id, task.unit)
                continue
            previous = self._manifest.last(task.record.id)
            if isinstance(previous, Failed) and self._is_remembered(previous, task):
                entry = dataclasses.replace(previous, line=task.record.line)
                self._size_done += task.record.size
                self._fail(entry, task.record.id, task.record.unit, " (in an earlier run: --retry-failed)")
                continue
            self._leftovers.remove(task.file)
            yield Job(task, previous)

    def _is_remembered(self, failed: Failed, task: Task) -> bool:
        is_same = failed.input == digest(task.record, self._options)
        return is_same and failed.error not in _NOT_REMEMBERED and not self._retry_failed

    def _record(self, job: Job, taken: Taken) -> None:
        record, entry = job.task.record, taken.entry
        for message in taken.notes:
            self._watcher.note(message)
        self._size_done += record.size
        if isinstance(entry, Failed):
            self._fail(entry, record.id, record.unit)
            return
        if taken.status == "kept" and isinstance(job.previous, Done):
            entry = dataclasses.replace(entry, seconds=job.previous.seconds + entry.seconds)
        self._append(entry, job.previous)
        self._seen.append(_Seen(record.line, record.id, taken.status, record.unit, taken.seconds))
        self._tokens_done += entry.n_tokens
        self._watcher.advance(entry.n_tokens, taken.seconds, self._tokens_left())

    def _fail(self, entry: Failed, trace_id: str, unit: Unit, remark: str = "") -> None:
        previous = self._manifest.last(entry.id)
        # Something else in a result's place does not undo that result.
        if not (isinstance(previous, Done) and entry.error in _NOT_REMEMBERED):
            self._append(entry, previous)
        outcome = Outcome(entry.line, trace_id, "failed", entry.reason + remark, unit=unit)
        self._seen.append(_Seen(entry.line, trace_id, "failed", unit, reason=outcome.reason))
        self._watcher.note(f"{outcome.place}: {outcome.reason}")
        self._watcher.advance(0, 0.0, self._tokens_left())

    def _append(self, entry: Entry, previous: Entry | None) -> None:
        if previous is None or entry.to_json() != previous.to_json():
            self._manifest.append(entry)

    def _tokens_left(self) -> float:
        left = max(0.0, self._plan.estimated_size - self._size_done)
        return left * self._tokens_done / self._size_done if self._size_done else 0.0

    def _say_stopped(self, how: str, what_next: str) -> None:
        self._watcher.note(f"{how} {len(self._seen)} of {self._plan.total} traces; {what_next}")


def _engine(name: str, model: Any, options: AnalysisOptions, out: Path, replicas: int | None) -> Engine:
    load = _loader(model)
    if name == "ray":
        from stepflow_tl.runs.ray_engine import RayEngine

        return RayEngine(load, options, out, replicas)
    return LocalEngine(load, options, out)


def _loader(model: Any) -> Callable[[], Any]:
    if isinstance(model, str):
        from stepflow_tl.models.loading import load_model

        return partial(load_model, model)
    if callable(model) and not hasattr(model, "cfg"):
        return model
    return lambda: model


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputFileError(f"--out {folder} cannot be made: {error.strerror or error}") from error
