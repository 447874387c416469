import builtins
import gc
import weakref

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from made_maps import labels_of, make_saliency

from stepflow_tl import errors
from stepflow_tl.rendering import step_map_figure


def panels_of(figure):
    return [axes for axes in figure.axes if axes.images]


def colour_bar_of(figure):
    (bar,) = [axes for axes in figure.axes if not axes.images]
    return bar


def boundary_lines(axes):
    return [line for line in axes.lines if line.get_clip_on()]


def test_few_layers_get_a_panel_each_and_one_colour_bar():
    figure = step_map_figure(make_saliency(20, 3, n_layers=4))
    assert [axes.get_title() for axes in panels_of(figure)] == [f"layer {i}" for i in range(4)]
    assert len(figure.axes) == 5


def test_many_layers_are_thinned_over_depth_and_the_title_says_so():
    figure = step_map_figure(make_saliency(5, 1, n_layers=30))
    assert [axes.get_title() for axes in panels_of(figure)] == [f"layer {i}" for i in (0, 6, 12, 17, 23, 29)]
    assert any("6 of 30 layers, evenly over depth" in text.get_text() for text in figure.texts)


def test_named_layers_are_drawn_in_their_order_without_a_claim_about_selection():
    figure = step_map_figure(make_saliency(5, 1), layers=[7, 2], columns=1, title="Mine")
    assert [axes.get_title() for axes in panels_of(figure)] == ["layer 7", "layer 2"]
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == "Mine" and "evenly" not in " ".join(texts)


@pytest.mark.parametrize(("n_thinking", "n_summary"), [(20, 3), (112, 7)])
def test_boundaries_lie_between_the_segments_and_only_under_the_diagonal(n_thinking, n_summary):
    n = 1 + n_thinking + n_summary
    for axes in panels_of(step_map_figure(make_saliency(n_thinking, n_summary))):
        corners = [[tuple(point) for point in line.get_xydata()] for line in boundary_lines(axes)]
        assert corners == [[(-0.5, at), (at, at), (at, n - 0.5)] for at in (0.5, n_thinking + 0.5)]


def test_a_boundary_line_covers_at_most_a_third_of_a_cell():
    figure = step_map_figure(make_saliency(112, 7))
    axes = panels_of(figure)[0]
    cell_points = axes.get_position().width * figure.get_figwidth() * 72 / 120
    assert all(0 < line.get_linewidth() <= 0.36 * cell_points for line in boundary_lines(axes))


def test_cells_above_the_diagonal_are_masked_and_no_others():
    for axes in panels_of(step_map_figure(make_saliency(20, 3))):
        drawn = axes.images[0].get_array()
        assert np.array_equal(np.ma.getmaskarray(drawn), np.triu(np.ones((24, 24), bool), k=1))


def test_row_scales_draw_shares_that_sum_to_one():
    saliency = make_saliency(5, 1, n_layers=2)
    figure = step_map_figure(saliency, normalise="row_linear")
    maps = saliency.head_mean()
    expected = maps / maps.sum(-1, keepdim=True)
    for layer, axes in enumerate(panels_of(figure)):
        np.testing.assert_allclose(axes.images[0].get_array().filled(0), expected[layer].numpy())
        assert axes.images[0].get_clim() == (0, 1)
    assert "share of the row's\nmean saliency" in colour_bar_of(figure).get_ylabel()


@pytest.mark.parametrize(
    ("pooling", "label"),
    [
        ("mean", "mean saliency\n(nats per token pair)"),
        ("causal_mean", "mean saliency (nats\nper causal token pair)"),
        ("sum", "summed saliency\n(nats)"),
    ],
)
def test_the_log_scale_shares_one_maximum_and_names_the_pooled_quantity(pooling, label):
    saliency = make_saliency(5, 1)
    figure = step_map_figure(saliency, layers=[1, 4], normalise="log", pooling=pooling)
    largest = float(saliency.head_mean(pooling, layers=[1, 4]).max())
    for axes in panels_of(figure):
        assert axes.images[0].get_clim() == pytest.approx((largest / 1000, largest))
    assert colour_bar_of(figure).get_ylabel() == label


@pytest.mark.parametrize("normalise", ["row", "row_linear", "log"])
def test_rows_and_maps_of_zeros_are_drawn_pale_not_blank(normalise):
    figure = step_map_figure(make_saliency(3, 1, sums=torch.zeros(2, 2, 5, 5)), normalise=normalise)
    figure.canvas.draw()
    for axes in panels_of(figure):
        assert axes.images[0].get_array().count() == 15
        assert np.isfinite(axes.images[0].get_array().compressed()).all()


@pytest.mark.parametrize(("n_thinking", "n_summary"), [(20, 3), (112, 7)])
@pytest.mark.parametrize("width", [7.0, 3.3])
def test_no_text_overlaps_another_or_leaves_the_figure(n_thinking, n_summary, width):
    figure = step_map_figure(make_saliency(n_thinking, n_summary, n_layers=30), width=width)
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [*axes.get_xticklabels(), *axes.get_yticklabels(), *axes.texts, axes.yaxis.label, axes.title]
    texts = [t for t in texts if t.get_text()]
    boxes = [t.get_window_extent(renderer) for t in texts]
    assert len(boxes) > 30
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0, texts[i].get_text()
        assert box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, texts[i].get_text()
        for j in range(i):
            # Half a pixel: an ascender's box may touch its neighbour's without ink meeting.
            shrunk = box.padded(-0.5)
            assert not shrunk.overlaps(boxes[j].padded(-0.5)), (texts[i].get_text(), texts[j].get_text())


def test_step_labels_stand_on_the_outer_panels_only():
    figure = step_map_figure(make_saliency(5, 1, n_layers=6))
    shown = [[t.get_text() for t in axes.get_yticklabels() if t.get_text()] for axes in panels_of(figure)]
    assert shown == [labels_of(5, 1), [], [], labels_of(5, 1), [], []]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"columns": 0}, "ValueError", "columns is 0: expected at least 1"),
        ({"layers": []}, "ValueError", "layers is empty: name at least one layer"),
        ({"layers": [99]}, "ModelError", r"layers \[99\] are not in this map"),
    ],
)
def test_bad_options_are_refused_with_what_was_expected(options, error, match):
    with pytest.raises(getattr(errors, error, getattr(builtins, error, None)), match=match):
        step_map_figure(make_saliency(5, 1), **options)


def test_a_hostile_model_name_is_drawn_as_written():
    figure = step_map_figure(make_saliency(2, 1, model_name=r"$\frac{$ </script> _^"))
    figure.canvas.draw()
    assert r"$\frac{$ </script> _^" in figure.texts[0].get_text()


def test_figures_leave_no_trace_in_pyplot_and_are_freed():
    figure = step_map_figure(make_saliency(2, 1))
    assert plt.get_fignums() == []
    alive = weakref.ref(figure)
    del figure
    gc.collect()
    assert alive() is None


def test_a_notebook_can_show_the_figure_without_pyplot():
    figure = step_map_figure(make_saliency(2, 1))
    assert figure._repr_png_().startswith(b"\x89PNG")
