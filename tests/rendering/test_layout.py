import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from made_maps import make_trace

from stepflow_tl.rendering import layout


def runs_of(n_thinking: int, n_summary: int):
    return layout.segment_runs(make_trace(n_thinking, n_summary).steps)


def test_runs_and_boundaries_follow_the_segments():
    runs = runs_of(20, 3)
    assert [(run.segment.name, run.start, run.end) for run in runs] == [
        ("QUESTION", 0, 1),
        ("THINKING", 1, 21),
        ("SUMMARY", 21, 24),
    ]
    assert layout.boundaries(runs) == [0.5, 20.5]
    assert runs[1].centre == 10.5


def test_a_trace_without_thinking_or_summary_has_no_boundary():
    assert layout.boundaries(runs_of(0, 0)) == []


def test_all_labels_stand_where_they_fit():
    assert layout.thin_ticks(runs_of(5, 2), 0.9) == list(range(8))


def test_thinned_labels_are_segment_starts_and_round_step_numbers():
    labels = [step.label for step in make_trace(112, 7).steps]
    shown = [labels[i] for i in layout.thin_ticks(runs_of(112, 7), 6.0)]
    assert shown == ["Q", *(f"T{n}" for n in range(10, 101, 10)), "S1"]


@given(st.integers(0, 300), st.integers(0, 40), st.floats(0.1, 60))
def test_thinned_labels_keep_their_distance_and_always_name_the_first_step(n_thinking, n_summary, min_gap):
    ticks = layout.thin_ticks(runs_of(n_thinking, n_summary), min_gap)
    assert ticks[0] == 0 and ticks == sorted(set(ticks)) and ticks[-1] <= n_thinking + n_summary
    assert all(later - earlier >= min_gap for earlier, later in zip(ticks, ticks[1:], strict=False))


@given(st.integers(0, 300), st.integers(0, 40), st.floats(0.01, 4))
def test_segment_names_never_overlap_and_stay_inside_where_initials_fit(n_thinking, n_summary, char_width):
    runs, n_steps = runs_of(n_thinking, n_summary), 1 + n_thinking + n_summary
    placed = layout.margin_names(runs, char_width, n_steps)
    assert len(placed) == len(runs)
    ends = [(at - len(name) * char_width / 2, at + len(name) * char_width / 2) for name, at in placed]
    assert all(left[1] <= right[0] + 1e-9 for left, right in zip(ends, ends[1:], strict=False))
    if sum(len(name) for name, _ in placed) * char_width <= n_steps:
        assert ends[0][0] >= -0.5 - 1e-9 and ends[-1][1] <= n_steps - 0.5 + 1e-9


def test_a_segment_too_short_for_its_name_carries_its_initial():
    names = [name for name, _ in layout.margin_names(runs_of(112, 7), 4.0, 120)]
    assert names == ["Q", "Thinking", "S"]


@pytest.mark.parametrize(("n_layers", "expected"), [(30, (0, 6, 12, 17, 23, 29)), (4, (0, 1, 2, 3))])
def test_layers_are_spread_over_depth_with_both_ends(n_layers, expected):
    assert layout.evenly_over_depth(range(n_layers), 6) == expected


MAPS = arrays("float64", array_shapes(min_dims=3, max_dims=3, max_side=6), elements=st.floats(0, 1e6))


def test_three_decades_map_the_maximum_to_one_and_a_thousandth_to_zero():
    maps = torch.tensor([[[4.0, 0.4], [0.04, 0.004]], [[0.0, 0.0004], [0.4, 0.4]]], dtype=torch.float64)
    expected = torch.tensor([[[1, 2 / 3], [1 / 3, 0]], [[0, 0], [2 / 3, 2 / 3]]], dtype=torch.float64)
    torch.testing.assert_close(layout.log_decades(maps), expected)


def test_shares_of_all_a_tenth_and_a_thousandth_are_thirds():
    maps = torch.tensor([[5e-9, 0, 0], [90, 10, 0], [998.9, 1, 0.1]], dtype=torch.float64)[None]
    expected = torch.tensor([[1, 0, 0], [1 + math.log10(0.9) / 3, 2 / 3, 0], [1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(layout.share_decades(maps)[0], expected, atol=2e-4, rtol=0)


@given(MAPS)
def test_every_scale_stays_in_the_unit_interval_and_keeps_zeros(values):
    maps = torch.from_numpy(values)
    for scale in (layout.log_decades, layout.row_max, layout.row_shares, layout.share_decades):
        scaled = scale(maps)
        assert scaled.shape == maps.shape and scaled.dtype == maps.dtype
        assert torch.isfinite(scaled).all()
        assert (scaled >= 0).all() and (scaled <= 1 + 1e-9).all()
        assert (scaled[maps == 0] == 0).all()


@given(MAPS)
def test_the_log_scale_never_reorders_values(values):
    flat = torch.from_numpy(values).flatten()
    scaled = layout.log_decades(flat[None, None])[0, 0]
    assert (scaled[flat.argsort()].diff() >= 0).all()


@given(MAPS)
def test_rows_with_mass_sum_to_one_or_peak_at_one_and_rows_without_stay_zero(values):
    maps = torch.from_numpy(values)
    has_mass = maps.sum(-1) > 0
    torch.testing.assert_close(layout.row_shares(maps).sum(-1), has_mass.to(maps.dtype))
    torch.testing.assert_close(layout.row_max(maps).amax(-1), has_mass.to(maps.dtype))


@pytest.mark.parametrize("name", ["row_shares", "share_decades", "row_max", "log_decades"])
def test_a_map_of_zeros_stays_zeros_in_float32_too(name):
    zeros = torch.zeros(2, 3, 3)
    assert torch.equal(getattr(layout, name)(zeros), zeros)
