"""Heatmaps of saliency and knockout: values on their scale, hostile labels escaped, nothing loaded."""

import dataclasses
import html

import pytest
import torch
from made_maps import labels_of, make_knockout, make_saliency
from rendered_pages import HOSTILE, elements_of, props_of

from stepflow_tl.causal.knockout_result import CutGroup
from stepflow_tl.errors import ModelError
from stepflow_tl.rendering import show, show_step_maps
from stepflow_tl.saliency.result import StepSaliency


def test_layers_are_shown_as_heads_by_default():
    props = props_of(show_step_maps(make_saliency(5, 1, n_layers=4)))
    assert props["attentionHeadNames"] == ["L0", "L1", "L2", "L3"]
    assert props["tokens"] == labels_of(5, 1)
    assert props["maskUpperTri"] is True and props["maxValue"] == 1


def test_the_log_scale_shows_a_layers_heads_below_their_largest_value():
    saliency = make_saliency(5, 1, n_layers=4, n_heads=3)
    props = props_of(show_step_maps(saliency, 2, scale="log"))
    assert props["attentionHeadNames"] == ["L2H0", "L2H1", "L2H2"]
    heads = saliency.pooled(layers=[2])[0]
    expected = (1 + (heads / heads.max()).clamp(min=1e-3).log10() / 3).clamp(0, 1)
    torch.testing.assert_close(
        torch.tensor(props["attention"], dtype=torch.float64), expected, atol=5e-5, rtol=0
    )


def test_the_row_scale_peaks_at_one_in_every_row_and_draws_layers_from_the_head_mean():
    saliency = make_saliency(5, 1, n_layers=4)
    values = torch.tensor(props_of(show_step_maps(saliency, scale="row"))["attention"], dtype=torch.float64)
    maps = saliency.head_mean()
    torch.testing.assert_close(values, maps / maps.amax(-1, keepdim=True), atol=5e-5, rtol=0)
    assert (values.amax(-1) == 1).all()


