"""One model and what is done with a batch of questions: write the answers, then grade them.

1. Before the first batch: the grader, every condition, the format and the splitter are checked, and the
   batches planned (`evaluation.generation`).
2. Per batch and condition: the answers are written, under the condition's StepFlow, and graded.
3. A batch that does not fit into memory is written in halves, and said so. Greedy answers may then differ
   from those of the whole batch where two tokens tie within rounding.

A worker writes no file: the ledger has one writer, the driver (`answers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stepflow_tl.evaluation import Answer, AnswerWriter, Decoding, Grader, Prompting, Question
from stepflow_tl.evaluation.generation import Row
from stepflow_tl.evaluation.grading import Grade, graded, prepared
from stepflow_tl.models.facts import model_facts
from stepflow_tl.runs.answer_file import Answered, answer_id
from stepflow_tl.runs.memory import OutOfMemoryError, is_out_of_memory, let_go
from stepflow_tl.stepflow import StepFlow


@dataclass(frozen=True)
class Asked:
    """What is asked of a model: all that a worker needs, wherever it is.

    Attributes:
        questions: Those of the shard.
        numbers: Place of each in the whole input.
        conditions: By name, what is on the model.
        decoding: How answers are written.
        prompting: How questions are put.
        grader: Says which answers are right.
        allow_code_execution: Lets a grader execute what the model writes.
    """

    questions: tuple[Question, ...]
    numbers: tuple[int, ...]
    conditions: Mapping[str, StepFlow | None]
    decoding: Decoding
    prompting: Prompting
    grader: Grader | Grade
    allow_code_execution: bool

    def id_of(self, condition: str, row: Row) -> str:
        """The id of the answer that a row of a batch becomes."""
        return answer_id(self.questions[row.question], condition, row.sample)


class BatchTask(NamedTuple):
    """One batch, by its place in the plan, under one condition."""

    condition: str
    batch: int


class Written(NamedTuple):
    """What became of a task."""

    answers: tuple[Answered, ...] = ()
    notes: tuple[str, ...] = ()
    given_up: bool = False


@dataclass(frozen=True)
class AnswerPlan:
    """What the driver must know of a worker: of its model, and which answers it writes together."""

    model_name: str
    dtype: str
    format: str
    batches: tuple[tuple[Row, ...], ...]


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
                flow.bands(model)
        texts = [question.text for question in asked.questions]
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
        questions = [asked.questions[row.question] for row in rows]
        verdicts = graded(questions, [[answer] for answer in answers], self._grade)
        n_tokens = sum(answer.n_new for answer in answers)
        found = [
            Answered(
                question,
                number=asked.numbers[row.question],
                condition=task.condition,
                sample=row.sample,
                answer=answer,
                verdict=verdict,
                seconds=round(seconds * answer.n_new / n_tokens, 6),
            )
            for row, question, answer, (verdict,) in zip(rows, questions, answers, verdicts, strict=True)
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
