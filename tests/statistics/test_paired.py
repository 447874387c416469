"""Paired differences: values by hand, coverage of the interval, and McNemar against its definition."""

from math import comb

import numpy as np
import pytest

from stepflow_tl.statistics.paired import PairedDifference, paired_difference


def test_counts_mean_and_mcnemar_by_hand():
    a = np.array([1.0] * 9 + [0.0] * 2 + [1.0] * 30 + [0.0] * 9)
    b = np.array([0.0] * 9 + [1.0] * 2 + [1.0] * 30 + [0.0] * 9)
    found = paired_difference(a, b, binary=True)
    assert (found.n, found.gained, found.lost) == (50, 9, 2)
    assert found.difference == pytest.approx(7 / 50)
    assert found.p_value == pytest.approx(2 * sum(comb(11, k) for k in range(3)) / 2**11)
    assert found.low < found.difference < found.high
    mirrored = paired_difference(b, a, binary=True)
    assert (mirrored.difference, mirrored.p_value) == pytest.approx((-found.difference, found.p_value))


def test_nothing_differs():
    same = np.array([1.0, 0.0, 1.0])
    found = paired_difference(same, same, binary=True)
    assert found == PairedDifference(3, 0.0, 0.0, 0.0, 0, 0, 1.0)
    assert not found.differs and str(found) == "no answer differs, of 3 questions"
    moved = paired_difference(same, np.array([0.0, 1.0, 1.0]), binary=True)  # one gained, one lost: mean 0
    assert moved.differs and str(moved).startswith("+0.0000 [-") and str(moved).endswith("lost 1 of 3")


@pytest.mark.parametrize("binary", [True, False])
def test_intervals_hold_the_truth_and_p_values_are_small_as_often_as_they_may(binary):
    rng = np.random.default_rng(0)
    held, small, n_runs = 0, 0, 200
    for run in range(n_runs):
        n = 1 if binary else 4
        a, b = (rng.binomial(n, 0.6, 150) / n for _ in range(2))
        found = paired_difference(a, b, binary=binary, n_bootstrap=400, seed=run)
        held += found.low <= 0 <= found.high
        small += found.p_value < 0.05
    assert 0.89 < held / n_runs <= 1.0
    assert small / n_runs < 0.10


def test_an_effect_is_found():
    rng = np.random.default_rng(1)
    base = rng.random((400, 8)) < 0.5
    better = base | (rng.random((400, 8)) < 0.2)
    found = paired_difference(better.mean(1), base.mean(1), binary=False)
    assert found.low > 0.05 and found.high < 0.15 and found.p_value < 1e-3
