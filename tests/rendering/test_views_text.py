import html
import re

import pytest
import torch
from jaxtyping import TypeCheckError
from made_maps import make_saliency
from rendered_pages import HOSTILE, elements_of, props_of

from stepflow_tl.errors import TraceError
from stepflow_tl.rendering import show
from stepflow_tl.rendering.views import escaped


def shares_of(saliency):
    """Row shares the slow way."""
    maps = saliency.head_mean().to(torch.float64)
    return maps / maps.sum(-1, keepdim=True)


def test_sources_are_the_row_of_the_shares_averaged_over_layers():
    saliency = make_saliency(3, 1)
    values = props_of(show(saliency, step="T3"))["values"]
    expected = [round(share, 4) for share in shares_of(saliency).mean(0)[3].tolist()]
    assert values == pytest.approx(expected) and sum(values) == pytest.approx(1, abs=1e-3)
    assert values[4] == 0  # a later step is no source


def test_readers_are_the_column_and_one_layer_is_that_layer():
    saliency = make_saliency(3, 1)
    values = props_of(show(saliency, layer=5, step=1, direction="readers"))["values"]
    assert values == pytest.approx(shares_of(saliency)[5][:, 1].tolist(), abs=5e-5)
    assert values[0] == 0 and values[4] > 0


def test_full_colour_is_the_largest_share_of_another_step():
    saliency = make_saliency(3, 1)
    props = props_of(show(saliency, step="S1"))
    row = shares_of(saliency).mean(0)[4].tolist()
    assert props["maxValue"] == pytest.approx(max(row[:4]))


def test_the_caption_names_the_three_strongest_other_steps():
    saliency = make_saliency(4, 1)
    row = shares_of(saliency).mean(0)[4].tolist()
    order = sorted(range(4), key=lambda i: -row[i])[:3]
    named = ", ".join(f"{saliency.labels[i]} ({100 * row[i]:.3g} %)" for i in order)
    assert f"Most: {named}. " in show(saliency, step="T4").html
    assert "Most: none. " in show(saliency, step="Q").html  # nothing comes before it
    assert "Most: none. " in show(saliency, step="S1", direction="readers").html


def test_each_step_starts_with_its_label_and_share_and_the_chosen_one_is_marked():
    tokens = props_of(show(make_saliency(2, 1, text="one\ntwo\n\n"), step="T2"))["tokens"]
    assert len(tokens) == 8
    assert re.fullmatch(r"  Q +\d+\.\d\d %  one\n", tokens[0])
    assert re.fullmatch(r" +two\n", tokens[1])
    assert tokens[4].startswith("▸T2 ")
    assert re.fullmatch(r" S1 +one\n", tokens[6])  # no share: it comes later


def test_long_lines_are_cut_at_spaces_and_nothing_is_lost():
    text = "word " * 200 + "x" * 300
    tokens = props_of(show(make_saliency(1, 0, text=text), step=1))["tokens"]
    assert max(map(len, tokens)) < 120
    shown = "".join(token[13:].strip() for token in tokens)
    assert shown.replace(" ", "") == text.replace(" ", "") * 2


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_cannot_become_markup(text, tmp_path):
    plain = elements_of(show(make_saliency(2, 1), step="T1").save(tmp_path / "a.html").read_text("utf-8"))
    view = show(make_saliency(2, 1, text=text, model_name=text), step="T1")
    page = view.save(tmp_path / "b.html").read_text("utf-8")
    assert [tag for tag, _ in elements_of(page)] == [tag for tag, _ in plain]
    for token in props_of(view)["tokens"]:
        assert elements_of(token) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<think>", "&lt;think>"),
        ("a < b && c > d", "a < b && c > d"),
        ("&lt;", "&amp;lt;"),
        ("x&#65;<!-- </p> <?x", "x&amp;#65;&lt;!-- &lt;/p> &lt;?x"),
    ],
)
def test_only_what_could_be_markup_is_escaped_and_it_reads_back(text, shown):
    assert escaped(text) == shown and html.unescape(shown) == text


def test_characters_that_cannot_be_seen_are_named():
    tokens = props_of(show(make_saliency(0, 0, text="a\x00b\u202ec\r\nd\te"), step=0))["tokens"]
    assert tokens[0].endswith("a[U+0000]b[U+202E]c\n") and tokens[1].endswith("d\te\n")


def test_a_row_without_mass_has_no_colour_and_no_nan():
    props = props_of(show(make_saliency(2, 1, sums=torch.zeros(2, 2, 4, 4)), step="T1"))
    assert set(props["values"]) == {0.0} and props["maxValue"] == 1.0


@pytest.mark.parametrize("step", ["T9", "t1", 7, -1])
def test_an_unknown_step_is_refused_with_those_there_are(step):
    with pytest.raises(TraceError, match=f"no step {step!r}: its steps are Q, T1, .*, S1 \\(0\\.\\.6\\)"):
        show(make_saliency(5, 1), step=step)


def test_an_unknown_direction_is_refused():
    with pytest.raises((ValueError, TypeCheckError), match="'both'"):
        show(make_saliency(2, 1), step=0, direction="both")
