"""The scores: laws of the cut's effects, every backend against loops, and a result that knows its score."""

import dataclasses
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_maps import make_knockout, make_saliency
from saliency_oracles import nll, patterns_and_logits, pool_by_loops
from tiny_models import TINY_MODEL_KINDS

from stepflow_tl import StepFlow, StepSaliency, diagnose, step_saliency
from stepflow_tl.causal.agreement import score_maps
from stepflow_tl.errors import FusedRefusal, ResultFileError, ScoreError
from stepflow_tl.rendering import arc_figure, flow_figure, report, show, step_map_figure
from stepflow_tl.results.files import Schema
from stepflow_tl.saliency.scores import Score, cut_effects

SCORES = get_args(Score)


@st.composite
def rows(draw, sinks=(False, True)):
    """Mass and gain of a few rows by bin, from pattern and gradients, and the sink's mass or None."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n_rows, n_bins, spread = (draw(st.sampled_from(choices)) for choices in ([1, 4], [1, 2, 6], [1, 8, 40]))
    with_sink = draw(st.sampled_from(sinks))
    scores = torch.randn(n_rows, 3 * n_bins + with_sink, generator=generator, dtype=torch.float64) * spread
    pattern = torch.softmax(scores, -1)
    mass = pattern[:, : 3 * n_bins].reshape(n_rows, n_bins, 3)
    gain = mass * torch.randn(mass.shape, generator=generator, dtype=torch.float64)
    return mass.sum(-1), gain.sum(-1), pattern[:, -1] if with_sink else None


@settings(max_examples=100)
@given(rows(sinks=[False]), st.floats(-100, 100))
def test_a_constant_added_to_a_rows_gradient_changes_no_effect(drawn, constant):
    mass, gain, _ = drawn
    plain, shifted = cut_effects(mass, gain), cut_effects(mass, gain + constant * mass)
    assert torch.allclose(shifted, plain, rtol=1e-9, atol=1e-11)


@settings(max_examples=100)
@given(rows())
def test_effects_weighted_by_what_each_cut_leaves_add_up_to_what_the_sink_takes(drawn):
    """Sum of `(1 - P_j) effect_j = sum of (P_j D - G_j) = -sink D`: 0 without a sink."""
    mass, gain, sink = drawn
    total = ((1 - mass) * cut_effects(mass, gain, sink)).sum(-1)
    taken = torch.zeros(len(mass), dtype=torch.float64) if sink is None else sink * gain.sum(-1)
    assert torch.allclose(total, -taken, atol=1e-12)


def test_a_step_that_holds_nearly_all_of_a_row_loses_no_digits():
    mass = torch.tensor([[1 - 3e-9, 2e-9, 1e-9]])
    gradient = torch.tensor([[5.0, 2.0, -4.0]])
    assert mass.dtype == torch.float32 and mass[0, 0] == 1, "one less the mass would be 0"
    # What is left of the row has 2 and -4 in the odds 2 to 1: its mean is 0.
    assert cut_effects(mass, mass * gradient)[0, 0] == pytest.approx(-5, rel=1e-6)


def test_where_nothing_is_left_the_effect_is_zero_but_for_a_sink():
    mass, gain = torch.tensor([[0.0, 0.6, 0.0]]), torch.tensor([[0.0, 1.5, 0.0]])
    assert torch.equal(cut_effects(mass / 0.6, gain), torch.zeros(1, 3))
    assert torch.allclose(cut_effects(mass, gain, torch.tensor([0.4])), torch.tensor([[0.0, -1.5, 0.0]]))
    assert torch.equal(cut_effects(mass * 0, gain * 0), torch.zeros(1, 3))


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_signed_is_the_sum_of_pattern_times_gradient(tiny_model, tiny_trace, hooks_untouched, kind):
    model = tiny_model(kind)
    patterns, logits = patterns_and_logits(model, tiny_trace.tokens)
    step = tiny_trace.steps[-1]
    nll(logits, tiny_trace.tokens)[step.token_start - 1 : step.token_end - 1].mean().backward()
    with hooks_untouched(model):
        found = step_saliency(
            model, tiny_trace, objective="S1", layers=[2, 0], score="signed", backend="hooks"
        )
    products = torch.stack([(patterns[x].detach() * patterns[x].grad)[0].double() for x in (2, 0)])
    expected = pool_by_loops(products, tiny_trace.step_ids)
    assert torch.allclose(found.sums.double(), expected[..., :-1], atol=2e-6)
    assert found.sums.max() > 1e-4 and found.sums.min() < -1e-4
    plain = step_saliency(model, tiny_trace, objective="S1", layers=[2, 0], backend="hooks").sums
    assert (found.sums.abs() <= plain + 1e-12).all() and (found.sums.abs() < 0.9 * plain).any()


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
@pytest.mark.parametrize("objective", ["per_token", "log_odds", "response"])
def test_every_backend_gives_every_score(tiny_model, tiny_trace, hooks_untouched, kind, objective):
    model = tiny_model(kind)
    for score in SCORES:
        arguments = dict(objective=objective, score=score)
        with hooks_untouched(model):
            hooks, layerwise, auto = (
                step_saliency(model, tiny_trace, backend=backend, **arguments)
                for backend in ("hooks", "layerwise", "auto")
            )
        scale = hooks.sums.abs().amax((1, 2, 3), keepdim=True)
        assert scale.min() > 1e-5 and (hooks.score, hooks.provenance.objective) == (score, objective)
        for other in (layerwise, auto):
            assert ((other.sums - hooks.sums).abs() / scale).max() < 1e-5
            assert ((other.template_sums - hooks.template_sums).abs() / scale[..., 0]).max() < 1e-5
        if auto.provenance.backend == "fused":
            less = step_saliency(model, tiny_trace, checkpoint=True, block_divisor=3, **arguments)
            assert torch.allclose(less.sums, auto.sums, rtol=1e-9, atol=1e-12)
        else:
            with pytest.raises(FusedRefusal):
                step_saliency(model, tiny_trace, checkpoint=True, **arguments)


def test_a_pattern_that_hooks_have_scaled_hands_its_mass_over_alike(tiny_model, tiny_trace):
    """The removed mass goes to the others in proportion, whatever a row sums to."""
    half = [("blocks.3.attn.hook_pattern", lambda pattern, hook: pattern * 0.5)]
    found = step_saliency(
        tiny_model(), tiny_trace, score="cut", objective="response", layers=[3], fwd_hooks=half
    )
    patterns, logits = patterns_and_logits(tiny_model(), tiny_trace.tokens, half)
    targets = (tiny_trace.segment_ids >= 2).nonzero()[:, 0]
    nll(logits, tiny_trace.tokens)[targets - 1].mean().backward()
    pattern, gradient = patterns[3].detach()[0].double(), patterns[3].grad[0].double()
    for j in tiny_trace.steps:
        others = pattern.masked_fill(tiny_trace.step_ids == j.index, 0)
        left = others.sum(-1, keepdim=True)
        change = ((others * pattern.sum(-1, keepdim=True) / left - pattern) * gradient).sum(-1)
        change = change.masked_fill(left[..., 0] == 0, 0)
        for i in tiny_trace.steps:
            expected = change[:, slice(*i.token_span)].sum(-1)
            assert torch.allclose(found.sums[0, :, i.index, j.index].double(), expected, atol=1e-7)
    assert found.sums.abs().max() > 1e-3


def test_the_map_of_the_repaired_flow_differs_and_says_so(tiny_model, tiny_trace):
    model, flow = tiny_model(), StepFlow(alpha=0.7, tau_max=0.3)
    plain, repaired = (step_saliency(model, tiny_trace, score="cut", stepflow=f) for f in (None, flow))
    assert repaired.provenance.notes["stepflow"] == repr(flow) and repaired.score == "cut"
    assert (plain.sums - repaired.sums).abs().max() > 1e-3 * plain.sums.abs().max()


def test_an_unknown_score_is_named(tiny_model, tiny_trace):
    with pytest.raises(Exception, match="cutting"):
        step_saliency(tiny_model(), tiny_trace, score="cutting")


# --- the result ---------------------------------------------------------------------------------------------


def signed_map(score="cut"):
    saliency = make_saliency(3, 1)
    signs = torch.where(
        torch.rand(saliency.sums.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -1, 1
    )
    return dataclasses.replace(saliency, sums=saliency.sums * signs, score=score)


@pytest.mark.parametrize("score", SCORES)
def test_a_file_knows_its_score(tmp_path, score):
    saliency = signed_map(score) if score != "saliency" else make_saliency(3, 1)
    again = StepSaliency.load(saliency.save(tmp_path / "map"))
    assert again.score == score and torch.equal(again.sums, saliency.sums)
    assert again.select([3]).score == score and f"score={score!r}" in repr(again)


def test_an_older_reader_refuses_what_it_would_take_for_the_papers_map(tmp_path, monkeypatch):
    paths = {score: signed_map(score).save(tmp_path / score) for score in ("signed", "cut")}
    plain = make_saliency(3, 1).save(tmp_path / "saliency")
    older = Schema(StepSaliency.schema.name, 1, StepSaliency.schema.what)
    monkeypatch.setattr(StepSaliency, "schema", older)
    assert StepSaliency.load(plain).score == "saliency"
    for path in paths.values():
        with pytest.raises(ResultFileError, match="schema version 2; this stepflow_tl reads up to 1"):
            StepSaliency.load(path)


def test_a_table_of_signed_scores_has_totals_in_nats():
    saliency = signed_map()
    total = saliency.sums.sum((0, 1)).tril(-1)
    reader, source = divmod(int(total.abs().argmax()), 5)
    lines = saliency.table(2).splitlines()
    assert lines[0] == "Cut score: tiny"
    assert lines[5].split()[:2] == [saliency.labels[reader], saliency.labels[source]]
    assert float(lines[5].split()[2]) == pytest.approx(float(total[reader, source]), rel=1e-2)
    assert lines[-1] == "2 of 10 pairs; nats, sum over heads and 8 of 8 layers"


@pytest.mark.parametrize("score", ["signed", "cut"])
def test_what_takes_shares_refuses_a_signed_map_and_says_what_to_do(tmp_path, score):
    saliency = signed_map(score)
    for refusing in (
        diagnose,
        arc_figure,
        lambda saliency: flow_figure(make_saliency(3, 1), saliency),
        lambda saliency: report(saliency, tmp_path / "page.html"),
        lambda saliency: show(saliency, step="T2"),
        lambda saliency: show(saliency, knockout=make_knockout(make_saliency(3, 1))),
        lambda saliency: show(saliency, scale="share"),
        lambda saliency: step_map_figure(saliency, normalise="log"),
    ):
        with pytest.raises(
            ScoreError, match=rf"score='{score}': take it from step_saliency\(\.\.\., score='sal"
        ):
            refusing(saliency)
    assert not (tmp_path / "page.html").exists()


def test_signed_maps_have_a_colour_for_each_sign():
    saliency = signed_map()
    figure = step_map_figure(saliency, layers=[0, 5])
    largest = float(saliency.head_mean(layers=[0, 5]).abs().max())
    for axes in figure.axes[:2]:
        assert axes.images[0].get_clim() == pytest.approx((-largest, largest))
        assert axes.images[0].get_cmap().name == "RdBu_r"
    shown = show(saliency).html
    assert "negativeColor" in shown and "the cut hurts" in shown and "Cut score" in shown


def test_agreement_ranks_signed_maps_by_size_unless_signs_are_asked_for(tiny_model, tiny_trace):
    saliency = step_saliency(tiny_model(), tiny_trace, score="cut")
    knockout = make_knockout(saliency)
    sizes, signs = (
        score_maps(tiny_model(), saliency, knockout, signed=s)["Cut score"] for s in (False, True)
    )
    assert (signs < 0).any() and (sizes == abs(signs)).all()
