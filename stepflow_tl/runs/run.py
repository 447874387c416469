"""`analyze_dataset`: every trace of a data set, so that a kill at any moment costs nothing.

1. `records` streams the rows, `plan` names, shards and orders them.
2. An engine (`engines`) has one `Worker` per model replica; a worker writes one result file per trace.
3. The driver, here, appends each trace's line to the `manifest`. A result whose line a kill has cost is found
   by its name and taken over; a line whose result is missing or damaged is done again; failures are
   remembered.
4. At the end, after Ctrl-C and on a full disk too, the rows that were dealt with are summarised as by
   `summarize`, from the manifest and a look at each file.

Equal inputs, settings, software and machine, with equal numbers of threads, give result files that are equal
byte for byte, whatever the order, the shards, or how often the run was killed; in the manifest only `seconds`
differs. Memory: one trace at a time per replica, a window of records, and a few kB of numbers per trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from stepflow_tl.errors import DiskFullError, InputFileError, ResultFileError, require
from stepflow_tl.results.journal import Journal
from stepflow_tl.runs.aggregate import DatasetReport, Stop
from stepflow_tl.runs.engines import MOST_DEATHS, Engine, Loader, loader_of, open_engine, stop_of
from stepflow_tl.runs.manifest import Done, Failed, RunSettings, manifest_path, open_manifest
from stepflow_tl.runs.options import RunOptions
from stepflow_tl.runs.outcomes import Outcome, with_file
from stepflow_tl.runs.plan import Leftovers, Plan, Task
from stepflow_tl.runs.records import Unreadable, open_traces, pair_field, read_records
from stepflow_tl.runs.summary import report_run
from stepflow_tl.runs.worker import KNOCKOUTS, Worker, digest, failure

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
        pass

    def note(self, message: str) -> None:
        """Something worth saying happened.

        Args:
            message: What.
        """
        pass

    def advance(self, n_tokens: int, seconds: float, tokens_left: float) -> None:
        """A row is dealt with.

        Args:
            n_tokens: Of its trace; 0 where it failed.
            seconds: Wall-clock time of its analysis; 0 where there was none.
            tokens_left: Tokens of the rows still to come, estimated from the rows read so far.
        """
        pass


class _Silence(Watcher):
    """Nobody watches."""


def analyze_dataset(
    model: Any, source: str | Path, out: str | Path, *, watcher: Watcher | None = None, **options: Any
) -> DatasetReport:
    """Step-Saliency and diagnosis of every trace of a data set, resumable after a kill at any moment.

    Call it again with the same arguments to go on: what is done is kept. Ctrl-C ends the run and returns the
    report of what is done, `stopped="interrupted"`.

    Args:
        model: A TransformerLens model; a name or path for `models.load_model`; or a function without
            arguments that loads one, which is what other processes need (`functools.partial` makes one).
        source: A file of JSON lines, a Parquet file or a folder of them, a data set that `datasets` saved,
            or the answers of `evaluate`. Fields: question, thinking, summary, or text, or tokens; and id.
        out: Folder for one result file per trace, `manifest.jsonl` and `summary.csv`; made if it does not
            exist.
        watcher: Is told how the run goes on.
        **options: Those of `RunOptions`, by name: objective, layers, splitter, format, where,
            stepflow, causal, figures, group_by, pair_by, unpaired, match_on, overwrite, retry_failed, limit,
            shard, engine, replicas.

    Raises:
        InputFileError: If the source cannot be read or is empty, the folder cannot be made, or the shard does
            not exist.
        ModelError: If the model cannot be loaded or serve the analysis.
        FormatError: If the format is unknown or cannot be told from the model's tokenizer.
        ResultFileError: If the folder is in use by another run, or holds another analysis.
        MissingExtraError: If a package that the source, the figures or the engine need is not installed.
        TypeError: If an option is unknown.
        ValueError: If `engine` is unknown.
    """
    asked = RunOptions.of("analyze_dataset", options)
    out, part, watch = Path(out), asked.part, watcher or _Silence()
    opened = open_traces(Path(source), asked.where)
    asked = asked.for_source(opened.settings)
    total = opened.count(asked.limit)
    if not total and asked.where:
        raise InputFileError(f"{source} holds no {opened.unit} with {' and '.join(asked.where)}")
    if not total:
        raise InputFileError(f"{source} holds no {opened.unit}: expected one trace per {opened.unit}")
    make_folder(out)
    if asked.figures:
        require("matplotlib", purpose="Drawing figures", extra="plots")
    records = read_records(opened, group_by=asked.group_by, pair_by=pair_field(asked), limit=asked.limit)
    plan = Plan(records, total, shard=part)
    engine = open_engine(
        partial(_worker, loader_of(model), asked, out if asked.engine == "local" else out.resolve()),
        engine=asked.engine,
        replicas=asked.replicas,
        given_up=partial(_given_up, options=asked),
    )
    try:
        path = manifest_path(out, part)
        with open_manifest(path, engine.settings, overwrite=asked.overwrite, note=watch.note) as manifest:
            watch.begin(plan.total, engine.settings, engine.replicas)
            writer = opened.settings.get("model_name", engine.settings.model_name)
            if writer != engine.settings.model_name:
                watch.note(f"these answers are {writer}'s, and {engine.settings.model_name} reads them")
            driver = _Driver(plan, manifest, asked, watch, Leftovers(out, out / KNOCKOUTS))
            stopped = driver.run(engine)
            return report_run(
                driver.outcomes(out, engine.settings),
                asked,
                out=out,
                settings=engine.settings,
                total=plan.total,
                stopped=stopped,
            )
    finally:
        engine.close()


class _Driver:
    """Hands out tasks, writes the manifest, keeps count."""

    def __init__(
        self, plan: Plan, manifest: Journal, options: RunOptions, watcher: Watcher, leftovers: Leftovers
    ) -> None:
        self._plan, self._manifest, self._options, self._watcher = plan, manifest, options, watcher
        self._leftovers = leftovers
        self._dealt_with: list[Outcome] = []  # without entries: those stand in the manifest
        self._size_done = self._tokens_done = 0

    def run(self, engine: Engine) -> Stop:
        """Deal with every row; why it ended early, if it did."""
        return stop_of(partial(self._deal, engine), self._watcher.note, self._how_far)

    def _deal(self, engine: Engine) -> None:
        for task, outcome in engine.results(self._tasks()):
            for message in outcome.notes:
                self._watcher.note(message)
            self._record(task, outcome)

    def outcomes(self, out: Path, settings: RunSettings) -> Iterator[Outcome]:
        """What became of each row, with its numbers, in the order of the input."""
        for known in sorted(self._dealt_with, key=lambda outcome: outcome.line):
            entry = self._manifest.last(known.id)
            if known.status == "failed" or not isinstance(entry, Done):
                yield known
                continue
            found = with_file(
                out, entry if self._options.causal else replace(entry, agreement=None), settings
            )
            status = known.status if found.status == "kept" else found.status
            yield replace(found, status=status, unit=known.unit, seconds=known.seconds)

    def _tasks(self) -> Iterator[Task]:
        """Tasks that need a worker; the other rows are recorded at once."""
        for task in self._plan:
            if isinstance(task, Unreadable):
                entry = Failed(task.stand_in, task.line, task.reason, InputFileError.__name__)
                self._fail(Outcome(task.id, "failed", task.reason, task.line, task.unit, entry))
                continue
            record, previous = task.record, self._manifest.last(task.record.id)
            if isinstance(previous, Failed) and self._is_remembered(previous, task):
                reason = f"{previous.reason} (in an earlier run: --retry-failed)"
                entry = replace(previous, line=record.line)
                self._size_done += record.size
                self._fail(Outcome(record.id, "failed", reason, record.line, record.unit, entry))
                continue
            self._leftovers.remove(task.file)
            yield replace(task, previous=previous)

    def _is_remembered(self, failed: Failed, task: Task) -> bool:
        if self._options.retry_failed or self._options.overwrite or failed.error in _NOT_REMEMBERED:
            return False
        return failed.input == digest(task.record, self._options)

    def _record(self, task: Task, outcome: Outcome) -> None:
        self._size_done += task.record.size
        entry, previous = outcome.entry, task.previous
        if not isinstance(entry, Done):
            self._fail(outcome)
            return
        if outcome.status == "kept" and isinstance(previous, Done):
            entry = replace(entry, seconds=previous.seconds + entry.seconds)
        self._append(entry, previous)
        self._dealt_with.append(replace(outcome, entry=None, notes=()))
        self._tokens_done += entry.n_tokens
        self._watcher.advance(entry.n_tokens, outcome.seconds, self._tokens_left())

    def _fail(self, outcome: Outcome) -> None:
        entry = outcome.entry
        assert isinstance(entry, Failed)
        previous = self._manifest.last(entry.id)
        # Something else in a result's place does not undo that result.
        if not (isinstance(previous, Done) and entry.error in _NOT_REMEMBERED):
            self._append(entry, previous)
        self._dealt_with.append(replace(outcome, entry=None, notes=()))
        self._watcher.note(f"{outcome.place}: {outcome.reason}")
        self._watcher.advance(0, 0.0, self._tokens_left())

    def _append(self, entry: Done | Failed, previous: Done | Failed | None) -> None:
        line = entry.to_json()
        if previous is None or line != previous.to_json():
            self._manifest.append(line)

    def _tokens_left(self) -> float:
        left = max(0.0, self._plan.estimated_size - self._size_done)
        return left * self._tokens_done / self._size_done if self._size_done else 0.0

    def _how_far(self) -> str:
        return f" after {len(self._dealt_with)} of {self._plan.total} traces"


def _worker(load: Loader, options: RunOptions, out: Path) -> Worker:
    """At module level, so that another process can call it."""
    return Worker(load(), options, out)


def _given_up(task: Task, options: RunOptions) -> Outcome:
    reason = f"its worker died {MOST_DEATHS} times on this trace, perhaps for want of memory"
    return failure(task.record, reason, "WorkerDied", options)


def make_folder(folder: Path) -> None:
    """Make the folder of a run's results, if it is not there.

    Raises:
        InputFileError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputFileError(f"--out {folder} cannot be made: {error.strerror or error}") from error
