"""One model and what is done with a batch of questions: write the answers, then grade them.

1. Before the first batch: the grader, every condition, the format and the splitter are checked, and the
   batches planned (`evaluation.decoding`).
2. Per batch and condition: the answers are written, under the condition's StepFlow, and graded.
3. A batch that does not fit into memory is written in halves, and said so. Greedy answers may then differ
   from those of the whole batch where two tokens tie within rounding.

A worker writes no file: the ledger has one writer, the driver (`answers`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stepflow_tl.errors import ProblemError
from stepflow_tl.evaluation import Answer, AnswerWriter, Decoding, Grader, Prompting, Question
from stepflow_tl.evaluation.decoding import Row
from stepflow_tl.evaluation.evaluation import refuse_nothing
from stepflow_tl.evaluation.grading import Grade, graded, prepared
from stepflow_tl.models.facts import model_facts
from stepflow_tl.runs.answer_file import Answered, AnswerSettings, answer_id, digest_of
from stepflow_tl.runs.memory import OutOfMemoryError, is_out_of_memory, let_go
from stepflow_tl.runs.options import Shard
from stepflow_tl.stepflow import StepFlow


@dataclass(frozen=True)
class AnswerPlan:
    """What the driver must know of a worker: of its model, and which answers it writes together."""

    model_name: str
    dtype: str
    format: str
    batches: tuple[tuple[Row, ...], ...]


@dataclass(frozen=True)
class Asked:
    """What is asked of a model: all that a worker needs, wherever it is.

    Attributes:
        questions: All of them.
        part: The part of them that is asked in this run.
        conditions: By name, what is on the model.
        decoding: How answers are written.
        prompting: How questions are put.
        grader: Says which answers are right.
        allow_code_execution: Lets a grader execute what the model writes.

    Raises:
        ValueError: If there is nothing to ask, or a ledger cannot hold a condition's name or state.
        ProblemError: If ids are not unique, or a question holds something other than text.
    """

    questions: tuple[Question, ...]
    part: Shard
    conditions: Mapping[str, StepFlow | None]
    decoding: Decoding
    prompting: Prompting
    grader: Grader | Grade
    allow_code_execution: bool

    def __post_init__(self) -> None:
        """Refuse what a ledger could not tell apart or hold."""
        refuse_nothing(self.questions, self.conditions)
        for name, flow in self.conditions.items():
            if not name or "/" in name or not name.isprintable():
                raise ValueError(f"a condition is called {name!r}: expected a printable name without '/'")
            if flow is not None and not _is_readable(flow):
                raise ValueError(f"condition {name!r} is {flow!r}: expected plain Python numbers in it")
        ids: set[str] = set()
        for question in self.questions:
            if question.id in ids:
                raise ProblemError(f"two questions have the id {question.id!r}: ids must differ")
            ids.add(question.id)
            _check_writable(question)

    @property
    def numbers(self) -> range:
        """Places of this run's questions among all, by their places in the run."""
        return range(self.part.index, len(self.questions), self.part.count)

    def id_of(self, condition: str, row: Row) -> str:
        """The id of the answer that a row of a batch becomes."""
        return answer_id(self.questions[self.numbers[row.question]], condition, row.sample)

    def settings(self, plan: AnswerPlan) -> AnswerSettings:
        """What the ledger's header says.

        Args:
            plan: Of a worker, which has the model.
        """
        return AnswerSettings(
            model_name=plan.model_name,
            dtype=plan.dtype,
            decoding=self.decoding,
            grader=_name_of(self.grader),
            format=plan.format,
            splitter=_name_of(self.prompting.splitter),
            system=self.prompting.system,
            prompt=self.prompting.prompt,
            conditions=self.conditions,
            questions_sha256=digest_of(self.questions),
            n_questions=len(self.questions),
        )


class BatchTask(NamedTuple):
    """One batch, by its place in the plan, under one condition."""

    condition: str
    batch: int


