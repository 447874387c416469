"""Grading: every kind of first error is told from the others."""

from dataclasses import replace

import pytest

from stepflow_tl.testbed import Grade, grade
from stepflow_tl.testbed.problems import Derivation, Premise, Problem, ProblemSpec


@pytest.fixture
def problem():
    return Problem(
        ProblemSpec(n_steps=2),
        (Premise("b", "b = a - 4"), Premise("a", "a = 4 + 7")),
        (Derivation("a", "4", "+", "7", 4, 7, 1), Derivation("b", "a", "-", "4", 1, 4, 7)),
    )


RIGHT = "a = 4 + 7: 4 + 7 = 1\n\nb = a - 4: 1 - 4 = 7\n"


def test_the_right_thinking_is_right(problem):
    assert problem.thinking + "\n" == RIGHT
    assert grade(problem, RIGHT, "\n\n7") == Grade(True, None, None, 2)


@pytest.mark.parametrize(
    ("old", "new", "error", "step"),
    [
        ("a = 4 + 7: 4", "a = 7 + 4: 4", "definition", 0),
        ("b = a - 4", "c = a - 4", "definition", 1),
        ("b = a - 4: 1", "b = a + 4: 1", "definition", 1),
        ("b = a - 4: 1", "b = a - 5: 1", "definition", 1),
        (": 4 + 7 = 1", ": 5 + 7 = 2", "copy", 0),
        (": 4 + 7 = 1", ": 4 + 8 = 2", "copy", 0),
        ("1 - 4 = 7", "1 - 5 = 6", "copy", 1),
        ("1 - 4 = 7", "2 - 4 = 8", "earlier step", 1),
        ("2 - 5", "2 - 5", None, None),
        ("1 - 4 = 7", "1 - 4 = 8", "arithmetic", 1),
        (": 4 + 7 = 1", ": 4 - 7 = 7", "form", 0),
        ("b = a - 4: 1 - 4 = 7", "b = a", "form", 1),
        ("\n\nb = a - 4: 1 - 4 = 7", "", "form", 1),
        ("= 7\n", "= 7\n\nc = a + b: 1 + 7 = 8\n", "form", 2),
    ],
)
def test_the_first_error_is_named(problem, old, new, error, step):
    verdict = grade(problem, RIGHT.replace(old, new), "7")
    assert (verdict.error, verdict.step) == (error, step)
    assert verdict.n_right == (2 if step is None else step)
    assert verdict.correct  # the answer alone decides


def test_of_two_errors_the_first_counts(problem):
    verdict = grade(problem, "a = 4 + 7: 4 + 7 = 2\n\nb = a - 4: 2 - 5 = 7\n", "3")
    assert (verdict.error, verdict.step, verdict.correct) == ("arithmetic", 0, False)


def test_a_wrong_answer_after_right_thinking(problem):
    assert grade(problem, RIGHT, "8") == Grade(False, "answer", None, 2)
    assert grade(problem, RIGHT, "") == Grade(False, "answer", None, 2)
    assert grade(problem, "", "7").error == "form"


LONG = "a = 4 + 7\n4 + 7 = 1\n\nb = a - 4\na = 1\n1 - 4 = 7\n"


@pytest.mark.parametrize(
    ("old", "new", "error", "step"),
    [
        ("", "", None, None),
        ("a = 4 + 7", "a = 7 + 4", "definition", 0),
        ("4 + 7 = 1", "4 + 8 = 2", "copy", 0),
        ("4 + 7 = 1", "4 + 7 = 2", "arithmetic", 0),
        ("4 + 7 = 1", "4 - 7 = 7", "form", 0),
        ("\na = 1\n1", "\na = 2\n2", "earlier step", 1),
        ("\na = 1\n1", "\nc = 1\n1", "form", 1),
        ("\na = 1\n1", "\n1", "form", 1),
        ("\na = 1\n1", "\na = 1\n2", "copy", 1),
        ("\na = 1\n1 - 4 = 7", "", "form", 1),
    ],
)
def test_the_first_error_of_a_long_step_is_named(problem, old, new, error, step):
    problem = replace(problem, spec=ProblemSpec(n_steps=2, n_asked=2, long_steps=True), early=0)
    assert problem.thinking + "\n" == LONG and problem.answer == "7 + 1 = 8"
    head, found, tail = LONG.rpartition(old) if step else LONG.partition(old) if old else ("", "", LONG)
    # "4 + 7 = 1" stands in the first step only as its result, "a = 4 + 7" as its definition.
    text = f"{head}{new}{tail}" if found else LONG
    verdict = grade(problem, text, "\n\n7 + 1 = 8")
    assert (verdict.correct, verdict.error, verdict.step) == (True, error, step)
