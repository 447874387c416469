"""Matched pairs beside the raw comparison: what is length alone is gone there, what is not stays."""

import json
import random

import numpy as np
import pytest
from diagnostic_maps import make_diagnosis, random_saliency

from stepflow_tl import diagnosis
from stepflow_tl.diagnosis import Diagnosis, diagnose
from stepflow_tl.errors import ComparisonError

FAST = dict(n_bootstrap=200, n_permutations=999)


def compare(*args, **options):
    return diagnosis.compare(*args, **{**FAST, **options})


def traces(steps, seed, *, shift=0.0, tokens_a_step=20.0):
    """Diagnoses whose lock-in is a share of the steps, as a mechanical share is, plus `shift` and noise."""
    rng = np.random.default_rng(seed)
    found = []
    for n in steps:
        lock_in = 1 / n + shift + 0.01 * rng.normal(size=4)
        n_tokens = int(n * tokens_a_step + rng.integers(0, 4))
        found.append(
            make_diagnosis(
                {"lock_in": lock_in, "context_reach": 1 - lock_in}, n_thinking=int(n), n_tokens=n_tokens
            )
        )
    return found


def lengths(low, high, n, seed):
    return np.random.default_rng(seed).integers(low, high, size=n)


def lock_in(comparison):
    return next(effect for effect in comparison.headline if effect.metric == "lock_in")


@pytest.mark.parametrize("match_on", [("steps", "tokens"), ["tokens"]])
def test_a_difference_that_is_length_alone_vanishes_in_matched_pairs(match_on):
    right, wrong = traces(lengths(4, 10, 60, 0), 1), traces(lengths(6, 13, 60, 2), 3)
    found = compare(right, wrong, match_on=match_on)
    raw, matched = lock_in(found), lock_in(found.matched)
    assert raw.p_corrected < 0.01 and raw.difference > 0.03
    assert matched.p_value > 0.05 and abs(matched.difference) < raw.difference / 10
    how = found.matched.matching
    assert how.n_pairs >= 20 and how.n_dropped == (60 - how.n_pairs, 60 - how.n_pairs)
    assert all(
        abs(after) < abs(before) / 3
        for before, after in zip(how.imbalance_before, how.imbalance, strict=True)
    )
    assert found.matched.n_traces == (how.n_pairs, how.n_pairs) and matched.n == how.n_pairs
    first, other = found.matched.thinking_steps
    assert abs(first - other) < 0.5 and abs(found.thinking_steps[0] - found.thinking_steps[1]) > 2


def test_within_one_step_a_part_of_the_difference_can_stay_and_the_imbalance_says_so():
    """The most pairs that there are: many a right trace is matched with a wrong one a step longer."""
    right, wrong = traces(lengths(4, 10, 60, 0), 1), traces(lengths(6, 13, 60, 2), 3)
    found = compare(right, wrong, match_on=("steps",))
    raw, matched = lock_in(found), lock_in(found.matched)
    assert 0 < matched.difference < raw.difference / 3
    ((before,), (after,)) = found.matched.matching.imbalance_before, found.matched.matching.imbalance
    assert before < -1 and before / 2 < after < -0.1


def test_a_difference_that_is_not_length_stays():
    right, wrong = traces(lengths(4, 10, 60, 0), 1, shift=-0.05), traces(lengths(6, 13, 60, 2), 3)
    matched = lock_in(compare(right, wrong, match_on=("steps", "tokens")).matched)
    assert matched.difference == pytest.approx(-0.05, abs=0.01)
    assert matched.p_corrected < 0.01 and matched.high < 0


def test_the_raw_comparison_is_what_it_is_without_matching():
    right, wrong = traces(lengths(4, 10, 20, 0), 1), traces(lengths(4, 10, 20, 2), 3)
    raw = compare(right, wrong)
    both = compare(right, wrong, match_on=("steps",))
    assert raw.matched is None and raw.matching is None and both.matching is None
    assert both.to_json() == {**raw.to_json(), "matched": both.matched.to_json()}
    assert both.matched.matched is None and both.matched.pairing is None and both.matched.is_paired


def test_matched_pairs_are_compared_as_pairs_of_the_traces_matched():
    """Three pairs that can only be the right ones, worked out by hand."""
    right, wrong = traces([4, 8, 12, 40], 1), traces([12, 4, 8, 90, 91], 2)
    found = compare(right, wrong, match_on=("steps",)).matched
    by_hand = compare(right[:3], [wrong[1], wrong[2], wrong[0]], pair_by=([1, 2, 3], [1, 2, 3]))
    assert found.by_layer == by_hand.by_layer and found.headline == by_hand.headline
    assert (found.matching.n_pairs, found.matching.n_dropped) == (3, (1, 2))


