"""A map checked by the cuts of its own strongest pairs: which are cut, what is counted, what is refused."""

import pytest
import torch
from made_maps import make_knockout, make_saliency

from stepflow_tl import step_knockout, step_saliency
from stepflow_tl.causal.spot_check import spot_check, spot_pairs
from stepflow_tl.errors import ComparisonError


def saliency_of(rows):
    """One layer and head with these rows of earlier steps; steps Q, T1 ..., S1, five tokens each."""
    n = len(rows)
    sums = torch.zeros(1, 1, n, n, dtype=torch.float64)
    for query, row in enumerate(rows):
        sums[0, 0, query, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return make_saliency(n - 2, 1, sums=sums)


ROWS = ([], [1.0], [3.0, 1.0], [1.0, 5.0, 4.0], [0.0, 0.0, 0.0, 0.0], [1.0, 8.0, 2.0, 1.0, 1.0])


def test_the_strongest_source_of_a_step_is_cut_and_a_weak_one_near_it():
    # T2: .75 of Q. T3: half of T1, and T2 has too much for a control. T4 has no mass, T1 one source.
    # Of two equally near, the weaker is the control (S1).
    assert spot_pairs(saliency_of(ROWS)) == [(2, 0, 1), (5, 1, 0), (3, 1, 0)]
    assert spot_pairs(saliency_of(ROWS), n_pairs=1) == [(2, 0, 1)]


def test_without_a_weak_source_the_weakest_is_the_control():
    assert spot_pairs(saliency_of(([], [1.0], [1.0, 1.0], [5.0, 4.0, 3.0]))) == [(2, 0, 1), (3, 0, 2)]


def test_counts_and_words_are_those_of_the_effects():
    saliency = saliency_of(ROWS)
    effects = torch.zeros(6, 6, dtype=torch.float64)
    effects[2, 0], effects[2, 1] = 2.0, 0.1
    effects[5, 1], effects[5, 0] = -0.7, 0.9  # a cut that helps is a use, too
    effects[3, 1], effects[3, 0] = 0.3, 0.2
    check = spot_check(saliency, make_knockout(saliency, effects=effects))
    assert (check.n_used, check.n_controls_used, check.n_ahead, check.n_readers) == (2, 1, 2, 3)
    assert [step.query for step in check.steps] == ["T2", "S1", "T3"]
    assert check.steps[0].strongest.share == pytest.approx(0.75) and check.steps[1].control.source == "Q"
    assert "by 6 cuts: 2 of the map's 3 strongest sources have an effect of 0.5 nats or more" in check.line
    assert "(median 0.7000), 1 of 3 weak ones" in check.line and "larger effect in 2 of 3 steps" in check.line
    assert check.line in str(check) and "strongest" in str(check) and "<table" in check._repr_html_()
    stricter = spot_check(saliency, make_knockout(saliency, effects=effects), threshold=1.0)
    assert stricter.n_used == 1 and stricter.n_controls_used == 0


def test_the_model_gives_the_same_as_a_knockout_of_all_pairs(tiny_model, tiny_trace):
    model = tiny_model()
    saliency = step_saliency(model, tiny_trace)
    own, given = (spot_check(saliency, by) for by in (model, step_knockout(model, tiny_trace)))
    assert len(own.steps) == 3
    for ours, theirs in zip(own.steps, given.steps, strict=True):
        assert (ours.query, ours.strongest.source) == (theirs.query, theirs.strongest.source)
        assert ours.strongest.effect == pytest.approx(theirs.strongest.effect, abs=1e-5)
        assert ours.control.effect == pytest.approx(theirs.control.effect, abs=1e-5)
        assert ours.control.effect != 0


def test_what_cannot_be_checked_is_refused():
    saliency = saliency_of(ROWS)
    with pytest.raises(ComparisonError, match="different traces"):
        spot_check(saliency, make_knockout(make_saliency(6, 1)))
    measured = torch.ones(6, 6, dtype=torch.bool).tril(-1)
    measured[3, 1] = False
    with pytest.raises(
        ComparisonError, match=r"not measured 1 of the 6 pairs .* \('T3', 'T1'\): pass the model"
    ):
        spot_check(saliency, make_knockout(saliency, measured=measured))
    with pytest.raises(ComparisonError, match="n_pairs is 0"):
        spot_pairs(saliency, n_pairs=0)
    with pytest.raises(ComparisonError, match="0 thinking or summary steps"):
        spot_pairs(saliency_of(([], [1.0])))
