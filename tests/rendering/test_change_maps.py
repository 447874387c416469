"""Maps of change: before and after StepFlow shares and their difference; patching on a symmetric scale."""

import dataclasses

import numpy as np
import pytest
import torch
from made_maps import make_patching, make_saliency

from stepflow_tl.errors import ComparisonError
from stepflow_tl.rendering import flow_figure, patching_figure


def made_pair(n_thinking=6, n_summary=2):
    plain = make_saliency(n_thinking, n_summary)
    factor = 1 + torch.rand(plain.sums.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return plain, make_saliency(n_thinking, n_summary, sums=plain.sums * factor)


def shares(saliency, layers):
    mean = saliency.head_mean(layers=layers).mean(0).numpy()
    return mean / mean.sum(1, keepdims=True)


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_three_panels_plain_repaired_and_change(layers):
    plain, repaired = made_pair()
    figure = flow_figure(plain, repaired, layers=layers)
    images = [axes.images[0].get_array() for axes in figure.axes[:3]]
    expected = [shares(saliency, layers or range(8)) for saliency in (plain, repaired)]
    for image in images:
        assert (image.mask == np.triu(np.ones((9, 9), dtype=bool), 1)).all()
    for image, own in zip(images, expected, strict=False):
        np.testing.assert_allclose(image.compressed(), np.maximum(own, 1e-3)[~image.mask])
    change = 100 * (expected[1] - expected[0])
    np.testing.assert_allclose(images[2].compressed(), change[~images[2].mask], atol=1e-9)
    norm = figure.axes[2].images[0].norm
    assert norm.vmin == -norm.vmax and 0.5 < norm.vmax <= np.abs(change).max()


def test_no_change_is_drawn_as_none():
    plain, _ = made_pair()
    image = flow_figure(plain, plain).axes[2].images[0]
    assert not image.get_array().compressed().any() and image.norm(0.0) == 0.5


@pytest.mark.parametrize("n_thinking", [6, 112])
def test_no_text_overlaps_another_or_leaves_the_figure(n_thinking):
    figure = flow_figure(*made_pair(n_thinking))
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes.xaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text() and t.get_visible()]
    assert len(boxes) > 20
    inside = figure.bbox.padded(0.5)
    low, high = -figure.bbox.width, 2 * figure.bbox.width
    boxes = [(text, box) for text, box in boxes if low < box.x0 < high]
    for i, (text, box) in enumerate(boxes):
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1, text
        assert inside.y0 <= box.y0 and box.y1 <= inside.y1, text
        for other, other_box in boxes[:i]:
            assert not box.padded(-0.5).overlaps(other_box.padded(-0.5)), (text, other)


@pytest.mark.parametrize(
    ("placebo", "panel"),
    [
        (None, "with StepFlow"),
        ("both", "with the control"),
        ("bridge", "with the bridge's control"),
        ("momentum", "with the momentum's control"),
    ],
)
def test_the_second_panel_says_what_was_on_the_model(placebo, panel):
    plain, repaired = made_pair()
    notes = {"stepflow": "StepFlow()"} | ({"placebo": placebo} if placebo else {})
    provenance = dataclasses.replace(repaired.provenance, notes=notes)
    figure = flow_figure(plain, dataclasses.replace(repaired, provenance=provenance))
    assert [axes.get_title() for axes in figure.axes[:3]] == ["plain", panel, "change"]


@pytest.mark.parametrize(
    ("layers", "words"),
    [([5], "Layer 5."), ([0, 1], "Mean of layers 0, 1."), ([2, 3, 4], "Mean of layers 2 to 4.")],
)
def test_layers_are_named_in_words(layers, words):
    figure = flow_figure(*made_pair(), layers=layers)
    assert any(text.get_text().startswith(words) for text in figure.texts)


def test_maps_of_different_traces_are_refused():
    plain, _ = made_pair()
    for other, what in ((make_saliency(7, 2), "tokens"), (make_saliency(6, 2, model_name="other"), "model")):
        with pytest.raises(ComparisonError, match=f"differ in their {what}: map one trace twice"):
            flow_figure(plain, other)


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
