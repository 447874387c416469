"""Saliency against knockout: a point a measured pair where its two numbers say, and the correlation."""

import dataclasses

import numpy as np
import pytest
import torch
from made_maps import make_knockout, make_saliency
from scipy.stats import spearmanr

from stepflow_tl.errors import ComparisonError
from stepflow_tl.rendering import agreement_figure, save_figure


def points(figure):
    """Coordinates by (marker, hollow)."""
    found = {}
    for line in figure.axes[0].lines:
        if len(line.get_xdata()):
            hollow = line.get_markerfacecolor() == "none"
            found[line.get_marker(), hollow] = np.column_stack([line.get_xdata(), line.get_ydata()])
    return found


def words(figure):
    return " ".join(text.get_text() for text in figure.texts)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_every_measured_pair_is_a_point_at_its_two_numbers(pooling):
    saliency = make_saliency(5, 2)
    measured = torch.ones(8, 8, dtype=torch.bool).tril(-1)
    measured[4, 2] = measured[7, 0] = False
    measured[3, 3] = True  # a step cut from itself is no edge between steps
    knockout = make_knockout(saliency, measured=measured)
    figure = agreement_figure(saliency, knockout, pooling=pooling)
    pairs = measured.tril(-1)
    across = saliency.head_mean(pooling).mean(0)[pairs].numpy()
    effects = knockout.pooled(pooling)[pairs].numpy()
    drawn = np.concatenate(list(points(figure).values()))
    assert len(drawn) == 26
    np.testing.assert_allclose(np.sort(drawn[:, 0]), np.sort(across))
    np.testing.assert_allclose(drawn[np.argsort(drawn[:, 0]), 1], np.abs(effects)[np.argsort(across)])
    expected = spearmanr(across, np.abs(effects)).statistic
    assert 0.1 < expected < 0.99
    assert f"Spearman {expected:.2f}, n = 26" in words(figure)


def test_colour_and_marker_say_which_segments_the_edge_joins():
    saliency = make_saliency(4, 2)
    figure = agreement_figure(saliency, make_knockout(saliency, effects=saliency.sums[0, 0].abs()))
    counts = {marker: len(found) for (marker, _), found in points(figure).items()}
    assert counts == {"o": 4, "s": 6, "D": 2, "^": 8, "P": 1}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [name.split("  ")[0] for name in names] == [
        f"{source} → {reader}"
        for source, reader in [
            ("question", "thinking"),
            ("thinking", "thinking"),
            ("question", "summary"),
            ("thinking", "summary"),
            ("summary", "summary"),
        ]
    ]
    colours = {line.get_markeredgecolor() for line in figure.axes[0].lines}
    assert len(colours) == 5


def test_the_legend_has_the_correlation_within_each_kind():
    saliency = make_saliency(6, 2)
    knockout = make_knockout(saliency)
    names = [text.get_text() for text in agreement_figure(saliency, knockout).legends[0].get_texts()]
    across, effects = saliency.head_mean().mean(0).numpy(), knockout.pooled("mean").abs().numpy()
    thinking = [(i, j) for i in range(1, 7) for j in range(1, i)]
    expected = spearmanr([across[pair] for pair in thinking], [effects[pair] for pair in thinking]).statistic
    assert f"thinking → thinking  {expected:.2f}" in names
    assert "summary → summary  -" in names  # one pair has no rank correlation


def test_a_cut_that_helps_is_hollow():
    saliency = make_saliency(3, 1)
    effects = saliency.sums.mean((0, 1)).clone()
    effects[2, 1] *= -1
    figure = agreement_figure(saliency, make_knockout(saliency, effects=effects))
    hollow = [found for (_, is_hollow), found in points(figure).items() if is_hollow]
    assert len(hollow) == 1 and hollow[0].shape == (1, 2) and hollow[0][0, 1] > 0
    assert "hollow: the cut helped" in words(figure)
    assert "hollow" not in words(agreement_figure(saliency, make_knockout(saliency, effects=effects.abs())))


def test_scales_follow_the_values_and_what_is_too_small_stands_on_the_edge():
    saliency = make_saliency(5, 1, sums=torch.ones(2, 2, 7, 7, dtype=torch.float64).tril())
    effects = torch.linspace(1, 2, 49, dtype=torch.float64).reshape(7, 7)
    figure = agreement_figure(saliency, make_knockout(saliency, effects=effects), pooling="sum")
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
    assert axes.get_ylim()[0] == 0 and "Spearman -, n = 21" in words(figure)
    effects[3, 1], effects[4, 2], effects[5, 0] = 0, 1e-12, 1e-3
    figure = agreement_figure(saliency, make_knockout(saliency, effects=effects), pooling="sum")
    axes = figure.axes[0]
    largest = float(effects.tril(-1).max())
    assert axes.get_yscale() == "log" and axes.get_ylim()[0] == pytest.approx(largest * 1e-6)
    drawn = np.concatenate(list(points(figure).values()))
    assert (drawn[:, 1] == largest * 1e-6).sum() == 2
    assert "2 below the scale, on its edge" in words(figure)


def test_layers_and_target_are_named():
    saliency = make_saliency(4, 1)
    knockout = make_knockout(saliency)
    assert "layers 0 to 7" in words(agreement_figure(saliency, knockout))
    other = dataclasses.replace(knockout, layers=(3,), onto="summary")
    found = words(agreement_figure(saliency, other, width=7.0))
    assert "saliency of layers 0 to 7, cut in layer 3" in found and "effect on summary" in found


@pytest.mark.parametrize("width", [7.0, 3.3])
@pytest.mark.parametrize("n_thinking", [1, 20, 112])
def test_no_text_overlaps_another_or_leaves_the_figure(n_thinking, width):
    saliency = make_saliency(n_thinking, 3)
    figure = agreement_figure(saliency, make_knockout(saliency), width=width)
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    axes = figure.axes[0]
    texts = [*figure.texts, *figure.legends[0].get_texts(), axes.xaxis.label, axes.yaxis.label]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text()]
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        for tick in axis.get_major_ticks():
            if low <= tick.get_loc() <= high:
                boxes.append((tick.label1.get_text(), tick.label1.get_window_extent(renderer)))
    assert len(boxes) > 10
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, text
        assert box.y0 >= 0 and box.y1 <= figure.bbox.height, text
        for other, other_box in boxes[:i]:
            assert not box.padded(-0.5).overlaps(other_box.padded(-0.5)), (text, other)


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_it_can_be_saved(tmp_path, ending):
    saliency = make_saliency(66, 3)  # more points than are drawn one by one
    path = save_figure(
        agreement_figure(saliency, make_knockout(saliency)), tmp_path / f"scatter{ending}", dpi=100
    )
    assert 2_000 < path.stat().st_size < 400_000


def test_what_cannot_be_compared_is_refused():
    saliency = make_saliency(3, 1)
    with pytest.raises(ComparisonError, match="of different traces"):
        agreement_figure(make_saliency(4, 1), make_knockout(saliency))
    only_own = torch.eye(5, dtype=torch.bool)
    with pytest.raises(ComparisonError, match="no pair with the key step before the query step"):
        agreement_figure(saliency, make_knockout(saliency, measured=only_own))