class Written(NamedTuple):
    """What became of a task."""

    answers: tuple[Answered, ...] = ()
    notes: tuple[str, ...] = ()
    given_up: bool = False


class AnswerWorker:
    """A model, ready to answer."""

    def __init__(self, model: Any, asked: Asked) -> None:
        """Check what no answer could survive, and plan the batches.

        Raises:
            ModelError: If the model cannot be asked, or a condition does not fit it.
            StepflowError: As `AnswerWriter` and `grading.prepared`.
        """
        self._asked = asked
        self._grade = prepared(asked.grader, asked.questions, allow_code_execution=asked.allow_code_execution)
        for flow in asked.conditions.values():
            if flow is not None:
                flow.layers(model)
        texts = [asked.questions[number].text for number in asked.numbers]
        self._writer = AnswerWriter(model, texts, asked.decoding, asked.prompting)
        facts = model_facts(model)
        self.settings = AnswerPlan(
            facts.name, str(facts.dtype), self._writer.format.name, self._writer.batches
        )

    def take(self, task: BatchTask) -> Written:
        """Write and grade one batch under one condition.

        Raises:
            OutOfMemoryError: If a single answer does not fit into memory.
            StepflowError: If the grader cannot work.
        """
        asked, notes = self._asked, []
        rows, flow = self._writer.batches[task.batch], asked.conditions[task.condition]
        answers, seconds = self._write(rows, flow, notes)
        numbers = [asked.numbers[row.question] for row in rows]
        questions = [asked.questions[number] for number in numbers]
        verdicts = graded(questions, [[answer] for answer in answers], self._grade)
        n_tokens = sum(answer.n_new for answer in answers)
        found = [
            Answered(
                asked.questions[number],
                number=number,
                condition=task.condition,
                sample=row.sample,
                answer=answer,
                verdict=verdict,
                seconds=round(seconds * answer.n_new / n_tokens, 6),
            )
            for row, number, answer, (verdict,) in zip(rows, numbers, answers, verdicts, strict=True)
        ]
        return Written(tuple(found), tuple(notes))

    def _write(
        self, rows: Sequence[Row], flow: StepFlow | None, notes: list[str]
    ) -> tuple[list[Answer], float]:
        try:
            return self._writer.write(rows, flow)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        let_go()
        if len(rows) == 1:
            raise OutOfMemoryError(
                f"not enough memory for one answer alone, {len(rows[0].prompt)} tokens of prompt and up to "
                f"{self._asked.decoding.max_new_tokens} new ones: ask for fewer (--max-new-tokens), or "
                "spread the model over all GPUs (--device-map auto)"
            )
        notes.append(f"not enough memory for a batch of {len(rows)} answers: it is written in halves")
        half = (len(rows) + 1) // 2
        first, second = (self._write(part, flow, notes) for part in (rows[:half], rows[half:]))
        return first[0] + second[0], first[1] + second[1]


def _is_readable(flow: StepFlow) -> bool:
    """Whether a header can state this StepFlow so that it is read back the same."""
    try:
        return StepFlow.parse(repr(flow)) == flow
    except ValueError:
        return False


def _check_writable(question: Question) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in question.id):
        raise ProblemError(f"the question's id {question.id!r} holds half a character: give it another")
    for name, value in question.row.items():
        if not all(isinstance(each, str) for each in (value if isinstance(value, tuple) else [value])):
            raise ProblemError(
                f"question {question.id!r}: its field {name!r} is {str(value)[:60]}, expected a string or a "
                "tuple of strings"
            )


def _name_of(thing: Any) -> str:
    """What a header calls it: the same in every process, so without its address in memory."""
    named = (getattr(thing, name, None) for name in ("name", "__qualname__"))
    name = thing if isinstance(thing, str) else next((each for each in named if isinstance(each, str)), None)
    return name or re.sub(r" at 0x[0-9a-f]+", "", repr(thing))
