import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays


def scales():
    from stepflow_tl.rendering import scales

    return scales


MAPS = arrays("float64", array_shapes(min_dims=3, max_dims=3, max_side=6), elements=st.floats(0, 1e6))


def test_three_decades_map_the_maximum_to_one_and_a_thousandth_to_zero():
    maps = torch.tensor([[[4.0, 0.4], [0.04, 0.004]], [[0.0, 0.0004], [0.4, 0.4]]], dtype=torch.float64)
    expected = torch.tensor([[[1, 2 / 3], [1 / 3, 0]], [[0, 0], [2 / 3, 2 / 3]]], dtype=torch.float64)
    torch.testing.assert_close(scales().log_decades(maps), expected)


def test_shares_of_all_a_tenth_and_a_thousandth_are_thirds():
    maps = torch.tensor([[5e-9, 0, 0], [90, 10, 0], [998.9, 1, 0.1]], dtype=torch.float64)[None]
    expected = torch.tensor([[1, 0, 0], [1 + math.log10(0.9) / 3, 2 / 3, 0], [1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(scales().share_decades(maps)[0], expected, atol=2e-4, rtol=0)


@given(MAPS)
def test_every_scale_stays_in_the_unit_interval_and_keeps_zeros(values):
    maps = torch.from_numpy(values)
    for scale in (scales().log_decades, scales().row_max, scales().row_shares, scales().share_decades):
        scaled = scale(maps)
        assert scaled.shape == maps.shape and scaled.dtype == maps.dtype
        assert torch.isfinite(scaled).all()
        assert (scaled >= 0).all() and (scaled <= 1 + 1e-9).all()
        assert (scaled[maps == 0] == 0).all()


@given(MAPS)
def test_the_log_scale_never_reorders_values(values):
    flat = torch.from_numpy(values).flatten()
    scaled = scales().log_decades(flat[None, None])[0, 0]
    assert (scaled[flat.argsort()].diff() >= 0).all()


@given(MAPS)
def test_rows_with_mass_sum_to_one_or_peak_at_one_and_rows_without_stay_zero(values):
    maps = torch.from_numpy(values)
    has_mass = maps.sum(-1) > 0
    torch.testing.assert_close(scales().row_shares(maps).sum(-1), has_mass.to(maps.dtype))
    torch.testing.assert_close(scales().row_max(maps).amax(-1), has_mass.to(maps.dtype))


@pytest.mark.parametrize("name", ["row_shares", "share_decades", "row_max", "log_decades"])
def test_a_map_of_zeros_stays_zeros_in_float32_too(name):
    zeros = torch.zeros(2, 3, 3)
    assert torch.equal(getattr(scales(), name)(zeros), zeros)
