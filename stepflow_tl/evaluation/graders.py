"""Graders that compare what was written with the right answer.

`exact` compares texts without the white space around them; `steps` asks, on the testbed, that every thinking
step be right too.
"""

from __future__ import annotations

from stepflow_tl.errors import ProblemError
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


_FIELDS: dict[str, FieldKind] = {"question": "text", "answer": "text"}
register_grader(Grader("exact", _FIELDS, exact))
register_grader(Grader("steps", _FIELDS, steps))
