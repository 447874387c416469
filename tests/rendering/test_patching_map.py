"""The patching map: layers upward, steps to the right, a scale that is symmetric about 0."""

import numpy as np
from made_maps import make_patching, make_saliency

from stepflow_tl.rendering import patching_figure


def test_the_picture_shows_layers_upward_and_steps_to_the_right():
    patching = make_patching(make_saliency(3, 1, n_layers=2), ["T1", "S1"])
    axes = patching_figure(patching).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), patching.effects.flip(0).numpy())
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "1"] and not axes.yaxis_inverted()
    assert [t.get_text() for t in axes.get_xticklabels()] == ["T1", "S1"]
    norm = axes.images[0].norm
    assert norm.vmax == -norm.vmin == float(patching.effects.abs().max())


def test_labels_are_thinned_where_steps_are_many():
    axes = patching_figure(make_patching(make_saliency(112, 7)), width=3.3).axes[0]
    assert 10 < len(axes.get_xticklabels()) < 60 and len(axes.get_yticklabels()) == 8