def test_with_pairs_only_traces_of_one_problem_are_matched_and_averaged_within_it():
    right, wrong = traces([4, 8, 12, 12, 5], 1), traces([12, 8, 12, 13, 40], 2)
    ids = (["a", "b", "c", "c", "d"], ["a", "b", "c", "c", "d"])
    found = compare(right, wrong, pair_by=ids, match_on=("steps",))
    assert (found.pairing.n_pairs, found.pairing.n_averaged) == (4, 1)
    matched = found.matched  # "a" and "d" are too far apart
    assert (matched.matching.n_pairs, matched.matching.n_dropped) == (3, (2, 2))
    assert (matched.pairing.n_pairs, matched.pairing.n_dropped, matched.pairing.n_averaged) == (2, 0, 1)
    kept = (["b", "c", "c"], ["b", "c", "c"])
    assert matched.headline == compare(right[1:4], wrong[1:4], pair_by=kept).headline
    assert "averaged within 2 problems; p from sign flips" in matched.table()


@pytest.mark.parametrize("paired", [False, True])
def test_the_order_of_the_traces_changes_nothing(paired):
    """Many traces have equal lengths, so many matchings are equally good."""
    right, wrong = traces(lengths(4, 6, 30, 0), 1), traces(lengths(4, 6, 30, 2), 3)
    ids = [i % 12 for i in range(30)]
    options = dict(match_on=("steps",), n_permutations=99, n_bootstrap=50)
    first = compare(right, wrong, pair_by=(ids, ids) if paired else None, **options).to_json()
    order = list(range(30))
    random.Random(0).shuffle(order)
    shuffled = [ids[i] for i in order]
    pair_by = (shuffled, ids) if paired else None
    assert compare([right[i] for i in order], wrong, pair_by=pair_by, **options).to_json() == first


def test_the_table_says_what_was_matched_dropped_and_balanced():
    right, wrong = traces([4, 8, 12, 40], 1), traces([12, 4, 8, 90, 91], 2)
    found = compare(right, wrong, match_on=("steps", "tokens"), names=("right", "wrong"))
    text = str(found)
    assert text.index("right (4 traces) minus wrong (5 traces)") < text.index(
        "right (3 traces) minus wrong (3 traces): tiny, objective per_token, matched pairs"
    )
    assert "matched on thinking steps (within 1) and tokens (within 10 %): 3 pairs; " in text
    assert "without a partner and left out: 1 right, 2 wrong" in text
    assert "difference before and after matching: thinking steps -0." in text
    assert f"thinking steps {found.matched.matching.imbalance_before[0]:.2f} to 0.00, tokens -" in text
    assert "d_z" in text and "Hedges" in text
    assert found.table() in text and found.matched.full_table() in found.full_table()
    assert repr(found.matched).startswith(
        "Comparison('right' (3 traces) - 'wrong' (3 traces), 3 matched pairs"
    )
    assert found._repr_html_().count("<table") == 2


def test_json_is_plain_with_the_matched_pairs_in_it():
    right, wrong = traces([4, 8, 40], 1), traces([4, 8, 90], 2)
    for each in (right, wrong):
        each[0] = traces([8], 5)[0]  # no spread of steps is left in the pairs
    found = compare(right, wrong, match_on=("steps",)).to_json()
    text = json.dumps(found, allow_nan=False)
    matching = json.loads(text)["matched"]["matching"]
    assert matching["covariates"] == ["thinking steps"] and matching["calipers"] == ["within 1"]
    assert matching["n_pairs"] == 2 and matching["n_dropped"] == [1, 1] and matching["imbalance"] == [0.0]
    assert found["matching"] is None


def test_an_imbalance_without_spread_is_no_number_in_json():
    right, wrong = traces([4, 4], 1), traces([5, 5], 2)
    how = compare(right, wrong, match_on=("steps",)).matched.matching
    assert how.imbalance == (float("-inf"),)
    assert how.to_json()["imbalance"] == [None] and "inf" in how.lines(("a", "b"))[1]


def test_tokens_that_a_diagnosis_does_not_know_are_refused_and_steps_still_match():
    right, wrong = traces([4, 8, 12], 1), traces([4, 8, 12], 2)
    old = {**wrong[1].to_json()}
    del old["n_tokens"]
    wrong[1] = Diagnosis.from_json(old)
    assert wrong[1].n_tokens is None and Diagnosis.from_json(right[0].to_json()).n_tokens == right[0].n_tokens
    message = (
        r"1 of the 3 traces of group 'wrong' do not say how many tokens they have .*match on steps alone"
    )
    with pytest.raises(ComparisonError, match=message):
        compare(right, wrong, match_on=("steps", "tokens"))
    assert compare(right, wrong, match_on=("steps",)).matched.matching.n_pairs == 3


def test_a_diagnosis_says_how_many_tokens_its_trace_has():
    saliency = random_saliency("QTTTS", 0)
    assert diagnose(saliency).n_tokens == len(saliency.trace)


def test_groups_that_have_no_length_in_common_are_refused():
    with pytest.raises(
        ComparisonError,
        match=r"matching on thinking steps \(within 1\) leaves 1 pairs of 3 correct and 2 wrong",
    ):
        compare(traces([4, 8, 12], 1), traces([4, 30], 2), match_on=("steps",))


@pytest.mark.parametrize("match_on", ["steps", (), ("length",), ("steps", "characters")])
def test_what_cannot_be_matched_on_is_refused(match_on):
    with pytest.raises(ValueError, match="match_on is .*: expected some of 'steps', 'tokens'"):
        compare(traces([4, 8], 1), traces([4, 8], 2), match_on=match_on)