@pytest.mark.parametrize("layer", [None, 2])
def test_rows_far_below_the_question_can_be_seen_by_default(layer):
    """As on the testbed: the question's losses are 100 000 times those of a thinking step."""
    plain = make_saliency(5, 1, n_layers=4)
    faint = plain.sums.clone()
    faint[:, :, 1:] *= 1e-6
    saliency = make_saliency(5, 1, sums=faint)
    shown = torch.tensor(props_of(show_step_maps(saliency, layer))["attention"], dtype=torch.float64)
    assert (shown[:, 1:].amax(-1) > 0.5).all()  # in the common log scale these rows are blank:
    blank = torch.tensor(props_of(show_step_maps(saliency, layer, scale="log"))["attention"])
    assert not blank[:, 1:].any() and blank[:, 0].any()
    maps = plain.head_mean() if layer is None else plain.pooled(layers=[layer])[0]
    expected = (1 + (maps / maps.sum(-1, keepdim=True)).clamp(min=1e-3).log10() / 3).clamp(0, 1)
    torch.testing.assert_close(shown, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("scale", ["share", "log", "row"])
@pytest.mark.parametrize("layer", [None, 1])
def test_a_map_of_zeros_gives_zeros_and_no_nan(scale, layer):
    view = show_step_maps(make_saliency(3, 1, sums=torch.zeros(2, 2, 5, 5)), layer, scale=scale)
    values = torch.tensor(props_of(view)["attention"])
    assert values.shape == (2, 5, 5) and (values == 0).all()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_labels_and_names_cannot_become_markup(text, monkeypatch, tmp_path):
    plain = make_saliency(5, 1)
    expected = elements_of(show_step_maps(plain).save(tmp_path / "plain.html").read_text(encoding="utf-8"))
    hostile = make_saliency(5, 1, model_name=text)
    monkeypatch.setattr(StepSaliency, "labels", property(lambda self: [text] * 7))
    view = show_step_maps(hostile)
    page = view.save(tmp_path / "hostile.html").read_text(encoding="utf-8")
    found = elements_of(page)
    assert [tag for tag, _ in found] == [tag for tag, _ in expected]
    assert all("onerror" not in attributes for _, attributes in found)
    assert props_of(view)["tokens"] == [html.escape(text)] * 7
    if "<" in text:
        assert text not in page


def test_trace_text_is_not_in_the_page_at_all():
    view = show_step_maps(make_saliency(5, 1, text="<img src=x onerror=alert(1)>"))
    assert "onerror=alert" not in view.html


def test_many_cells_are_thinned_to_layers_evenly_over_depth_and_the_caption_says_so():
    view = show_step_maps(make_saliency(97, 2, n_layers=8, n_heads=1))
    assert props_of(view)["attentionHeadNames"] == ["L0", "L1", "L3", "L4", "L6", "L7"]
    assert "head mean of 6 of 8 layers, evenly over depth" in view.fragment
    one = show_step_maps(make_saliency(97, 2, n_layers=2, n_heads=8), 1)
    assert len(props_of(one)["attentionHeadNames"]) == 8  # asked for by name, shown


def test_the_caption_says_what_the_colours_mean():
    saliency = make_saliency(5, 1, sums=torch.tril(torch.full((2, 2, 7, 7), 25.0)))
    share = show_step_maps(saliency).html
    assert "Share of a row&#x27;s mean saliency" in share and "full colour (1) is all of it" in share
    log = show_step_maps(saliency, scale="log").html
    assert "full colour (1) is the largest value shown, 1 nats" in log and "white (0) is a thousandth" in log
    assert "relative to the row&#x27;s largest value" in show_step_maps(saliency, scale="row").html


def test_an_absent_layer_is_refused_by_name():
    with pytest.raises(ModelError, match=r"layers \[8\] are not in this map"):
        show_step_maps(make_saliency(2, 1), 8)


@pytest.fixture
def knockout():
    saliency = make_saliency(3, 1, model_name="</script><b>")
    effects = torch.zeros(5, 5, dtype=torch.float64)
    effects[1, 0], effects[2, 1] = 0.5, -2.0
    return make_knockout(saliency, effects)


def test_values_keep_their_sign_on_one_scale(knockout):
    view = show(knockout)
    props = props_of(view)
    values = torch.tensor(props["attention"])[0]
    assert float(values[1, 0]) == 0.25 and float(values[2, 1]) == -1.0
    assert props["tokens"] == knockout.labels and props["attentionHeadNames"] == ["nll"]
    assert "from 2 (purple, the cut hurts)" in view.html and "</script><b>" not in view.html
    assert "pairs were measured" in view.html


def test_pairs_that_were_cut_in_groups_have_a_map_of_their_own(knockout):
    measured = knockout.measured.clone()
    measured[4, :2] = False
    group = CutGroup(4, (0, 1), -0.1, "bound")
    screened = dataclasses.replace(
        knockout,
        effects=torch.where(measured, knockout.effects, 0),
        measured=measured,
        groups=(group, CutGroup(3, (0, 2), 0.3, "joint")),
        tolerance=0.2,
    )
    view = show(screened)
    props = props_of(view)
    assert props["attentionHeadNames"] == ["nll", "together"]
    alone, together = torch.tensor(props["attention"])
    assert together[4, :2].tolist() == [1.0, 1.0] and together.count_nonzero() == 2
    assert float(alone[2, 1]) == -1.0 and not alone[4, :2].any()
    assert "2 more pairs in 1 groups" in view.html and "size of their joint effect, up to 0.1." in view.html
    assert "T3 from 2 together (Q, T2): 0.3000" in view.html


def test_a_map_without_any_effect_is_white(knockout):
    empty = dataclasses.replace(knockout, effects=torch.zeros_like(knockout.effects))
    assert "NaN" not in show(empty, pooling="mean").html[-5000:]
