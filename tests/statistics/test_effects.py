import math

import numpy as np
import pytest

from stepflow_tl.statistics import effects


def column_effects(x, y, *, paired=False, n_bootstrap=200, n_permutations=200, seed=0):
    amount = effects.Resampling(0.95, n_bootstrap, n_permutations, seed)
    return effects.column_effects(
        np.asarray(x, float), np.asarray(y, float), paired=paired, resampling=amount
    )


def test_hedges_g_is_the_corrected_standardised_difference():
    # Means 2 and 4, sums of squares 2 and 8, 5 - ... 8 values in all: pooled variance 10 / 6.
    x, y = [[1], [2], [3]], [[2], [3], [4], [5], [6]]
    correction = math.gamma(3) / (math.sqrt(3) * math.gamma(2.5))
    found = column_effects(x, y)
    assert found["effect_size"][0] == pytest.approx(correction * (2 - 4) / math.sqrt(12 / 6))
    assert (found["mean"][0], found["other_mean"][0], found["difference"][0]) == (2, 4, -2)
    assert (found["n"][0], found["other_n"][0]) == (3, 5)


def test_d_z_is_the_mean_over_the_spread_of_the_paired_differences():
    found = column_effects([[1], [2], [6]], [[0], [0], [3]], paired=True)
    # Differences 1, 2, 3: mean 2, standard deviation 1.
    assert found["effect_size"][0] == pytest.approx(2)
    # All three have one sign: of 8 flips the observed and its mirror reach the mean of 2.
    assert found["p_value"][0] == pytest.approx(2 / 8)


def test_a_difference_without_spread_has_no_standardised_size():
    assert math.isnan(column_effects([[1], [1]], [[2], [2]])["effect_size"][0])
    assert column_effects([[1], [1]], [[1], [1]])["effect_size"][0] == 0


def test_missing_values_are_dropped_column_by_column():
    nan = math.nan
    x = [[1, 1], [2, nan], [3, 3], [4, 8]]
    y = [[1, 2], [nan, 3], [2, 7]]
    found = column_effects(x, y)
    assert found["n"].tolist() == [4, 3] and found["other_n"].tolist() == [2, 3]
    assert found["mean"].tolist() == [2.5, 4] and found["other_mean"].tolist() == [1.5, 4]
    without = column_effects([[1], [3], [8]], [[2], [3], [7]])
    assert found["p_value"][1] == without["p_value"][0]


def test_a_pair_with_a_missing_half_is_dropped_whole():
    found = column_effects([[1], [2], [math.nan], [7]], [[0], [math.nan], [1], [3]], paired=True)
    assert found["n"][0] == found["other_n"][0] == 2
    assert found["mean"][0] == 4 and found["other_mean"][0] == 1.5


def test_fewer_than_two_values_give_their_number_and_no_test():
    found = column_effects([[1], [math.nan]], [[2], [3]])
    assert found["n"][0] == 1 and found["mean"][0] == 1
    assert all(math.isnan(found[name][0]) for name in ("low", "high", "effect_size", "p_value"))
    nothing = column_effects([[math.nan], [math.nan]], [[2], [3]])
    assert nothing["n"][0] == 0 and math.isnan(nothing["mean"][0])


def test_holm_steps_down():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    # Sorted: .005 * 4, .01 * 3, .03 * 2, .04 * 1 raised to what came before.
    np.testing.assert_allclose(effects.corrected(p, "holm"), [0.03, 0.06, 0.06, 0.02])


def test_benjamini_hochberg_steps_up():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(effects.corrected(p, "fdr_bh"), [0.02, 0.04, 0.04, 0.02])


@pytest.mark.parametrize("method", ["holm", "fdr_bh", "none"])
def test_corrections_stay_probabilities_and_skip_missing_tests(method):
    p = np.array([0.9, math.nan, 0.6, 0.02])
    found = effects.corrected(p, method)
    assert math.isnan(found[1]) and (found[[0, 2, 3]] <= 1).all() and (found[[0, 2, 3]] >= p[[0, 2, 3]]).all()
    np.testing.assert_allclose(found[[0, 2, 3]], effects.corrected(p[[0, 2, 3]], method))
    assert np.isnan(effects.corrected(np.full(2, math.nan), method)).all()
