"""The ledger of answers: what was asked how, then one JSON line per answer, and what they say together.

`{"schema": 1, "kind": "header", "settings": {...}, "stepflow_tl": version}`
`{"kind": "answer", "id": "<question id>/<condition>/<sample>", "question_id", "sample", "condition",
"question", "difficulty", "tokens": [ids of prompt and answer], "n_prompt", "thinking", "summary", "right",
"reason", "new_tokens", "finished", "seconds", "number", "expected", "row"}`

This module alone knows what stands in those lines, both ways. How they reach the disk, and what becomes of
torn and damaged ones, is `results.journal`'s business.

1. The last line of an id counts. A folder may hold several ledgers, one per shard, of the same settings.
2. A line stands for itself: with its question's place in the input (`number`), right answer (`expected`) and
   the fields that the grader needs (`row`), so that answers can be counted anew by another grader. Only the
   problem behind a testbed question is not in it, which the grader `steps` needs.
3. A question counts once it is answered under every condition, all samples: conditions are compared on the
   same questions. How many do not count yet is stated.
4. `seconds` is the answer's share of its batch's time, by the tokens written, and the only field that differs
   between two equal runs.

Memory: an `Evaluation` holds all texts and tokens, some 40 bytes per token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepflow_tl.errors import ResultFileError
from stepflow_tl.evaluation import Answer, Decoding, Evaluation, Question, Verdict
from stepflow_tl.evaluation.evaluation import ConditionResult
from stepflow_tl.results.journal_lines import (
    JournalKind,
    read_journal,
    read_journals,
    read_settings,
    refuse_other_run,
)
from stepflow_tl.results.plain_data import count, number, text, text_or_none
from stepflow_tl.runs.options import Shard
from stepflow_tl.stepflow import StepFlow
from stepflow_tl.trace.steps import whole_numbers

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class AnswerSettings:
    """What all answers of a folder have in common.

    Attributes:
        model_name: The model's own name.
        dtype: Of its weights.
        decoding: How answers are written.
        grader: Name of what counts them.
        format: Name of the reasoning format.
        splitter: What cuts steps while StepFlow follows the text.
        system: The system prompt, or None.
        prompt: The user's turn, with `{question}` where the question goes.
        conditions: By name, the StepFlow that is on; None for nothing.
        questions_sha256: Digest of everything that is asked, see `digest_of`.
        n_questions: How many questions, over all shards.
    """

    model_name: str
    dtype: str
    decoding: Decoding
    grader: str
    format: str
    splitter: str
    system: str | None
    prompt: str
    conditions: Mapping[str, StepFlow | None]
    questions_sha256: str
    n_questions: int

    def to_json(self) -> dict[str, Any]:
        """Plain data, the flows as their `repr`."""
        flows = {name: None if flow is None else repr(flow) for name, flow in self.conditions.items()}
        own = {name: value for name, value in vars(self).items()}
        return {**own, "decoding": asdict(self.decoding), "conditions": flows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AnswerSettings:
        """Read a header's settings.

        Raises:
            KeyError: If one is missing.
            TypeError: If one is of the wrong type; or `ValueError`, for what it holds.
        """
        flows = data["conditions"]
        if not isinstance(flows, dict) or not isinstance(data["decoding"], dict):
            raise TypeError("conditions and decoding must be objects")
        texts = ("model_name", "dtype", "grader", "format", "splitter", "prompt", "questions_sha256")
        return cls(
            **{name: text(data, name) for name in texts},
            decoding=Decoding(**data["decoding"]),
            system=text_or_none(data, "system"),
            conditions={
                name: None if flow is None else StepFlow.parse(text(flows, name))
                for name, flow in flows.items()
            },
            n_questions=count(data, "n_questions"),
        )


@dataclass(frozen=True)
class Answered:
    """One answer, and all that is known of it.

    Attributes:
        question: What was asked.
        number: The question's place in the input, from 0.
        condition: Name of what was on the model.
        sample: Which of the question's answers, from 0.
        answer: What was written.
        verdict: Whether it is right, and why not.
        seconds: Its share of its batch's time.
    """

    question: Question
    number: int
    condition: str
    sample: int
    answer: Answer
    verdict: Verdict
    seconds: float

    @property
    def id(self) -> str:
        """Of the line."""
        return answer_id(self.question, self.condition, self.sample)

    def to_json(self) -> dict[str, Any]:
        """The line. Half a character, which UTF-8 cannot hold, is escaped."""
        question, answer = self.question, self.answer
        return {
            "kind": "answer",
            "id": self.id,
            "question_id": question.id,
            "sample": self.sample,
            "condition": self.condition,
            "question": _whole(question.text),
            "difficulty": _whole(question.difficulty),
            "tokens": list(answer.tokens),
            "n_prompt": len(answer.tokens) - answer.n_new,
            "thinking": _whole(answer.thinking),
            "summary": _whole(answer.summary),
            "right": self.verdict.right,
            "reason": _whole(self.verdict.reason),
            "new_tokens": answer.n_new,
            "finished": answer.finished,
            "seconds": self.seconds,
            "number": self.number,
            "expected": _whole(question.answer),
            "row": {name: _whole(value) for name, value in question.row.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answered:
        """The answer of a line.

        Raises:
            KeyError: If a field is missing.
            TypeError: If a field is of the wrong type; or `ValueError`, for what it holds.
        """
        tokens, n_new = whole_numbers(data["tokens"]), count(data, "new_tokens")
        if count(data, "n_prompt") + n_new != len(tokens):
            raise ValueError(
                f"{len(tokens)} tokens, but n_prompt is {data['n_prompt']} and new_tokens {n_new}"
            )
        for name in ("right", "finished"):
            if type(data[name]) is not bool:
                raise TypeError(f"{name} is a {type(data[name]).__name__}, expected true or false")
        question = Question(
            text(data, "question_id"),
            text=text(data, "question"),
            answer=text(data, "expected"),
            difficulty=text(data, "difficulty"),
            row=_row(data["row"]),
        )
        found = cls(
            question,
            number=count(data, "number"),
            condition=text(data, "condition"),
            sample=count(data, "sample"),
            answer=Answer(tokens, text(data, "thinking"), text(data, "summary"), n_new, data["finished"]),
            verdict=Verdict(data["right"], text(data, "reason")),
            seconds=number(data, "seconds"),
        )
        if data["id"] != found.id:
            raise ValueError(f"the id is {str(data['id'])[:80]!r}, expected {found.id!r}")
        return found


ANSWERS = JournalKind(
    what="ledger of answers",
    of="evaluation",
    schema=SCHEMA_VERSION,
    entries=("answer",),
    check=Answered.from_json,
    stem="answers",
)


def answer_id(question: Question, condition: str, sample: int) -> str:
    """The id of an answer's line."""
    return f"{question.id}/{condition}/{sample}"


