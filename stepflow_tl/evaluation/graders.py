r"""Graders that compare what was written with the right answer.

`exact` compares texts without the white space around them; `maths` parses both with the library math-verify,
so that `\frac{1}{2}` is 0.5; `steps` asks, on the testbed, that every thinking step be right too.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from stepflow_tl.errors import ProblemError, require
from stepflow_tl.evaluation.generation import Answer
from stepflow_tl.evaluation.grading import FieldKind, Grader, Question, register_grader
from stepflow_tl.testbed.grading import grade


def exact(question: Question, answer: Answer) -> bool:
    """Whether the summary is the right answer, character by character.

    Args:
        question: What was asked, with its right answer.
        answer: What was written.
    """
    return answer.summary.strip() == question.answer.strip()


def maths(question: Question, answer: Answer) -> bool:
    """Whether the summary holds the right number or formula, by math-verify.

    Arguments as in `exact`.

    Raises:
        MissingExtraError: If math-verify is not installed.
    """
    library = _math_verify()
    # The time limits of math-verify use signals, which only a main thread may; the texts are short.
    unlimited: dict[str, Any] = {"parsing_timeout": None}
    right = library.parse(f"${question.answer}$", **unlimited)
    return library.verify(right, library.parse(answer.summary, **unlimited), timeout_seconds=None)


def steps(question: Question, answer: Answer) -> bool:
    """Whether the summary and every thinking step are right; for testbed questions.

    Arguments as in `exact`.

    Raises:
        ProblemError: If the question is not one of the testbed.
    """
    if question.problem is None:
        raise ProblemError(
            f"question {question.id!r} has no testbed problem behind it, so its steps cannot be graded: "
            "use the grader 'exact' or 'maths'"
        )
    return grade(question.problem, answer.thinking, answer.summary).error is None


def _math_verify() -> ModuleType:
    return require("math_verify", purpose="The grader 'maths'", extra="maths")


_FIELDS: dict[str, FieldKind] = {"question": "text", "answer": "text"}
register_grader(Grader("exact", _FIELDS, exact))
register_grader(Grader("maths", _FIELDS, maths, ready=_math_verify))
register_grader(Grader("steps", _FIELDS, steps))
