"""Questions with a known answer: from JSON lines, or from the testbed.

One object per line with the fields that the grader needs (`question` and `answer` for most), and optionally
`id` and `difficulty`, any string or number by which accuracy is reported apart. Every line is checked before
any is asked, and all that are wrong are named.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stepflow_tl.errors import InputFileError, TraceError
from stepflow_tl.evaluation.grading import Grader, Question, grader_named
from stepflow_tl.testbed.problems import Problem
from stepflow_tl.trace.steps import refuse_half_characters


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


def read_questions(path: str | Path, grader: Grader | str = "exact") -> list[Question]:
    """The questions of a file of JSON lines.

    Args:
        path: One object per line with the grader's fields, and optionally `id` and `difficulty`.
        grader: What the answers will be graded by, which says what a line must hold and how it is asked.

    Raises:
        InputFileError: If the file cannot be read, has no question, or lines are not questions; the message
            names every such line and what is wrong with it.
        ValueError: If no grader has that name.
    """
    grader, path = grader_named(grader) if isinstance(grader, str) else grader, Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"cannot read {path}: {error}") from error
    questions: list[Question] = []
    numbers: dict[str, int] = {}  # the line in which an id was first met
    wrong: dict[str, list[int]] = defaultdict(list)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        question = _parsed(line, number, grader)
        if isinstance(question, list):
            for problem in question:
                wrong[problem].append(number)
        elif numbers.setdefault(question.id, number) != number:
            wrong[f"the id {question.id!r} occurs more than once"].append(number)
        else:
            questions.append(question)
    if wrong:
        where = [f"{_lines(numbers)}: {problem}" for problem, numbers in wrong.items()]
        whole = where[0] if len(where) == 1 else "\n  ".join(["lines that cannot be asked", *where])
        raise InputFileError(f"{path}, {whole} (fields of the grader {grader.name!r})")
    if not questions:
        raise InputFileError(f"{path} has no question: expected one JSON object per line")
    return questions


def _lines(numbers: Sequence[int]) -> str:
    """Line numbers in words, neighbours as ranges: "lines 1-3, 7"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return f"line{'s' * (len(numbers) > 1)} " + ", ".join("-".join(map(str, part)) for part in ranges)


def _parsed(line: str, number: int, grader: Grader) -> Question | list[str]:
    """The question of a line, or what is wrong with it."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        return [f"not JSON ({error})"]
    if not isinstance(data, dict):
        return [f"expected an object, found {type(data).__name__}"]
    row: dict[str, Any] = {}
    wrong: list[str] = []
    for name, kind in {"id": "text", "difficulty": "text", **grader.fields}.items():
        try:
            value = data.get(name)
            row[name] = _texts(name, value) if kind == "texts" else _text(name, value)
            if name in grader.fields and not (row[name] if kind == "texts" else row[name].strip()):
                wrong.append(f"`{name}` is missing or empty")
        except (TypeError, TraceError) as error:
            wrong.append(f"`{name}`{' ' if isinstance(error, TypeError) else ': '}{error}")
    wrong = wrong or list(grader.problems(row))
    if wrong:
        return wrong
    name = row["id"] or f"line-{number}"
    return Question(name, grader.ask(row), row.get("answer", ""), row["difficulty"], row=row)


def _texts(name: str, values: Any) -> tuple[str, ...]:
    if values is None:
        return ()
    if not isinstance(values, list):
        raise TypeError(f"is {type(values).__name__}, expected a list of strings")
    texts = tuple(_text(name, value) for value in values)
    if not all(text.strip() for text in texts):
        raise TypeError("holds an empty string")
    return texts


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"is {type(value).__name__}, expected a string or a number")
    text = str(value)
    refuse_half_characters(text)
    return text
