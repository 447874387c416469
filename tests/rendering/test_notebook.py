"""`show` turns every kind of result into what a notebook displays, and says what it takes."""

import html
from types import SimpleNamespace

import pytest
from made_maps import make_knockout, make_patching, make_saliency
from matplotlib.figure import Figure

from stepflow_tl import compare, diagnose, show
from stepflow_tl.causal import spot_check
from stepflow_tl.rendering import CircuitsvisView, show_step_maps, show_text


@pytest.fixture(scope="module")
def saliency():
    return make_saliency(5, 2)


def test_a_saliency_becomes_maps_and_with_a_step_its_text(saliency):
    assert show(saliency, layer=5, scale="row") == show_step_maps(saliency, 5, scale="row")
    assert show(saliency, step=0, direction="readers") == show_text(saliency, "Q", direction="readers")


def test_other_results_become_their_picture(saliency):
    assert isinstance(show(make_knockout(saliency), pooling="mean"), CircuitsvisView)
    comparison = compare([saliency] * 3, [make_saliency(6, 2)] * 3, n_bootstrap=50, n_permutations=50)
    for result, first in (
        (make_patching(saliency), "patching of resid_pre: tiny"),
        (diagnose(saliency), "Step-Saliency over depth: tiny"),
        (comparison, "correct (3 traces) and wrong (3): tiny"),
    ):
        figure = show(result)
        assert isinstance(figure, Figure) and figure.texts[0].get_text() == first
        assert show(result, title="Mine").texts[0].get_text() == "Mine"


def test_a_saliency_is_shown_against_another_result(saliency):
    assert "Spearman" in show(saliency, knockout=make_knockout(saliency)).texts[0].get_text()
    assert [axes.get_title() for axes in show(saliency, repaired=saliency).axes[:2]] == [
        "plain",
        "with StepFlow",
    ]
    with pytest.raises(TypeError, match="step and knockout ask for different views of one saliency"):
        show(saliency, step="T1", knockout=make_knockout(saliency))


@pytest.mark.parametrize("result", [None, 3, SimpleNamespace(sums=1)])
def test_what_cannot_be_shown_is_refused_with_what_can(result):
    kinds = "StepSaliency, StepKnockout, StepPatching, Diagnosis, Comparison"
    with pytest.raises(TypeError, match=f"cannot show a {type(result).__name__}: expected .* one of {kinds}"):
        show(result)


def test_an_option_of_another_view_is_refused(saliency):
    with pytest.raises(TypeError, match="direction"):
        show(saliency, direction="readers")


def test_a_spot_check_ends_the_caption_of_its_map(saliency):
    check = spot_check(saliency, make_knockout(saliency))
    assert html.escape(check.line) in show(saliency, check=check).fragment
    assert "Spot check" not in show(saliency).fragment
