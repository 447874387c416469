"""Is a written trace right, and if not, what went wrong first?

Each written step is held against the one right derivation, in order; the first difference gives the verdict:

- `definition`: the name, operands or sign are not the question's (the definition was looked up wrongly);
- `earlier step`: an earlier variable's value is not what the trace itself had found for it;
- `copy`: a number of the definition, or a value just stated, is repeated wrongly;
- `arithmetic`: all of that is right, and the result is wrong;
- `form`: the text is not a step, or steps are missing or too many;
- `answer`: the thinking is right and the summary is not.

The first two are failures of information flow between steps, the next two happen within one: that is the
point of telling them apart.
All earlier steps are right when the first error happens, so the right value of an operand is the trace's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from stepflow_tl.testbed.problems import Derivation, Problem

ErrorKind = Literal["definition", "earlier step", "copy", "arithmetic", "form", "answer"]
ERROR_KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)
FLOW_ERRORS: tuple[ErrorKind, ...] = ("definition", "earlier step")

_STEP = re.compile(r"([a-z]) = (\w) ([+-]) (\w): (\d) ([+-]) (\d) = (\d)")
_LONG_STEP = re.compile(r"([a-z]) = (\w) ([+-]) (\w)\n((?:\w = \d\n)*)(\d) ([+-]) (\d) = (\d)")


@dataclass(frozen=True)
class Grade:
    """Verdict on one trace.

    Attributes:
        correct: Whether the answer is right, whatever the thinking says.
        error: What went wrong first; None if thinking and answer are right.
        step: The thinking step in which it did; None for `answer` and where nothing did.
        n_right: Thinking steps before the first error.
    """

    correct: bool
    error: ErrorKind | None
    step: int | None
    n_right: int


def grade(problem: Problem, thinking: str, summary: str) -> Grade:
    """Hold a written trace against its problem.

    Args:
        problem: What was asked.
        thinking: What was written between the think tags.
        summary: What was written after them.
    """
    correct = summary.strip() == problem.answer
    written = [piece for piece in thinking.strip().split("\n\n") if piece]
    for i, derivation in enumerate(problem.derivations):
        first_error = _first_error_of_lines if problem.spec.long_steps else _first_error
        error = first_error(derivation, written[i]) if i < len(written) else "form"
        if error is not None:
            return Grade(correct, error, i, i)
    n_right = len(problem.derivations)
    if len(written) > n_right:
        return Grade(correct, "form", n_right, n_right)
    return Grade(correct, None if correct else "answer", None, n_right)


def _first_error(derivation: Derivation, text: str) -> ErrorKind | None:
    match = _STEP.fullmatch(text)
    if match is None:
        return "form"
    name, left, sign, right, x, sign_again, y, value = match.groups()
    if (name, left, sign, right) != (derivation.name, derivation.left, derivation.sign, derivation.right):
        return "definition"
    for operand, stated, true in ((left, x, derivation.left_value), (right, y, derivation.right_value)):
        if int(stated) != true:
            return "copy" if operand.isdigit() else "earlier step"
    if sign_again != sign:
        return "form"
    return None if int(value) == derivation.value else "arithmetic"


def _first_error_of_lines(derivation: Derivation, text: str) -> ErrorKind | None:
    """As `_first_error`, of a long step: a variable's value is an earlier step's where it is first stated."""
    match = _LONG_STEP.fullmatch(text)
    if match is None:
        return "form"
    stated = [tuple(line.split(" = ")) for line in match[5].splitlines()]
    error = _first_error(derivation, f"{text.splitlines()[0]}: {derivation.result}")
    if error is not None:
        return error
    operands = ((derivation.left, derivation.left_value), (derivation.right, derivation.right_value))
    true = [(name, str(value)) for name, value in operands if name.isalpha()]
    if [name for name, _ in stated] != [name for name, _ in true]:
        return "form"
    if stated != true:
        return "earlier step"
    if (match[6], match[8]) != (str(derivation.left_value), str(derivation.right_value)):
        return "copy"
    if match[7] != derivation.sign:
        return "form"
    return None if int(match[9]) == derivation.value else "arithmetic"
