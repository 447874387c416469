"""Pictures over depth, of one trace and of two groups: what is drawn is what the numbers say."""

import numpy as np
import pytest
import torch
from made_maps import make_saliency

from stepflow_tl.diagnosis import compare, diagnose
from stepflow_tl.errors import ComparisonError
from stepflow_tl.rendering import comparison_figure, profile_figure


def diagnosis_of(n_thinking: int, n_summary: int, *, n_layers: int = 12, layers=None, window: int = 0):
    saliency = make_saliency(n_thinking, n_summary, n_layers=n_layers)
    return diagnose(saliency if layers is None else saliency.select(layers), window=window)


def test_each_panel_draws_its_two_shares_over_depth():
    diagnosis = diagnosis_of(6, 3)
    thinking, summary = profile_figure(diagnosis).axes
    expected = ((thinking, ("lock_in", "question_share")), (summary, ("thinking_share", "self_share")))
    for axes, metrics in expected:
        assert len(axes.lines) == 2
        for line, metric in zip(axes.lines, metrics, strict=True):
            assert list(line.get_xdata()) == list(range(12))
            np.testing.assert_allclose(line.get_ydata(), getattr(diagnosis, metric).numpy())
            assert 0 < np.ptp(line.get_ydata()) <= 1
        assert len({line.get_linestyle() for line in axes.lines}) == 2


def test_layers_are_drawn_by_depth_whatever_their_stored_order():
    diagnosis = diagnosis_of(6, 3, layers=[9, 0, 4])
    line = profile_figure(diagnosis).axes[0].lines[0]
    assert list(line.get_xdata()) == [0, 4, 9]
    np.testing.assert_allclose(line.get_ydata(), diagnosis.lock_in[[1, 2, 0]].numpy())


@pytest.mark.parametrize(
    ("window", "label"), [(0, "on the step itself (lock-in)"), (2, "on itself and 2 before (lock-in)")]
)
def test_the_lock_in_line_says_which_steps_it_counts(window, label):
    axes = profile_figure(diagnosis_of(6, 3, window=window)).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [label, "on the question"]


def test_the_bottom_and_top_quarter_are_shaded_and_named():
    for axes in profile_figure(diagnosis_of(6, 3)).axes:
        spans = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches)
        assert spans == [(-0.5, 2.5), (8.5, 11.5)]
        assert [text.get_text() for text in axes.texts] == ["shallow", "deep"]


def test_a_trace_without_a_summary_says_so_instead_of_drawing():
    diagnosis = diagnosis_of(6, 0)
    thinking, summary = profile_figure(diagnosis).axes
    assert len(thinking.lines) == 2 and len(summary.lines) == 0
    assert diagnosis.reasons["thinking_share"] in [text.get_text() for text in summary.texts]


@pytest.mark.parametrize("width", [7.0, 3.3])
@pytest.mark.parametrize("n_layers", [1, 12, 80])
def test_no_text_overlaps_another_or_leaves_the_figure(width, n_layers):
    figure = profile_figure(diagnosis_of(6, 3, n_layers=n_layers), width=width)
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, axes._left_title, *axes.get_legend().get_texts()]
        low, high = axes.get_xlim()
        texts += [t for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
        texts += axes.get_yticklabels() + (list(axes.texts) if n_layers > 1 else [])
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text() and t.get_visible()]
    assert len(boxes) > 15
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, text
        assert box.y0 >= 0 and box.y1 <= figure.bbox.height, text
        for other, other_box in boxes[:i]:
            assert not box.padded(-0.5).overlaps(other_box.padded(-0.5)), (text, other)


def test_the_title_names_the_model_unless_one_is_given():
    diagnosis = diagnosis_of(6, 3)
    assert profile_figure(diagnosis).texts[0].get_text() == "Step-Saliency over depth: tiny"
    assert profile_figure(diagnosis, title="Mine").texts[0].get_text() == "Mine"


def made_comparison():
    def made(seed):
        sums = torch.rand(8, 2, 9, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return make_saliency(5, 3, sums=torch.tril(sums))

    groups = [[made(10 * side + i) for i in range(5)] for side in (0, 1)]
    return compare(*groups, n_bootstrap=200, n_permutations=200)


def test_means_above_and_differences_below_for_every_layer():
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
    comparison = made_comparison()
    values = sorted(effect.p_corrected for effect in comparison.of("lock_in"))
    for level in (0.0, values[4], 1.0):
        below = comparison_figure(comparison, ("lock_in",), level=level).axes[0]
        filled = {line.get_markerfacecolor(): list(line.get_xdata()) for line in below.lines[1:]}
        assert filled["0.1"] == [e.layer for e in comparison.of("lock_in") if e.p_corrected <= level]
        assert sorted(filled["0.1"] + filled["white"]) == list(range(8))


def test_what_has_no_layers_is_refused():
    with pytest.raises(ValueError, match="decay_slope.*not one per layer"):
        comparison_figure(made_comparison(), ("decay_slope",))
    with pytest.raises(ComparisonError, match="no metric 'lockin'"):
        comparison_figure(made_comparison(), ("lockin",))
    with pytest.raises(ValueError, match="no metric to draw"):
        comparison_figure(made_comparison(), ())
