"""`evaluate`: questions answered under several conditions, so that a kill at any moment costs one batch.

1. The batches are planned over all questions of the run, from questions, decoding and the kind of model
   alone: what is done already never changes which answers are written together.
2. A task is one batch under one condition. Every condition writes a batch before the next batch begins, so a
   run that ends early has whole questions to compare.
3. A worker (`answer_worker`, in `engines`) writes the answers and grades them; the driver, here, appends
   their lines to the ledger (`answer_file`), all lines of a task at once, and on the disk before the next.
4. A task all of whose lines are there is passed over. One that lacks some is done again, whole, and only the
   lines that lack are added: nothing is there twice.
5. At the end, after Ctrl-C and on a full disk too, the ledgers of the folder are read and compared, and with
   them those of other shards.

Equal questions, settings, software and machine, with equal numbers of threads, give equal lines, whatever
their order, the shards they came by, or how often the run was killed; only `seconds` differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from stepflow_tl.errors import DiskFullError
from stepflow_tl.evaluation import (
    Decoding,
    Evaluation,
    Grader,
    Prompting,
    Question,
    exact,
    read_questions,
    standard_conditions,
)
from stepflow_tl.evaluation.decoding import Row
from stepflow_tl.evaluation.evaluation import Stop
from stepflow_tl.evaluation.grading import Grade, grader_named, prepared
from stepflow_tl.results.files import write_atomically
from stepflow_tl.results.journal import Journal
from stepflow_tl.runs.answer_file import (
    ANSWERS,
    Answered,
    AnswerSettings,
    answers_path,
    check_folder,
    evaluation_of,
    read_ledgers,
)
from stepflow_tl.runs.answer_worker import AnswerWorker, Asked, BatchTask, Written
from stepflow_tl.runs.engines import MOST_DEATHS, Engine, Loader, loader_of, open_engine, stop_of
from stepflow_tl.runs.options import ENGINES, Shard
from stepflow_tl.runs.plan import Leftovers
from stepflow_tl.runs.run import make_folder
from stepflow_tl.stepflow import StepFlow


@runtime_checkable
class AnswerWatcher(Protocol):
    """Is told how an evaluation goes on."""

    def begin(self, total: int, done: int, settings: AnswerSettings, replicas: int) -> None:
        """The model is loaded, the first batch is next.

        Args:
            total: Answers that this run is to have in the end.
            done: Those that are there already.
            settings: What all answers have in common.
            replicas: Models that work at once.
        """
        pass

    def note(self, message: str) -> None:
        """Something worth saying happened.

        Args:
            message: What.
        """
        pass

    def advance(self, n_answers: int, n_tokens: int, seconds: float, tokens_left: float) -> None:
        """A batch is on the disk.

        Args:
            n_answers: Answers that are new.
            n_tokens: Tokens written for them.
            seconds: Wall-clock time of the writing.
            tokens_left: Tokens still to be written, estimated from the answers of this run so far.
        """
        pass


class _Silence(AnswerWatcher):
    """Nobody watches."""


def evaluate(
    model: Any,
    questions: Sequence[Question] | str | Path,
    out: str | Path | None = None,
    *,
    conditions: Mapping[str, StepFlow | None] | None = None,
    decoding: Decoding | None = None,
    prompting: Prompting | None = None,
    grader: Grader | Grade | str = exact,
    allow_code_execution: bool = False,
    shard: str | Shard | None = None,
    engine: str = "local",
    replicas: int | None = None,
    overwrite: bool = False,
    seed: int = 0,
    watcher: AnswerWatcher | None = None,
) -> Evaluation:
    """Ask the same questions under every condition, resumable after a kill at any moment.

    Call it again with the same arguments to go on: what is written is kept. Ctrl-C ends the run and returns
    what it has so far, `stopped="interrupted"`.

    Args:
        model: A TransformerLens model with a tokenizer; a name or path for `models.load_model`; or a function
            without arguments that loads one, which is what other processes need.
        questions: What to ask, or a file of JSON lines for `read_questions`.
        out: Folder for `answers.jsonl`, one line per answer, and at the end `evaluation.txt` and
            `evaluation.json`; made if it does not exist. None keeps everything in memory.
        conditions: By name: None for the plain model, or the StepFlow to put on it. Default: the paper's
            StepFlow, its halves, a control of each, and the plain model.
        decoding: How to decode; greedy by default.
        prompting: How to ask: format, splitter, system prompt, words around the question.
        grader: Says whether an answer is right: a registered grader or its name, or any function
            `(question, answer) -> bool`.
        allow_code_execution: Lets the grader "code" execute what the model writes, in a sandbox.
        shard: The part of the questions to take, as in "0/8"; all by default. Runs may share the folder.
        engine: "local" or "ray".
        replicas: Models at once, for ray; one per GPU by default, or one.
        overwrite: Begin anew where the folder holds answers of other settings.
        seed: Of the resampling; `decoding` has the seed of the sampling.
        watcher: Is told how the run goes on.

    Returns:
        The questions that are answered under every condition, those of other shards in the folder included.

    Raises:
        ValueError: If there is no question or no condition, or one has a name that a ledger cannot hold.
        ProblemError: If two questions have the same id, or one cannot be written down.
        InputFileError: If the questions cannot be read, the folder cannot be made, or the shard does not
            exist.
        ModelError: If the model cannot be loaded or asked, or a condition does not fit it.
        ResultFileError: If the folder is in use by another run, or holds another evaluation.
        StepflowError: If the grader cannot work: see `grading.prepared`. Nothing is asked then.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}: expected {' or '.join(map(repr, ENGINES))}")
    grader = grader_named(grader) if isinstance(grader, str) else grader
    if isinstance(questions, str | Path):
        questions = read_questions(questions, grader if isinstance(grader, Grader) else "exact")
    part = Shard.of(shard)
    asked = Asked(
        tuple(questions),
        part,
        conditions=dict(standard_conditions() if conditions is None else conditions),
        decoding=decoding or Decoding(),
        prompting=prompting or Prompting(),
        grader=grader,
        allow_code_execution=allow_code_execution,
    )
    prepared(grader, questions, allow_code_execution=allow_code_execution)
    folder = None if out is None else Path(out)
    if folder is not None:
        make_folder(folder)
    watch = watcher or _Silence()
    at_work = open_engine(
        partial(_worker, loader_of(model), asked), engine=engine, replicas=replicas, given_up=_given_up
    )
    try:
        settings = asked.settings(at_work.settings)
        ledger = (
            nullcontext()
            if folder is None
            else Journal(
                answers_path(folder, part), ANSWERS, settings.to_json(), overwrite=overwrite, note=watch.note
            )
        )
        with ledger as journal:
            if folder is not None:
                check_folder(folder, settings)
            driver = _Driver(asked, at_work.settings.batches, journal, watch)
            stopped = driver.run(at_work, settings)
    finally:
        at_work.close()
    answers = driver.in_memory if folder is None else read_ledgers(folder)[1].values()
    found = evaluation_of(settings, answers, questions=dict(enumerate(questions)), seed=seed)
    found = replace(found, stopped=stopped)
    return found if folder is None else _with_tables(found, folder, watch, is_alone=part.count == 1)


