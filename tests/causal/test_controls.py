"""Placebos are like what they stand for in one respect, differ in the other, and are drawn from the seed."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from made_maps import make_trace

from stepflow_tl.causal import step_patching
from stepflow_tl.causal.controls import (
    norm_matched_activations,
    position_matched_pairs,
    position_matched_sources,
    random_sources,
    random_step_pairs,
)


def index_of(trace):
    return {step.label: step.index for step in trace.steps}


def all_pairs(trace):
    return [(i.label, j.label) for i in trace.steps for j in trace.steps[: i.index + 1]]


@given(st.integers(1, 6), st.integers(0, 3), st.data())
def test_pairs_keep_what_they_match_and_avoid_what_is_tested(n_thinking, n_summary, data):
    trace = make_trace(n_thinking, n_summary)
    index, segment = index_of(trace), {step.label: step.segment for step in trace.steps}
    tested = data.draw(st.lists(st.sampled_from(all_pairs(trace)), max_size=4, unique=True))
    seed = data.draw(st.integers(0, 2**32))
    same_query = random_step_pairs(trace, tested, seed=seed)
    same_lag = position_matched_pairs(trace, tested, seed=seed)
    assert same_query == random_step_pairs(trace, tested, seed=seed)
    for placebos in (same_query, same_lag):
        assert set(placebos) <= set(tested) and not set(placebos.values()) & set(tested)
    for (query, key), (placebo_query, placebo_key) in same_query.items():
        assert placebo_query == query and placebo_key != key
        assert index[placebo_key] < index[query]
    for (query, key), (placebo_query, placebo_key) in same_lag.items():
        assert index[placebo_query] - index[placebo_key] == index[query] - index[key]
        assert placebo_query != query and segment[placebo_query] == segment[query]
    for query, key in set(tested) - set(same_query):
        others = {(query, step.label) for step in trace.steps[: index[query]]} - {(query, key)}
        assert others <= set(tested), "left out only where nothing else is earlier"


def test_every_candidate_is_drawn_by_some_seed():
    trace = make_trace(4, 1)
    drawn = {random_step_pairs(trace, [("T4", "T1")], seed=seed)["T4", "T1"] for seed in range(60)}
    assert drawn == {("T4", "Q"), ("T4", "T2"), ("T4", "T3")}
    drawn = {position_matched_pairs(trace, [("T3", "T2")], seed=seed)["T3", "T2"] for seed in range(60)}
    assert drawn == {("T1", "Q"), ("T2", "T1"), ("T4", "T3")}
    drawn = {random_sources(trace, ["T2"], seed=seed)["T2"] for seed in range(60)}
    assert drawn == {"T1", "T3", "T4"}
    drawn = {position_matched_sources(trace, ["T2"], seed=seed)["T2"] for seed in range(60)}
    assert drawn == {"T1", "T3"}


def test_what_has_no_placebo_is_left_out():
    trace = make_trace(2, 1)
    assert random_step_pairs(trace, [("T1", "Q"), ("Q", "Q")], seed=0) == {}
    assert position_matched_pairs(trace, [("S1", "Q")], seed=0) == {}
    assert random_sources(trace, ["Q", "S1"], seed=0) == {}
    assert position_matched_sources(trace, ["Q", "T1", "T2"], seed=0) == {"T1": "T2", "T2": "T1"}


def test_sources_go_into_step_patching(tiny_model, right_trace, wrong_trace):
    options = dict(metric="S1", alignment="mean", layers=[1], steps=["T1", "T2"])
    sources = random_sources(right_trace, ["T1", "T2"], seed=0)
    real = step_patching(tiny_model(), right_trace, wrong_trace, **options)
    placebo = step_patching(tiny_model(), right_trace, wrong_trace, sources=sources, **options)
    assert {m.corrupted.label: m.clean.label for m in placebo.matches} == sources
    assert not torch.allclose(real.effects, placebo.effects, rtol=1e-2)


def test_norm_matched_activations_move_as_far_per_head_and_only_where_something_moved():
    generator = torch.Generator().manual_seed(0)
    base, moved = (torch.randn(5, 3, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    moved[2] = base[2]
    placebo = norm_matched_activations(base, moved, seed=1, layer=2, position=3)
    assert torch.allclose((placebo - base).norm(dim=-1), (moved - base).norm(dim=-1))
    assert torch.equal(placebo[2], base[2])
    cosine = torch.cosine_similarity((placebo - base).flatten(0, 1), (moved - base).flatten(0, 1), dim=-1)
    assert cosine.abs().max() < 0.95
    assert torch.equal(placebo, norm_matched_activations(base, moved, seed=1, layer=2, position=3))
    for other in (
        dict(seed=2, layer=2, position=3),
        dict(seed=1, layer=3, position=3),
        dict(seed=1, layer=2),
    ):
        assert not torch.allclose(placebo, norm_matched_activations(base, moved, **other))
