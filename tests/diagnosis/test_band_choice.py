"""Bands chosen from two groups of traces: a planted difference is found, noise has no effect."""

import numpy as np
import pytest
from diagnostic_maps import make_diagnosis

from stepflow_tl.diagnosis import choose_bands
from stepflow_tl.errors import ComparisonError


def group(n, seed, *, lock_in=(0,) * 8, thinking_share=(0,) * 8):
    """Diagnoses of 8 layers around 0.5 with spread 0.1, the given differences added."""
    rng = np.random.default_rng(seed)
    return [
        make_diagnosis(
            {
                "lock_in": (0.5 + np.array(lock_in) + 0.1 * rng.standard_normal(8)).tolist(),
                "thinking_share": (0.5 + np.array(thinking_share) + 0.1 * rng.standard_normal(8)).tolist(),
            }
        )
        for _ in range(n)
    ]


def test_a_planted_difference_is_found_where_it_is():
    wrong = group(
        200,
        1,
        lock_in=(0.1, 0.1, 0.1, 0, 0, 0.3, 0.3, 0.3),
        thinking_share=(-0.3, -0.3, 0, 0, 0, 0, 0, -0.1),
    )
    found = choose_bands(group(200, 0), wrong)
    assert (found.shallow, found.deep) == ((0, 1, 2), (7,))
    assert found.shallow_effects[0, 1, 2] == pytest.approx(0.1 / (0.1 / 3**0.5), rel=0.2)
    assert found.deep_effects[7,] == pytest.approx(1.0, rel=0.2)
    assert set(found.shallow_effects) == {tuple(range(n)) for n in (1, 2, 3, 4)}
    assert set(found.deep_effects) == {tuple(range(8 - n, 8)) for n in (1, 2, 3, 4)}
    assert found.n_traces == (200, 200)


def test_the_sign_is_that_of_the_failures():
    other_way = group(100, 1, lock_in=(-0.2,) * 8, thinking_share=(0.2,) * 8)
    found = choose_bands(group(100, 0), other_way)
    assert max(found.shallow_effects.values()) < 0 and max(found.deep_effects.values()) < 0


def test_equal_groups_have_no_effect_and_take_the_smaller_band():
    same = [make_diagnosis({"lock_in": [0.5] * 8}) for _ in range(3)]
    found = choose_bands(same, same)
    assert (found.shallow, found.deep) == ((0,), (7,))
    assert set(found.shallow_effects.values()) == {0.0}


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ComparisonError, match="at least 2 traces"):
        choose_bands(group(1, 0), group(5, 1))
    few = [make_diagnosis({"lock_in": [0.5] * 2}, layers=(0, 5), n_layers=8) for _ in range(2)]
    with pytest.raises(ComparisonError, match=r"needs all 8 layers; these maps hold \(0, 5\)"):
        choose_bands(few, few)
