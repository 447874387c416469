"""What a question, a verdict and a grader are, and the table of graders by name.

A grader knows one kind of question: which fields its JSON lines have, how such a question is shown to the
model, and whether an answer is right. `exact`, `maths` and `steps` are in `graders`, `choice` and `code` in
files of their own. To add one:

    register_grader(Grader("yes-no", {"question": "text", "answer": "text"},
                           lambda question, answer: question.answer in answer.summary.lower()))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from stepflow_tl.errors import ProblemError, SandboxError
from stepflow_tl.evaluation.generation import Answer
from stepflow_tl.testbed.problems import Problem

FieldKind = Literal["text", "texts"]
Row = Mapping[str, Any]
"""Fields of one JSON line, checked: a text is a string, texts are a tuple of strings."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: Its name.
        text: What the user asks.
        answer: The right answer; empty where only running it can tell.
        difficulty: The class by which accuracy is reported apart; empty for none.
        problem: The testbed problem behind it, or None.
        row: The fields that the grader needs beside these.
    """

    id: str
    text: str
    answer: str
    difficulty: str = ""
    problem: Problem | None = None
    row: Row = field(default_factory=dict, compare=False, repr=False)

    def field(self, name: str) -> Any:
        """One field of the row.

        Args:
            name: The field.

        Raises:
            ProblemError: If the question was not read for a grader that has it.
        """
        if name not in self.row:
            raise ProblemError(
                f"question {self.id!r} has no `{name}`, which its grader needs: read it with "
                "read_questions(path, grader=...), from lines that have the field"
            )
        return self.row[name]


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right; true where it is.

    Attributes:
        right: Whether it is.
        reason: Why not, in a few words; may be empty.
    """

    right: bool
    reason: str = ""

    def __bool__(self) -> bool:
        """Whether the answer is right."""
        return self.right


Grade = Callable[[Question, Answer], bool | Verdict]
"""Says whether an answer is right."""


def _question(row: Row) -> str:
    return row["question"]


def _nothing(*_: Any) -> Any:
    return ()


@dataclass(frozen=True)
class Grader:
    """One kind of question, and how its answers are graded.

    Attributes:
        name: What it is called, on the command line too.
        fields: Fields that every line must have, each a "text" (a string; a number is taken as its text) or
            "texts" (a list of strings). `id` and `difficulty` are always allowed and never needed.
        grade: Says whether an answer is right. With `runs_code` it gets `allow_code_execution=True` too.
        ask: What the user asks, from the line's fields; the field `question` by default.
        problems: What is wrong with a line whose fields are all there, one sentence each.
        ready: Raises if the grader cannot work here, before anything is asked.
        runs_code: Whether it executes what the model wrote.
    """

    name: str
    fields: Mapping[str, FieldKind]
    grade: Callable[..., bool | Verdict]
    ask: Callable[[Row], str] = _question
    problems: Callable[[Row], Sequence[str]] = _nothing
    ready: Callable[[], Any] = _nothing
    runs_code: bool = False


_graders: dict[str, Grader] = {}
GRADERS: Mapping[str, Grader] = MappingProxyType(_graders)
"""Every registered grader by name."""


def register_grader(grader: Grader) -> Grader:
    """Let a grader be called by its name; returns it.

    Args:
        grader: What its name will stand for.

    Raises:
        ValueError: If there is one of that name already.
    """
    if grader.name in _graders:
        raise ValueError(f"there is a grader {grader.name!r} already: give this one another name")
    _graders[grader.name] = grader
    return grader


def grader_named(name: str) -> Grader:
    """The registered grader of that name.

    Raises:
        ValueError: If there is none; the message lists those there are.
    """
    if name not in _graders:
        raise ValueError(f"there is no grader {name!r}: expected one of {', '.join(_graders)}")
    return _graders[name]


def prepared(
    grader: Grader | Grade | str, questions: Sequence[Question], *, allow_code_execution: bool
) -> Grade:
    """The function that grades, after everything that would stop it has been looked for.

    Args:
        grader: A grader, its name, or just a function.
        questions: What will be asked.
        allow_code_execution: Whether what the model writes may be executed.

    Raises:
        ValueError: If no grader has that name.
        ProblemError: If a question lacks a field that the grader needs.
        SandboxError: If the grader runs code and may not, or the sandbox does not work here.
        MissingExtraError: If a library that the grader needs is not installed.
    """
    if isinstance(grader, str):
        grader = grader_named(grader)
    if not isinstance(grader, Grader):
        return grader
    if grader.runs_code and not allow_code_execution:
        raise SandboxError(
            f"the grader {grader.name!r} executes code that the model writes, and nobody has allowed that: "
            "pass allow_code_execution=True (--allow-code-execution). It runs in a sandbox: see "
            "stepflow_tl.evaluation.sandbox for what that protects against and what not"
        )
    for question in questions:
        for name in grader.fields:
            if name not in ("question", "answer"):
                question.field(name)
    grader.ready()
    return partial(grader.grade, allow_code_execution=True) if grader.runs_code else grader.grade


def graded(
    questions: Sequence[Question], answers: Sequence[Sequence[Answer]], grade: Grade
) -> tuple[tuple[Verdict, ...], ...]:
    """The verdict on each answer to each question, `[question][sample]`."""

    def verdicts(question: Question, samples: Sequence[Answer]) -> Iterator[Verdict]:
        for answer in samples:
            found = grade(question, answer)
            yield found if isinstance(found, Verdict) else Verdict(bool(found))

    return tuple(tuple(verdicts(*pair)) for pair in zip(questions, answers, strict=True))