def answers_path(folder: Path, shard: Shard | None = None) -> Path:
    """Where the ledger of an evaluation lies.

    Args:
        folder: The folder of the results.
        shard: Whose part; of a run that is not cut by default.
    """
    return folder / f"{ANSWERS.stem}{(shard or Shard()).suffix}.jsonl"


def digest_of(questions: Sequence[Question]) -> str:
    """SHA-256 over ids, texts, right answers, difficulties and the fields that the grader needs."""
    asked = [[q.id, q.text, q.answer, q.difficulty, dict(q.row)] for q in questions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def read_answers(folder: str | Path, *, seed: int = 0) -> Evaluation:
    """What the ledgers of a folder say, whether or not the run that writes them has ended.

    Args:
        folder: Where `evaluate` put its answers.
        seed: Of the resampling of the intervals.

    Returns:
        The questions that are answered under every condition; `n_missing` are not, yet.

    Raises:
        ResultFileError: If there is no ledger, one cannot be read, or two are of different settings.
    """
    settings, answers = read_ledgers(Path(folder))
    return evaluation_of(settings, answers.values(), seed=seed)


def check_folder(folder: Path, settings: AnswerSettings) -> None:
    """Make sure that all ledgers of a folder are of these settings; reads their headers alone.

    Raises:
        ResultFileError: If one is not, or cannot be read.
    """
    for path in ANSWERS.files(folder):
        header = next(read_journal(path, ANSWERS))
        refuse_other_run(path, header.settings or {}, settings.to_json(), ANSWERS)


def read_ledgers(folder: Path) -> tuple[AnswerSettings, dict[str, Answered]]:
    """The settings and the answers of a folder, by id; damaged lines are passed over.

    Raises:
        ResultFileError: As `read_answers`.
    """
    settings: dict[str, Any] = {}
    answers: dict[str, Answered] = {}
    for _, line in read_journals(ANSWERS.files(folder), ANSWERS):
        if line.settings is not None:
            settings |= line.settings
        elif not line.damage:
            answers[line.id] = line.entry
    if not settings:
        raise ResultFileError(f"{folder} holds no ledger of answers (answers.jsonl): run `evaluate` first")
    return read_settings(AnswerSettings.from_json, settings, folder), answers


def evaluation_of(
    settings: AnswerSettings,
    answers: Iterable[Answered],
    *,
    questions: Mapping[int, Question] | None = None,
    seed: int = 0,
) -> Evaluation:
    """What these answers say together.

    Args:
        settings: What they have in common.
        answers: In any order.
        questions: By number, to be used in place of what the answers say of them.
        seed: Of the resampling.
    """
    n_samples = settings.decoding.n_samples
    by_place = {(a.number, a.condition, a.sample): a for a in answers}
    wanted = [(condition, sample) for condition in settings.conditions for sample in range(n_samples)]
    whole = [
        n for n in sorted({place[0] for place in by_place}) if all((n, *each) in by_place for each in wanted)
    ]
    known = dict(questions or {})
    results: dict[str, ConditionResult] = {}
    for name, flow in settings.conditions.items():
        samples = [[by_place[n, name, sample] for sample in range(n_samples)] for n in whole]
        results[name] = ConditionResult(
            flow,
            answers=tuple(tuple(each.answer for each in found) for found in samples),
            verdicts=tuple(tuple(each.verdict for each in found) for found in samples),
            seconds=sum(each.seconds for found in samples for each in found),
        )
    return Evaluation(
        tuple(known.get(n) or by_place[(n, *wanted[0])].question for n in whole),
        settings.decoding,
        results,
        seed,
        n_missing=settings.n_questions - len(whole),
    )


def _row(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise TypeError(f"row is a {type(data).__name__}, expected an object")
    for value in data.values():
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(each, str) for each in texts):
            raise TypeError("row must hold strings and lists of strings")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return list(map(_whole, value))
