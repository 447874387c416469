"""Two conditions on the same questions: how much better is one, and could that be chance?

1. Each question has one score per condition: the part of its answers that are right. Differences are taken
   question by question.
2. The interval of their mean is the BCa bootstrap over questions, which are what was sampled: several answers
   to one question are not independent.
3. With one answer per question, McNemar's exact test asks whether the questions that only one condition gets
   right fall evenly; with several, signs of the differences are flipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from stepflow_tl.statistics.resampling import bca_interval, sign_flip_p


@dataclass(frozen=True)
class PairedDifference:
    """One condition minus another on the same questions.

    Attributes:
        n: Questions.
        difference: Mean difference of the scores.
        low: Lower end of the interval.
        high: Upper end.
        gained: Questions on which the condition scores higher.
        lost: Questions on which it scores lower.
        p_value: Two-sided; not corrected.

    Where no question's score differs there is nothing to resample: both ends are 0, which is not an interval.
    Say "no answer differs" then, as `str` does.
    """

    n: int
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p_value: float

    @property
    def differs(self) -> bool:
        """Whether any question's score differs."""
        return self.gained + self.lost > 0

    def __str__(self) -> str:
        """Difference and interval in one line."""
        if not self.differs:
            return f"no answer differs, of {self.n} questions"
        counts = f"gained {self.gained}, lost {self.lost} of {self.n}"
        return f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}], {counts}"


def paired_difference(
    scores: Float[np.ndarray, " question"],
    other: Float[np.ndarray, " question"],
    *,
    binary: bool,
    confidence: float = 0.95,
    n_bootstrap: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """`scores - other`, question by question.

    Args:
        scores: Part of right answers to each question, under the condition.
        other: The same under the other condition.
        binary: Whether there is one answer per question (McNemar) or several (sign flips).
        confidence: Of the interval.
        n_bootstrap: Resamples, and flips.
        seed: Of both.
    """
    from scipy.stats import binomtest

    difference = (scores - other)[:, None]
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    rng = np.random.default_rng(seed)
    if gained + lost == 0:  # nothing differs: nothing to resample
        return PairedDifference(len(scores), 0.0, 0.0, 0.0, 0, 0, 1.0)
    low, high = bca_interval([(1, difference)], confidence=confidence, n_bootstrap=n_bootstrap, rng=rng)
    p = (
        binomtest(gained, gained + lost).pvalue
        if binary
        else sign_flip_p(difference, n_permutations=n_bootstrap, rng=rng)[0]
    )
    mean = float(difference.mean())
    return PairedDifference(len(scores), mean, float(low[0]), float(high[0]), gained, lost, float(p))
