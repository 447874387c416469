"""Resampling against scipy's own, against enumeration, and against what an interval and a p-value promise."""

import numpy as np
import pytest
import scipy.stats

from stepflow_tl.statistics import resampling


def rng(seed=0):
    return np.random.default_rng(seed)


def welch_t(x, y, axis=-1):
    spread = x.var(axis=axis, ddof=1) / x.shape[axis] + y.var(axis=axis, ddof=1) / y.shape[axis]
    return np.abs(x.mean(axis=axis) - y.mean(axis=axis)) / np.sqrt(spread)


def test_two_group_intervals_agree_with_scipy():
    x, y = rng(1).exponential(size=(25, 1)), rng(2).exponential(size=(18, 1)) + 0.5
    low, high = resampling.bca_interval([(1, x), (-1, y)], confidence=0.9, n_bootstrap=20000, rng=rng())
    expected = scipy.stats.bootstrap(
        (x[:, 0], y[:, 0]), lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        n_resamples=20000, confidence_level=0.9, method="BCa", rng=rng(5), vectorized=True,
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert low[0] == pytest.approx(expected.low, abs=0.03 * width)
    assert high[0] == pytest.approx(expected.high, abs=0.03 * width)


def test_paired_intervals_agree_with_scipy_where_bca_differs_from_the_percentile_interval():
    sample = rng(3).lognormal(sigma=1.2, size=(20, 1))
    low, high = resampling.bca_interval([(1, sample)], confidence=0.95, n_bootstrap=20000, rng=rng())
    bca, percentile = (
        scipy.stats.bootstrap(
            (sample[:, 0],), np.mean, n_resamples=20000, method=method, rng=rng(5)
        ).confidence_interval
        for method in ("BCa", "percentile")
    )
    width = bca.high - bca.low
    assert bca.high - percentile.high > 0.1 * width
    assert low[0] == pytest.approx(bca.low, abs=0.04 * width)
    assert high[0] == pytest.approx(bca.high, abs=0.04 * width)


def test_intervals_cover_the_truth_about_as_often_as_they_promise():
    # 600 independent experiments in 600 columns. Binomial spread of the coverage: 0.009.
    x, y = rng(1).exponential(size=(40, 600)), rng(2).exponential(size=(30, 600)) * 2
    low, high = resampling.bca_interval([(1, x), (-1, y)], confidence=0.95, n_bootstrap=2000, rng=rng())
    coverage = ((low <= -1) & (-1 <= high)).mean()
    assert 0.91 < coverage < 0.98


def test_an_interval_of_constants_is_their_difference():
    x, y = np.full((5, 1), 0.75), np.full((4, 1), 0.5)
    low, high = resampling.bca_interval([(1, x), (-1, y)], confidence=0.95, n_bootstrap=99, rng=rng())
    assert low[0] == pytest.approx(0.25) and high[0] == pytest.approx(0.25)


def test_few_labellings_are_all_visited_as_scipy_does():
    x, y = rng(1).normal(size=(5, 3)), rng(2).normal(size=(4, 3)) + 1
    p = resampling.label_permutation_p(x, y, n_permutations=126, rng=rng())
    for column in range(3):
        expected = scipy.stats.permutation_test(
            (x[:, column], y[:, column]), welch_t, n_resamples=np.inf, alternative="greater", vectorized=True
        )
        assert p[column] == pytest.approx(expected.pvalue)


def test_drawn_labellings_come_close_to_all_of_them():
    x, y = rng(1).normal(size=(7, 20)), rng(2).normal(size=(6, 20)) + 0.5
    exact = resampling.label_permutation_p(x, y, n_permutations=1716, rng=rng())
    drawn = np.mean(
        [resampling.label_permutation_p(x, y, n_permutations=1715, rng=rng(seed)) for seed in range(5)],
        axis=0,
    )
    assert np.abs(exact - drawn).max() < 0.02


def test_few_sign_flips_are_all_visited_as_scipy_does():
    differences = rng(1).normal(size=(8, 3)) + 0.4
    p = resampling.sign_flip_p(differences, n_permutations=256, rng=rng())
    for column in range(3):
        expected = scipy.stats.permutation_test(
            (differences[:, column],), lambda d, axis=-1: np.abs(d.mean(axis=axis)),
            permutation_type="samples", n_resamples=np.inf, alternative="greater", vectorized=True,
        )  # fmt: skip
        assert p[column] == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("paired", [False, True])
def test_without_a_difference_p_values_are_uniform(paired):
    """1 000 null experiments: Kolmogorov's distance exceeds 0.0515 in 1 % of such runs if p is uniform."""
    if paired:
        p = resampling.sign_flip_p(rng(1).laplace(size=(25, 1000)), n_permutations=999, rng=rng())
    else:
        x, y = rng(1).gamma(2, size=(30, 1000)), rng(2).gamma(2, size=(22, 1000))
        p = resampling.label_permutation_p(x, y, n_permutations=999, rng=rng())
    assert scipy.stats.kstest(p, "uniform").statistic < 0.0515


def test_unequal_spread_in_unequal_groups_does_not_break_the_level():
    """Permuting the plain difference rejects here in about a quarter of cases; Welch's t keeps near 5 %."""
    x, y = rng(1).normal(scale=3, size=(15, 800)), rng(2).normal(scale=1, size=(60, 800))
    p = resampling.label_permutation_p(x, y, n_permutations=999, rng=rng())
    assert 0.02 < (p <= 0.05).mean() < 0.085


def test_p_is_never_zero_and_counts_the_observed_arrangement():
    x, y = rng(1).normal(size=(30, 1)) + 10, rng(2).normal(size=(30, 1))
    assert resampling.label_permutation_p(x, y, n_permutations=99, rng=rng())[0] == pytest.approx(1 / 100)
    assert resampling.sign_flip_p(x, n_permutations=99, rng=rng())[0] == pytest.approx(1 / 100)


def test_constants_that_differ_are_as_extreme_as_labels_allow():
    x, y = np.full((3, 1), 1.0), np.full((3, 1), 2.0)
    # Of the 20 labellings only the observed one and its mirror separate the values.
    assert resampling.label_permutation_p(x, y, n_permutations=99, rng=rng())[0] == pytest.approx(2 / 20)


def test_columns_without_any_spread_have_p_one():
    constant = np.full((6, 1), 0.3)
    assert resampling.label_permutation_p(constant, constant[:4], n_permutations=50, rng=rng())[0] == 1
    assert resampling.sign_flip_p(constant * 0, n_permutations=50, rng=rng())[0] == 1


def test_columns_do_not_disturb_each_other():
    x, y = rng(1).normal(size=(12, 4)), rng(2).normal(size=(15, 4)) * 5 + 1
    together = resampling.label_permutation_p(x, y, n_permutations=500, rng=rng(7))
    alone = resampling.label_permutation_p(x[:, 2:3], y[:, 2:3], n_permutations=500, rng=rng(7))
    assert together[2] == alone[0]
