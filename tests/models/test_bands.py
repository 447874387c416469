import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_tl.models import bands


def test_28_layers_have_the_bands_of_the_paper():
    assert list(bands.shallow_band(28)) == [0, 1, 2, 3, 4, 5, 6]
    assert list(bands.deep_band(28)) == [21, 22, 23, 24, 25, 26, 27]
    assert list(bands.deep_half(28)) == list(range(14, 28))


def test_30_layers_round_the_quarter_down():
    assert list(bands.shallow_band(30)) == [0, 1, 2, 3, 4, 5, 6]
    assert list(bands.deep_band(30)) == [23, 24, 25, 26, 27, 28, 29]


@given(st.integers(2, 500))
def test_bands_are_equal_disjoint_and_never_larger_than_a_quarter_unless_that_is_empty(n_layers):
    shallow, deep = bands.shallow_band(n_layers), bands.deep_band(n_layers)
    assert len(shallow) == len(deep) == max(1, n_layers // 4)
    assert not set(shallow) & set(deep)
    assert min(shallow) == 0 and max(deep) == n_layers - 1
    assert set(deep) <= set(bands.deep_half(n_layers))


def test_a_single_layer_is_shallow_and_deep():
    assert list(bands.shallow_band(1)) == list(bands.deep_band(1)) == list(bands.deep_half(1)) == [0]


@pytest.mark.parametrize("name", ["shallow_band", "deep_band", "deep_half"])
def test_a_model_without_layers_is_refused(name):
    with pytest.raises(ValueError, match="a model of 0 layers has no bands: n_layers must be at least 1"):
        getattr(bands, name)(0)
