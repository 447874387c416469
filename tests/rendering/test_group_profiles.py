"""Pictures of two groups: what is drawn is what the comparison says."""

import numpy as np
import pytest
import torch
from made_maps import make_saliency


def made_comparison():
    from stepflow_tl.diagnosis import compare

    def made(seed):
        sums = torch.rand(8, 2, 9, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return make_saliency(5, 3, sums=torch.tril(sums))

    groups = [[made(10 * side + i) for i in range(5)] for side in (0, 1)]
    return compare(*groups, n_bootstrap=200, n_permutations=200)


def test_means_above_and_differences_below_for_every_layer():
    from stepflow_tl.rendering import comparison_figure

    comparison = made_comparison()
    figure = comparison_figure(comparison, ("lock_in", "self_share"))
    assert len(figure.axes) == 4
    for metric, below, above in zip(
        ("lock_in", "self_share"), figure.axes[::2], figure.axes[1::2], strict=True
    ):
        effects = comparison.of(metric)
        first, other = above.lines[:2]
        assert list(first.get_xdata()) == list(range(8))
        np.testing.assert_allclose(first.get_ydata(), [effect.mean for effect in effects])
        np.testing.assert_allclose(other.get_ydata(), [effect.other_mean for effect in effects])
        assert [text.get_text() for text in above.get_legend().get_texts()] == ["correct", "wrong"]
        spans = np.array(below.collections[0].get_segments())[:, :, 1]
        np.testing.assert_allclose(spans, [(effect.low, effect.high) for effect in effects])


def test_a_filled_marker_is_a_layer_that_passes_the_correction():
    from stepflow_tl.rendering import comparison_figure

    comparison = made_comparison()
    values = sorted(effect.p_corrected for effect in comparison.of("lock_in"))
    for level in (0.0, values[4], 1.0):
        below = comparison_figure(comparison, ("lock_in",), level=level).axes[0]
        filled = {line.get_markerfacecolor(): list(line.get_xdata()) for line in below.lines[1:]}
        assert filled["0.1"] == [e.layer for e in comparison.of("lock_in") if e.p_corrected <= level]
        assert sorted(filled["0.1"] + filled["white"]) == list(range(8))


def test_what_has_no_layers_is_refused():
    from stepflow_tl.errors import ComparisonError
    from stepflow_tl.rendering import comparison_figure

    with pytest.raises(ValueError, match="decay_slope.*not one a layer"):
        comparison_figure(made_comparison(), ("decay_slope",))
    with pytest.raises(ComparisonError, match="no metric 'lockin'"):
        comparison_figure(made_comparison(), ("lockin",))
    with pytest.raises(ValueError, match="no metric to draw"):
        comparison_figure(made_comparison(), ())
