"""Screened cuts: which candidates are cut alone, and which are only bounded by a group that is cut together.

For one query step with candidates in order of promise (`promise_order`), `screen`

1. cuts the first `top` of them one by one, and in the same batch all others together: one row, the
   certificate, says what the others do at most;
2. where the size of a group's effect is above `tolerance`, halves it, the more promising half first, and cuts
   both halves; a half of one candidate is thereby cut alone;
3. stops when every group is within the tolerance.

So every candidate is either cut alone or in exactly one group whose joint effect is within the tolerance.

What the groups prove. The effect of a group is measured, not estimated: without all of its members at once
the predictions are this far off. It does not bound each member by itself. Cuts can undo one another: under
"nll" a member that helps and one that hurts may sum to nothing, and under either measure a cut may be made up
for by another one. KL cannot be negative, so there nothing cancels in the sum over predictions, but it is not
monotone in what is cut. `benchmarks/knockout.py --screened` measures how often a member's own effect is
beyond the tolerance.

Cost, per query step: one row that is not cut, `min(top, candidates)` rows, one for the rest; and for each
candidate outside `top` with an effect, up to two rows per halving, about `2 log2(candidates)`. So it grows
with the number of steps, not its square, as long as the number of sources per step does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from stepflow_tl.causal.cut import KeySet
from stepflow_tl.causal.knockout_result import CutGroup
from stepflow_tl.errors import KnockoutError
from stepflow_tl.saliency.pooling import row_parts
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.trace import ReasoningTrace

TOP = 8
"""Candidates per query step that are cut alone, whatever the certificate says."""


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
    effects: Callable[[Sequence[KeySet]], list[float]],
    *,
    top: int,
    tolerance: float,
    joint: Iterable[KeySet] = (),
) -> QueryCuts:
    """Cut candidates until each has an effect of its own or stands in a group within the tolerance.

    Args:
        query: Index of the query step.
        candidates: Key steps, the most promising first.
        effects: Runs cuts, each a set of key steps, and gives their effects; called once per round.
        top: How many are cut alone from the start.
        tolerance: In the measure's unit.
        joint: Further sets, cut beside the first round and never halved.
    """
    alone: dict[int, float] = {}
    groups: list[CutGroup] = []
    chosen: list[KeySet] = list(joint)
    waiting: list[KeySet] = [(key,) for key in candidates[:top]]
    if rest := tuple(candidates[top:]):
        waiting.append(rest)
    while chosen or waiting:
        found = effects([*waiting, *chosen])
        halves: list[KeySet] = []
        for keys, effect in zip(waiting, found, strict=False):
            if len(keys) == 1:
                alone[keys[0]] = effect
            elif abs(effect) <= tolerance:
                groups.append(CutGroup(query, tuple(sorted(keys)), effect, "bound"))
            else:
                groups.append(CutGroup(query, tuple(sorted(keys)), effect, "split"))
                middle = (len(keys) + 1) // 2
                halves += [keys[:middle], keys[middle:]]
        groups += [
            CutGroup(query, keys, effect, "joint")
            for keys, effect in zip(chosen, found[len(waiting) :], strict=True)
        ]
        chosen, waiting = [], halves
    return QueryCuts(alone, groups)


def promise_order(saliency: StepSaliency, query: int, candidates: Sequence[int]) -> tuple[int, ...]:
    """Candidates by the largest share that any layer gives them in the query step's row, largest first.

    Rows are normalised as in `diagnose`, so that a layer counts by what it prefers and not by how much it
    has.

    Args:
        saliency: The step map; heads are averaged.
        query: Index of the query step.
        candidates: Key steps.
    """
    rows = row_parts(saliency.head_mean()[:, query : query + 1, : query + 1].double())
    share = rows[:, 0].amax(0)
    order = share[list(candidates)].argsort(descending=True, stable=True)
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
