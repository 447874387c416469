"""How many questions a paired comparison needs: exact power of McNemar's test.

One answer per question under two conditions. A share `d` of the questions is discordant: right under one
condition alone; `(d + difference) / 2` of all are gained, `(d - difference) / 2` lost. Then

1. the number m of discordant questions is binomial(n, d); of these the gained are
   binomial(m, (d + difference) / 2d);
2. the exact test rejects where twice the smaller binomial tail at 1/2 is at most alpha;
3. power is the probability of that, summed over m.

Where `d` is not known, two conditions whose answers are independent give `2 b (1 - b)` with `b` right: an
upper guess, because answers to one question tend to agree.
"""

from __future__ import annotations

import numpy as np

from stepflow_tl.errors import ComparisonError


def mcnemar_power(n: int, discordant: float, difference: float, alpha: float = 0.05) -> float:
    """Probability that McNemar's exact two-sided test rejects.

    Args:
        n: Questions.
        discordant: Share of them that only one condition gets right.
        difference: Share gained minus share lost.
        alpha: Level of the test.

    Raises:
        ComparisonError: If no such shares exist.
    """
    from scipy.stats import binom

    if n < 1 or not 0 < alpha < 1 or not 0 < discordant <= 1 or abs(difference) > discordant:
        raise ComparisonError(
            f"n is {n}, alpha {alpha}, discordant {discordant}, difference {difference}: expected at least "
            "one question, a level and a share between 0 and 1, and a difference no larger than the share"
        )
    m = np.arange(n + 1)
    smallest = binom.ppf(alpha / 2, m, 0.5)  # the first count whose tail reaches alpha / 2
    critical = np.where(2 * binom.cdf(smallest, m, 0.5) <= alpha, smallest, smallest - 1)
    gained = (1 + difference / discordant) / 2
    rejected = binom.cdf(critical, m, gained) + binom.sf(m - critical - 1, m, gained)
    return float((binom.pmf(m, n, discordant) * np.where(critical < 0, 0, rejected)).sum())


def detectable_difference(n: int, discordant: float, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest difference that is found with this probability, to 1e-4; None if even the largest is not.

    Args:
        n: Questions.
        discordant: As in `mcnemar_power`.
        power: Probability of finding it.
        alpha: Level of the test.

    Raises:
        ComparisonError: As `mcnemar_power`.
    """
    low, high = 0.0, discordant
    if mcnemar_power(n, discordant, high, alpha) < power:
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        if mcnemar_power(n, discordant, middle, alpha) < power:
            low = middle
        else:
            high = middle
    return high


def half_width(n: int, discordant: float, difference: float = 0.0, confidence: float = 0.95) -> float:
    """About half the width of the difference's interval: z times the standard error of a paired mean.

    Args:
        n: Questions.
        discordant: As in `mcnemar_power`.
        difference: As there.
        confidence: Of the interval.
    """
    from scipy.stats import norm

    return float(norm.ppf((1 + confidence) / 2) * np.sqrt((discordant - difference**2) / n))


def samples_needed(n: int, discordant: float, width: float, confidence: float = 0.95) -> int:
    """Samples of each question, averaged, that bring half the interval down to `width`.

    A lower bound: S samples of n questions count like n S questions where the repair changes every question's
    chance by as much; what it does to one question more than to another stays, however many samples.

    Args:
        n: Questions.
        discordant: As in `mcnemar_power`.
        width: Half the width of the interval that is wanted.
        confidence: Of the interval.

    Raises:
        ComparisonError: If the width is not positive.
    """
    if not width > 0:
        raise ComparisonError(f"the half width is {width}: expected more than 0")
    return max(1, int(np.ceil((half_width(n, discordant, confidence=confidence) / width) ** 2 - 1e-9)))
