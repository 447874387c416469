"""Questions with a known answer: from JSON lines, or from the testbed.

One object per line with `question` and `answer` (strings; a number is taken as its text), and optionally `id`
and `difficulty`, any string or number by which accuracy is reported apart. Every line is checked before any
is asked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepflow_tl.errors import InputFileError, TraceError
from stepflow_tl.testbed.problems import Problem
from stepflow_tl.trace.steps import refuse_half_characters


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: Its name.
        text: What the user asks.
        answer: The right answer.
        difficulty: The class by which accuracy is reported apart; empty for none.
        problem: The testbed problem behind it, or None.
    """

    id: str
    text: str
    answer: str
    difficulty: str = ""
    problem: Problem | None = None


def questions_of(problems: Iterable[Problem]) -> list[Question]:
    """Testbed problems as questions; their difficulty is the number of steps.

    Args:
        problems: From `testbed.make_problems`.
    """
    return [
        Question(
            f"testbed-{i}", problem.question, problem.answer, f"{len(problem.derivations)} steps", problem
        )
        for i, problem in enumerate(problems)
    ]


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file of JSON lines.

    Args:
        path: One object per line with `question` and `answer`, and optionally `id` and `difficulty`.

    Raises:
        InputFileError: If the file cannot be read, has no question, or a line is not one; the message names
            the line and the field.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"cannot read {path}: {error}") from error
    questions = [_parse(line, number, path) for number, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise InputFileError(f"{path} has no question: expected one JSON object per line")
    name, count = Counter(question.id for question in questions).most_common(1)[0]
    if count > 1:
        raise InputFileError(f"{path}: the id {name!r} occurs more than once; ids must differ")
    return questions


def _parse(line: str, number: int, path: Path) -> Question:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
        raise InputFileError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputFileError(f"{path}, line {number}: expected an object with `question` and `answer`")
    return Question(
        id=_text(data, "id", number, path) or f"line-{number}",
        text=_required(data, "question", number, path),
        answer=_required(data, "answer", number, path),
        difficulty=_text(data, "difficulty", number, path),
    )


def _required(data: dict[str, Any], field: str, number: int, path: Path) -> str:
    found = _text(data, field, number, path)
    if not found.strip():
        raise InputFileError(f"{path}, line {number}: `{field}` is missing or empty")
    return found


def _text(data: dict[str, Any], field: str, number: int, path: Path) -> str:
    value = data.get(field)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InputFileError(
            f"{path}, line {number}: `{field}` is {type(value).__name__}, expected a string or a number"
        )
    text = str(value)
    try:
        refuse_half_characters(text)
    except TraceError as error:
        raise InputFileError(f"{path}, line {number}: `{field}`: {error}") from error
    return text