class _Driver:
    """Hands out tasks, writes the ledger, keeps count."""

    def __init__(
        self,
        asked: Asked,
        batches: Sequence[Sequence[Row]],
        journal: Journal | None,
        watcher: AnswerWatcher,
    ) -> None:
        self._asked, self._batches, self._journal, self._watcher = asked, batches, journal, watcher
        self.in_memory: list[Answered] = []
        self._total = len(asked.conditions) * sum(map(len, batches))
        self._n_written = self._n_tokens = self._n_given_up = 0

    def run(self, engine: Engine, settings: AnswerSettings) -> Stop:
        """Write every answer that is not there; why it ended early, if it did."""
        self._watcher.begin(self._total, self._n_done, settings, engine.replicas)
        if stopped := stop_of(partial(self._deal, engine), self._watcher.note, self._how_far):
            return stopped
        if not self._n_given_up:
            return ""
        what = f"{self._n_given_up} batches were given up{self._how_far()}"
        self._watcher.note(f"{what}; the same command tries them again")
        return "worker died"

    def _deal(self, engine: Engine) -> None:
        for task, written in engine.results(self._tasks()):
            for note in written.notes:
                self._watcher.note(note)
            self._n_given_up += written.given_up
            self._record(task, written.answers)

    def _tasks(self) -> Iterator[BatchTask]:
        for number, batch in enumerate(self._batches):
            for condition in self._asked.conditions:
                names = (self._asked.id_of(condition, row) for row in batch)
                if self._journal is None or not all(name in self._journal for name in names):
                    yield BatchTask(condition, number)

    @property
    def _n_done(self) -> int:
        """Answers that are there, whoever wrote them: a ledger of these settings holds no others."""
        return len(self.in_memory if self._journal is None else self._journal)

    def _record(self, task: BatchTask, answers: Sequence[Answered]) -> None:
        if self._journal is None:
            new = list(answers)
            self.in_memory += new
        else:
            new = [answer for answer in answers if answer.id not in self._journal]
            self._journal.append_all([answer.to_json() for answer in new])
        self._n_written += len(answers)
        n_tokens = sum(each.answer.n_new for each in answers)
        self._n_tokens += n_tokens
        if answers:
            left = (self._total - self._n_done) * self._n_tokens / self._n_written
            self._watcher.advance(len(new), n_tokens, sum(each.seconds for each in answers), left)

    def _how_far(self) -> str:
        return f": {self._n_done} of {self._total} answers are written"


def _worker(load: Loader, asked: Asked) -> AnswerWorker:
    """At module level, so that another process can call it."""
    return AnswerWorker(load(), asked)


def _given_up(task: BatchTask) -> Written:
    return Written(
        notes=(
            f"batch {task.batch + 1} under {task.condition!r} is given up: its worker died {MOST_DEATHS} "
            "times on it, perhaps for want of memory",
        ),
        given_up=True,
    )


def _with_tables(found: Evaluation, folder: Path, watcher: AnswerWatcher, *, is_alone: bool) -> Evaluation:
    """The same, written down beside its ledgers. What a killed run left is another shard's perhaps."""
    leftovers = Leftovers(*([folder] if is_alone else []))
    try:
        for name, text in (("evaluation.txt", found.table()), ("evaluation.json", found.to_json())):
            leftovers.remove(name)
            write_atomically(folder / name, f"{text}\n".encode())
    except DiskFullError as error:
        watcher.note(f"the disk is full: {error}")
        return replace(found, stopped="disk full")
    return found
