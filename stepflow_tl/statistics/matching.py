"""Matching: from two groups, the pairs of members that are alike in what must not differ.

Shares of a map depend on how many steps and tokens a trace has, and right answers tend to be shorter.
Comparing all right traces with all wrong ones then compares lengths as well. Matched pairs do not:

1. Two members may be paired if they differ by no more than the caliper in every covariate; with strata, only
   if they are of one stratum (such as the question that both answer).
2. Of all ways to form such pairs, one with the most pairs is taken, and among those one with the smallest sum
   of squared differences, each in units of its caliper (an assignment problem, solved exactly by scipy).
3. Balance is stated before and after: per covariate, the difference of the means over the pooled standard
   deviation (the standardised mean difference). What is left is at most the caliper, and can all point one
   way: a narrower caliper leaves less and drops more.

Matching on what is measured balances nothing that is not: difficulty above all. Answers to one question,
right and wrong, are the comparison that rules difficulty out.

Cost: O(n m) memory and, in the worst case, O(n m min(n, m)) time; a second for two groups of a thousand.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Matching:
    """The matched pairs of two groups.

    Attributes:
        pairs: Positions (in the first group, in the second), in the first group's order.
        n_first: Members of the first group.
        n_second: Members of the second group.
        imbalance_before: Standardised mean difference of each covariate over all members, first minus second.
        imbalance: The same over the matched pairs.
    """

    pairs: tuple[tuple[int, int], ...]
    n_first: int
    n_second: int
    imbalance_before: tuple[float, ...]
    imbalance: tuple[float, ...]

    @property
    def n_dropped(self) -> tuple[int, int]:
        """Members of each group that have no partner."""
        return self.n_first - len(self.pairs), self.n_second - len(self.pairs)


def match_groups(
    first: Float[np.ndarray, "member covariate"],
    second: Float[np.ndarray, "other_member covariate"],
    calipers: Sequence[float],
    *,
    strata: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
) -> Matching:
    """Pair the members of two groups that differ by at most a caliper in every covariate.

    Args:
        first: Covariates of the first group's members, such as the number of steps and the logarithm of the
            number of tokens.
        second: The same for the second group.
        calipers: Largest difference allowed in each covariate, in its own unit.
        strata: The stratum of every member, for each group; by default all are of one.

    Raises:
        ValueError: If covariates and calipers, or members and strata, differ in number, a caliper is not
            positive, a group is empty, or a covariate is not finite.
    """
    from scipy.optimize import linear_sum_assignment

    widths = np.asarray(calipers, dtype=np.float64)
    if first.shape[1] != len(widths) or second.shape[1] != len(widths):
        raise ValueError(
            f"{len(widths)} calipers for {first.shape[1]} and {second.shape[1]} covariates: expected one each"
        )
    if not (widths > 0).all():
        raise ValueError(f"calipers are {list(calipers)}: expected positive numbers")
    if not len(first) or not len(second):
        raise ValueError(f"groups of {len(first)} and {len(second)} members: expected at least one in each")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a covariate is not finite: leave such members out")
    gaps = np.abs(first[:, None, :] - second[None, :, :]) / widths
    allowed = np.all(gaps <= 1 + 1e-12, axis=2)  # a difference of exactly the caliper counts as inside
    if strata is not None:
        if (len(strata[0]), len(strata[1])) != allowed.shape:
            raise ValueError(f"{len(strata[0])} and {len(strata[1])} strata for groups of {allowed.shape}")
        number = {name: place for place, name in enumerate(dict.fromkeys((*strata[0], *strata[1])))}
        own, other = (np.array([number[name] for name in names]) for names in strata)
        allowed &= own[:, None] == other[None, :]
    cost = (gaps**2).sum(axis=2)
    # More than all allowed pairs together can cost: so one more pair is always worth it.
    forbidden = len(widths) * (min(allowed.shape) + 1.0)
    rows, columns = linear_sum_assignment(np.where(allowed, cost, forbidden))
    pairs = tuple((int(i), int(j)) for i, j in zip(rows, columns, strict=True) if allowed[i, j])
    chosen = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Matching(
        pairs=pairs,
        n_first=len(first),
        n_second=len(second),
        imbalance_before=_imbalance(first, second),
        imbalance=_imbalance(first[chosen[:, 0]], second[chosen[:, 1]]),
    )


def _imbalance(
    first: Float[np.ndarray, "member covariate"], second: Float[np.ndarray, "other_member covariate"]
) -> tuple[float, ...]:
    """Difference of the means over the pooled standard deviation; NaN with fewer than two members."""
    if len(first) < 2 or len(second) < 2:
        return (float("nan"),) * first.shape[1]
    difference = first.mean(axis=0) - second.mean(axis=0)
    spread = np.sqrt((first.var(axis=0, ddof=1) + second.var(axis=0, ddof=1)) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return tuple(np.where(difference == 0, 0.0, difference / spread).tolist())
