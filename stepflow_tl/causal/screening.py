"""Screened cuts: which candidates are cut alone, and which are only bounded by a group that is cut together.

For one query step with candidates in order of promise (`promise`), `screen`

1. cuts the first `top` of them one by one, and in the same batch all others together, the rest;
2. stops where the rest is within the tolerance: its size (below) says what the others do at most;
3. else cuts the next `top` one by one, and so on, until a round finds no effect above the tolerance. What is
   then left is cut together, once.

So every candidate is either cut alone or in exactly one group, whose joint effect is measured and bounds it.
A step that draws on many others gets many rows, a step that draws on few gets few.

Size of a group. Under "nll" it is the sum of `|change|` over the predictions, at least the size of the effect
and from the same pass: a member that helps one token and one that hurts another do not cancel. Under "kl" it
is the effect, which is never negative. It is not a proof for each member by itself: cuts can undo one another
at the same token, and one cut can be made up for by another one. `benchmarks/screening.py` measures how often
a member's own effect is beyond it. Halving a group that is not within the tolerance, as group testing does,
was tried and left: where many candidates have small effects, halves stay above it down to single steps.

Cost, per query step: one row for the rest, one more where rounds went on; rows of single cuts in multiples of
`top`. At best that is one row per pair with an effect, so a trace of which a part d of the pairs has one
cannot be had for less than d of the price of all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.cut import CutEffect, KeySet
from stepflow_tl.causal.knockout_result import CutGroup, Role
from stepflow_tl.errors import KnockoutError
from stepflow_tl.saliency.pooling import row_parts
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.trace import ReasoningTrace

TOP = 4
"""Candidates of a query step that are cut alone in each round."""

_EACH_LAYER = 0.25  # weight of what the layers say of a cut one by one, beside what they say in sum


class QueryCuts(NamedTuple):
    """What was measured of one query step.

    Attributes:
        alone: Effect of each candidate that was cut alone.
        groups: Effect of each set that was cut together.
    """

    alone: dict[int, float]
    groups: list[CutGroup]


def screen(
    query: int,
    candidates: Sequence[int],
    cuts: Callable[[Sequence[KeySet]], list[CutEffect]],
    *,
    top: int,
    tolerance: float,
    joint: Iterable[KeySet] = (),
) -> QueryCuts:
    """Cut candidates until each has an effect of its own or stands in a group that was cut.

    Args:
        query: Index of the query step.
        candidates: Key steps, the most promising first.
        cuts: Runs cuts, each a set of key steps; called once per round.
        top: How many are cut alone in a round.
        tolerance: In the measure's unit.
        joint: Further sets, cut beside the first round.
    """
    alone: dict[int, float] = {}

    def run(singles: Sequence[int], sets: Sequence[KeySet]) -> list[CutEffect]:
        found = cuts([*((key,) for key in singles), *sets])
        alone.update((key, cut.effect) for key, cut in zip(singles, found, strict=False))
        return found[len(singles) :]

    def group(keys: KeySet, cut: CutEffect, role: Role) -> CutGroup:
        return CutGroup(query, tuple(sorted(keys)), cut.effect, role, cut.size)

    first, rest = _next_round(tuple(candidates), top)
    sets = [*([rest] if rest else []), *joint]
    if not first and not sets:
        return QueryCuts({}, [])
    found = run(first, sets)
    groups = [group(keys, cut, "joint") for keys, cut in zip(sets, found, strict=True)]
    if rest:
        left = rest
        while left and found[0].size > tolerance and any(abs(alone[key]) > tolerance for key in first):
            first, left = _next_round(left, top)
            run(first, [])
        groups[0] = group(rest, found[0], "bound" if left == rest else "split")
        if left and left != rest:
            groups.insert(1, group(left, run([], [left])[0], "bound"))
    return QueryCuts(alone, groups)


def _next_round(waiting: KeySet, top: int) -> tuple[KeySet, KeySet]:
    """Those to be cut alone now, and those left: none or two and more, since one alone is no group."""
    size = top if len(waiting) > top + 1 else len(waiting)
    return waiting[:size], waiting[size:]


def promise(ranking: StepSaliency) -> Float[Tensor, "query_step key_step"]:
    """What a map promises of each candidate of a row: larger, to be cut earlier.

    Of `score="cut"`, which predicts the effect in nats: the size of its sum over layers and heads, and a
    quarter of the sum of the sizes, so that a candidate over which they disagree is not put last. Of other
    scores the largest share that any layer gives the candidate in its row, heads averaged, rows as in
    `diagnose`: a layer counts by what it prefers and not by how much it has.
    """
    sums = ranking.sums.double()
    if ranking.score == "cut":
        return sums.sum((0, 1)).abs() + _EACH_LAYER * sums.abs().sum((0, 1))
    return row_parts(ranking.head_mean().double().abs().tril()).amax(0)


def promise_order(
    promised: Float[Tensor, "query_step key_step"], query: int, candidates: Sequence[int]
) -> tuple[int, ...]:
    """Candidates of a query step by what is promised of them, largest first."""
    order = promised[query, list(candidates)].argsort(descending=True, stable=True)
    return tuple(candidates[place] for place in order.tolist())


def check_screening(
    trace: ReasoningTrace, top: int, tolerance: float, ranking: StepSaliency | None, *, is_screened: bool
) -> None:
    """Refuse numbers and rankings that cannot be meant.

    Raises:
        KnockoutError: If `top` or `tolerance` is negative, or the ranking is of another trace or goes with no
            screening.
    """
    if top < 0 or not (math.isfinite(tolerance) and tolerance >= 0):
        raise KnockoutError(
            f"top is {top} and tolerance {tolerance}: expected a number of candidates and an effect, both at "
            "least 0"
        )
    if ranking is not None and not is_screened:
        raise KnockoutError("ranking= goes with pairs='screened': leave it out, or screen")
    if ranking is not None and ranking.trace != trace:
        raise KnockoutError(
            "ranking is of another trace: pass the Step-Saliency of this one, or leave it out to have it "
            "computed"
        )


def screening_note(top: int, tolerance: float) -> str:
    """How pairs were screened, as the provenance says it."""
    return f"top {top}, tolerance {tolerance:g}"
