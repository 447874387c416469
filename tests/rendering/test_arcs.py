"""Arc plots: the arcs drawn are the strongest sources, in the text's order."""

import numpy as np
import pytest
from made_maps import make_saliency

from stepflow_tl.errors import ModelError, TraceError
from stepflow_tl.rendering.arcs import arc_figure, edge_weights


def arcs_of(figure):
    return {
        (round(arc.center[0] + arc.width / 2), round(arc.center[0] - arc.width / 2)): arc
        for arc in figure.axes[0].patches
    }


@pytest.mark.parametrize("per_step", [1, 2, 3])
def test_every_step_has_its_strongest_sources(per_step):
    saliency = make_saliency(6, 2)
    mean = saliency.head_mean(layers=[2, 3]).mean(0).numpy()
    expected = set()
    for i in range(1, 9):
        order = sorted(range(i), key=lambda j: -mean[i, j])[:per_step]
        expected |= {(i, j) for j in order}
    arcs = arcs_of(arc_figure(saliency, layers=[2, 3], per_step=per_step))
    assert set(arcs) == expected


def test_weights_are_shares_among_earlier_steps_and_set_the_width():
    saliency = make_saliency(6, 2)
    weights = edge_weights(saliency, (0, 1))
    np.testing.assert_allclose(weights.sum(1), [0, *[1] * 8])
    assert not np.triu(weights).any()
    arcs = arcs_of(arc_figure(saliency))
    ordered = sorted(arcs, key=lambda pair: weights[pair])
    widths = [arcs[pair].get_linewidth() for pair in ordered]
    assert widths == sorted(widths) and len(set(widths)) > 5
    alphas = [arcs[pair].get_alpha() for pair in ordered]
    assert alphas == sorted(alphas)


def test_the_default_is_the_shallow_band_of_the_stored_layers():
    figure = arc_figure(make_saliency(4, 1, n_layers=12))
    assert any(text.get_text().startswith("layers 0 to 2;") for text in figure.texts)
    figure = arc_figure(make_saliency(4, 1, n_layers=12).select([7, 9]))
    assert any(text.get_text().startswith("layers 7, 9;") for text in figure.texts)


@pytest.mark.parametrize("width", [7.0, 3.3])
@pytest.mark.parametrize("n_thinking", [1, 20, 112])
def test_no_text_overlaps_another_or_leaves_the_figure(width, n_thinking):
    figure = arc_figure(make_saliency(n_thinking, 3), width=width)
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    axes = figure.axes[0]
    texts = [*figure.texts, *axes.texts, *axes.get_xticklabels(), *figure.legends[0].get_texts()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text()]
    assert len(boxes) > 7
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, text
        assert box.y0 >= 0 and box.y1 <= figure.bbox.height, text
        for other, other_box in boxes[:i]:
            assert not box.padded(-0.5).overlaps(other_box.padded(-0.5)), (text, other)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="per_step is 0"):
        arc_figure(make_saliency(3, 1), per_step=0)
    with pytest.raises(ModelError, match="layers \\[99\\]"):
        arc_figure(make_saliency(3, 1), layers=[99])
    with pytest.raises(TraceError, match="1 step: an edge needs two"):
        arc_figure(make_saliency(0, 0))
