import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_maps import make_saliency


def quantised(maps, bits):
    from stepflow_tl.rendering.report.quantise import quantise

    return quantise(maps, bits)


@pytest.mark.parametrize(("bits", "stated"), [(16, 0.00015), (8, 0.0185)])
@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 12), level=st.floats(-20, 20), n=st.integers(1, 9))
def test_no_cell_errs_by_more_than_stated(bits, stated, seed, spread, level, n):
    generator = torch.Generator().manual_seed(seed)
    decades = spread * torch.rand(3, n, n, generator=generator, dtype=torch.float64)
    maps = (10.0 ** (level - decades)).tril()
    found = quantised(maps, bits)
    assert found.relative_error <= stated
    restored = torch.from_numpy(found.restored())
    floor = maps.amax(-1, keepdim=True) * 10.0**-found.decades
    # float32 and rounding at the last decade's end
    kept = maps > floor * 1.05
    error = (restored / maps - 1).abs()[kept]
    assert error.numel() >= 3 * n and float(error.max()) <= found.relative_error + 1e-6
    assert bool((restored[maps < floor * 0.9] == 0).all())


@pytest.mark.parametrize("bits", [8, 16])
def test_a_row_s_largest_value_is_exact_and_zero_stays_zero(bits):
    maps = torch.tensor([[[0.0, 9.0, 9.0], [3.0, 0.0, 9.0], [0.125, 0.0, 1e-30]]], dtype=torch.float64)
    restored = quantised(maps, bits).restored()[0]
    np.testing.assert_array_equal(restored, [[0, 0, 0], [3, 0, 0], [0.125, 0, 0]])


def test_codes_take_the_bytes_they_say_and_cells_go_row_by_row():
    maps = make_saliency(1, 1).head_mean()
    for bits in (8, 16):
        found = quantised(maps, bits)
        assert found.codes.dtype.itemsize * 8 == bits and found.codes.shape == (8, 6)
        assert found.row_max.dtype == np.dtype("<f4")
    assert found.codes[0, 0] == 2**16 - 1  # the only cell of its row
    assert [int(codes.max()) for codes in (found.codes[0, 1:3], found.codes[0, 3:])] == [2**16 - 1] * 2
