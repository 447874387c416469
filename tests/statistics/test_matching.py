"""Matching against every way of pairing, on groups small enough to try them all."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflow_tl.statistics.matching import match_groups

CALIPERS = (1.0, 0.5)
members = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 8)), min_size=1, max_size=5)


def columns(group):
    return np.array(group, dtype=np.float64) * [1.0, 0.25]


def best(first, second):
    """(most pairs, least cost) over all injections of the smaller group into the larger."""
    gaps = np.abs(first[:, None] - second[None]) / CALIPERS
    allowed, cost = (gaps <= 1).all(2), (gaps**2).sum(2)
    if len(first) > len(second):
        allowed, cost = allowed.T, cost.T
    found = []
    for chosen in itertools.permutations(range(allowed.shape[1]), allowed.shape[0]):
        kept = [(i, j) for i, j in enumerate(chosen) if allowed[i, j]]
        found.append((-len(kept), sum(cost[pair] for pair in kept)))
    count, least = min(found)
    return -count, least


@settings(max_examples=200)
@given(first=members, second=members)
def test_no_other_pairing_has_more_pairs_or_closer_ones(first, second):
    a, b = columns(first), columns(second)
    found = match_groups(a, b, CALIPERS)
    n_pairs, cost = best(a, b)
    assert len(found.pairs) == n_pairs
    gaps = [(a[i] - b[j]) / CALIPERS for i, j in found.pairs]
    assert all((np.abs(gap) <= 1 + 1e-9).all() for gap in gaps)
    assert sum((gap**2).sum() for gap in gaps) == pytest.approx(cost)
    for side in zip(*found.pairs, strict=True):
        assert len(set(side)) == n_pairs
    assert found.n_dropped == (len(first) - n_pairs, len(second) - n_pairs)


def test_a_difference_in_length_is_at_most_the_caliper_after_matching():
    rng = np.random.default_rng(0)
    tokens = [np.log(rng.normal(mean, 40, 300).clip(50)) for mean in (200, 240)]
    wide, narrow = (match_groups(*(c[:, None] for c in tokens), [np.log(ratio)]) for ratio in (1.05, 1.005))
    assert wide.imbalance_before[0] < -0.8
    assert abs(narrow.imbalance[0]) < 0.05 < abs(wide.imbalance[0]) < 0.4
    assert 100 < len(narrow.pairs) < len(wide.pairs) < 300


def test_groups_without_anything_in_common_give_no_pair():
    found = match_groups(np.array([[0.0]]), np.array([[5.0], [6.0]]), [1.0])
    assert found.pairs == () and found.n_dropped == (1, 2)
    assert np.isnan(found.imbalance[0])


@pytest.mark.parametrize(
    ("first", "calipers", "message"),
    [
        ([[1.0]], [1.0, 2.0], "2 calipers for 1 and 1 covariates"),
        ([[1.0]], [0.0], "expected positive numbers"),
        (np.empty((0, 1)), [1.0], "groups of 0 and 1 members"),
        ([[np.nan]], [1.0], "is not finite"),
    ],
)
def test_what_cannot_be_matched_is_refused(first, calipers, message):
    with pytest.raises(ValueError, match=message):
        match_groups(np.array(first, dtype=np.float64), np.array([[1.0]]), calipers)


strata = st.lists(st.sampled_from(["a", "b", 3]), min_size=5, max_size=5)


@settings(max_examples=100)
@given(first=members, second=members, own=strata, other=strata)
def test_strata_are_matched_each_by_itself(first, second, own, other):
    a, b = columns(first), columns(second)
    own, other = own[: len(a)], other[: len(b)]
    found = match_groups(a, b, CALIPERS, strata=(own, other))
    assert all(own[i] == other[j] for i, j in found.pairs)
    pairs, cost = 0, 0.0
    for name in set(own) & set(other):
        inside, outside = (np.array([each == name for each in names]) for names in (own, other))
        n, least = best(a[inside], b[outside])
        pairs, cost = pairs + n, cost + least
    assert len(found.pairs) == pairs
    gaps = [(a[i] - b[j]) / CALIPERS for i, j in found.pairs]
    assert sum((gap**2).sum() for gap in gaps) == pytest.approx(cost)


def test_strata_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"1 and 2 strata for groups of \(2, 2\)"):
        match_groups(np.zeros((2, 1)), np.zeros((2, 1)), [1.0], strata=(["a"], ["a", "a"]))
