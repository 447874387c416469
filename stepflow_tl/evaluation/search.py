"""Strengths and bands of a StepFlow, chosen on some questions and reported on others.

1. Questions are split at random, within each difficulty, into validation and test; no question is in both.
2. Every candidate answers the validation questions. The best one is taken; of equals, the first.
3. The plain model, the chosen StepFlow and its control answer the test questions, once. Only these figures
   are to be reported: the validation score of a chosen candidate is too high by construction.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from stepflow_tl.evaluation.evaluation import PLAIN, Evaluation, evaluate
from stepflow_tl.evaluation.grading import Question
from stepflow_tl.stepflow.flow import StepFlow


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        chosen: The candidate with the best validation score.
        validation: Score of every candidate on the validation questions; not to be reported as a result.
        test: Plain model, chosen StepFlow and its control on the test questions.
    """

    chosen: StepFlow
    validation: tuple[tuple[StepFlow, float], ...]
    test: Evaluation


def grid(base: StepFlow | None = None, **choices: Sequence[Any]) -> list[StepFlow]:
    """Every combination of the choices, as in `grid(tau_max=[0.1, 0.2], alpha=[0, 0.06])`.

    Args:
        base: Where every other argument comes from; the paper's StepFlow by default.
        **choices: Values to try, by argument of StepFlow.

    Raises:
        TypeError: If StepFlow has no argument of that name.
    """
    base = StepFlow() if base is None else base
    return [
        replace(base, **dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]


def split(questions: Sequence[Question], part: float, seed: int) -> tuple[list[Question], list[Question]]:
    """Validation and test questions; `part` of every difficulty goes to validation.

    Raises:
        ValueError: If one of them would be empty.
    """
    rng = random.Random(seed)
    validation: set[str] = set()
    for difficulty in dict.fromkeys(question.difficulty for question in questions):
        names = [question.id for question in questions if question.difficulty == difficulty]
        validation.update(rng.sample(names, round(part * len(names))))
    halves = (
        [question for question in questions if question.id in validation],
        [question for question in questions if question.id not in validation],
    )
    if not all(halves):
        raise ValueError(f"{len(questions)} questions cannot be split at {part}: one side would be empty")
    return halves


def search(
    model: Any,
    questions: Sequence[Question],
    candidates: Sequence[StepFlow],
    *,
    validation_part: float = 0.3,
    seed: int = 0,
    **asked: Any,
) -> Search:
    """Choose among `candidates` on one part of the questions and report on the rest.

    Args:
        model: A TransformerLens model with a tokenizer.
        questions: All questions.
        candidates: What to choose from; see `grid`.
        validation_part: Share of the questions to choose on.
        seed: Of the split and the resampling.
        **asked: Others of `evaluate`, by name: decoding, grader, allow_code_execution, prompting, progress.

    Raises:
        ValueError: If there is no candidate, or too few questions.
    """
    if not candidates:
        raise ValueError("no candidates: expected at least one StepFlow, see grid()")
    validation, test = split(questions, validation_part, seed)
    ask = partial(evaluate, model, seed=seed, **asked)
    tried = ask(validation, conditions={repr(flow): flow for flow in candidates})
    scores = tuple((flow, tried.accuracy(repr(flow))) for flow in candidates)
    chosen = max(scores, key=lambda pair: pair[1])[0]
    conditions = {PLAIN: None, "StepFlow": chosen, "StepFlow control": control_of(chosen)}
    return Search(chosen, scores, ask(test, conditions=conditions))


def control_of(flow: StepFlow) -> StepFlow:
    """The control of equal size: the same StepFlow, with every half that it has in a random place."""
    if flow.tau_max and flow.alpha:
        return replace(flow, placebo="both")
    return replace(flow, placebo="bridge" if flow.tau_max else "momentum")
