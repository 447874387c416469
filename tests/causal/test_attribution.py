"""Attribution patching is patching where the two runs are close, and the agreement says how close."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from tiny_models import FLOAT64_KINDS, TINY_MODEL_KINDS, build_tiny_model

from stepflow_tl.causal import attribution_patching, effect_agreement, step_patching
from stepflow_tl.errors import ComparisonError, GradientError, ObjectiveError
from stepflow_tl.trace import ReasoningTrace

GENERATOR_SEED = 5


def nudged(model, clean_trace, size):
    """`fwd_hooks` that move the clean run's embeddings by `size`, and leave the corrupted run alone."""
    shape = (1, len(clean_trace), model.cfg.d_model)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(GENERATOR_SEED), dtype=torch.float64)
    name = model.hook_dict["hook_embed"].name

    def nudge(embedding, hook):
        return embedding + size * noise.to(embedding.dtype)

    return lambda trace: [(name, nudge)] if trace is clean_trace else []


@pytest.fixture
def twin_trace(make_trace, wrong_trace):
    """The tokens of `wrong_trace` in an object of its own."""
    return ReasoningTrace.from_json(wrong_trace.to_json())


def both(*arguments, **options):
    options = {"metric": "S1", **options}
    return step_patching(*arguments, **options), attribution_patching(*arguments, **options)


def relative(measured, predicted):
    return float((measured.effects - predicted.effects).abs().max() / measured.effects.abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {"component": "resid_pre"},
        {"component": "resid_post", "alignment": "mean"},
        {"component": "z", "placebo_seed": 1},
        {"component": "v"},
        {"component": "k"},
        {"component": "v", "receiving_step": "T3"},
        {"component": "k", "receiving_step": "T3"},
        {"component": "resid_pre", "receiving_step": "T3"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("kind", FLOAT64_KINDS)
def test_prediction_and_measurement_meet_as_the_difference_shrinks(
    tiny_model, wrong_trace, twin_trace, kind, options
):
    model, errors = tiny_model(kind), []
    for size in (1e-3, 1e-5):
        measured, predicted = both(
            model,
            twin_trace,
            wrong_trace,
            fwd_hooks=nudged(model, twin_trace, size),
            layers=[0, 2],
            steps=["T1", "T3"],
            **options,
        )
        assert (measured.effects != 0).all() and predicted.method == "attribution"
        errors.append(relative(measured, predicted))
    assert errors[1] < 1e-3 and errors[1] < errors[0] / 20, "the error is of second order"


@pytest.mark.parametrize("kind", [kind for kind in TINY_MODEL_KINDS if kind not in FLOAT64_KINDS])
def test_the_bridges_over_transformers_agree_too(tiny_model, wrong_trace, twin_trace, kind):
    model = tiny_model(kind)
    for receiving_step in (None, "T3"):
        measured, predicted = both(
            model,
            twin_trace,
            wrong_trace,
            fwd_hooks=nudged(model, twin_trace, 1e-3),
            component="v",
            layers=[1, 2],
            steps=["T1", "T3"],
            receiving_step=receiving_step,
        )
        assert relative(measured, predicted) < 0.1


def test_a_linear_metric_of_the_last_residual_is_predicted_exactly(right_trace, wrong_trace, tiny_tokenizer):
    model = build_tiny_model(tokenizer=tiny_tokenizer)
    name = model.hook_dict["blocks.3.hook_resid_post"].name
    kept = []

    def linear(logits, tokens):
        return kept[-1][0, -4:].sum()

    hooks = [(name, lambda residual, hook: kept.append(residual))]
    # Ours come last, so the metric reads what patching wrote one layer below, through one block's identity.
    measured, predicted = both(
        model,
        right_trace,
        wrong_trace,
        metric=linear,
        fwd_hooks=hooks,
        component="mlp_out",
        layers=[3],
        steps=["T3", "S1"],
    )
    assert abs(measured.effects[0, 1]) > 0.1 and measured.effects[0, 0] == 0
    assert torch.allclose(measured.effects, predicted.effects, atol=1e-10)


def test_a_step_that_cannot_be_reached_is_predicted_as_nothing(tiny_model, right_trace, wrong_trace):
    _, predicted = both(
        tiny_model(), right_trace, wrong_trace, component="v", receiving_step="T2", layers=[1]
    )
    assert (predicted.effects[:, 3:] == 0).all() and (predicted.effects[:, 1:3] != 0).all()


def test_parameters_get_no_gradient_and_no_hook_stays(tiny_model, right_trace, wrong_trace, hooks_untouched):
    model = tiny_model()
    with hooks_untouched(model), torch.no_grad():
        attribution_patching(model, right_trace, wrong_trace, metric="S1")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_metric_without_a_gradient_is_refused(tiny_model, right_trace, wrong_trace):
    model = tiny_model()
    with pytest.raises(ObjectiveError, match="has no gradient"):
        attribution_patching(
            model, right_trace, wrong_trace, metric=lambda logits, tokens: logits.detach().sum()
        )
    name = model.hook_dict["blocks.2.hook_resid_post"].name
    cut = [(name, lambda residual, hook: residual.detach())]
    with pytest.raises(GradientError, match=r"does not depend on z of layers \[0, 1, 2\]"):
        attribution_patching(model, right_trace, wrong_trace, metric="S1", component="z", fwd_hooks=cut)


def test_agreement_counts_what_is_not_zero_by_construction(tiny_model, right_trace, wrong_trace):
    measured, predicted = both(tiny_model(), right_trace, wrong_trace, component="v", layers=[0, 1])
    found = effect_agreement(measured, predicted)
    first, second = measured.effects[:, 1:].flatten(), predicted.effects[:, 1:].flatten()
    assert (measured.effects[:, 0] == 0).all() and (predicted.effects[:, 0] == 0).all(), "the same question"
    assert found.n_entries == 8
    assert found.pearson == pytest.approx(pearsonr(first, second).statistic)
    assert found.spearman == pytest.approx(spearmanr(first, second).statistic)
    assert found.sign_agreement == pytest.approx((first.sign() == second.sign()).double().mean().item())
    same = effect_agreement(measured, measured)
    assert (same.pearson, same.spearman, same.sign_agreement) == pytest.approx((1, 1, 1))
    opposite = effect_agreement(measured, replace(measured, effects=-measured.effects))
    assert (opposite.pearson, opposite.spearman, opposite.sign_agreement) == pytest.approx((-1, -1, 0))


def test_maps_of_different_questions_do_not_compare(tiny_model, right_trace, wrong_trace):
    model = tiny_model()
    first = attribution_patching(model, right_trace, wrong_trace, metric="S1", layers=[0, 1])
    for options, message in (
        ({"component": "v"}, "differ in `component`"),
        ({"layers": [0, 2]}, r"differ in `layers` \(\(0, 1\) and \(0, 2\)\)"),
        ({"metric": "response"}, "measure 'S1' and 'response'"),
    ):
        options = {"metric": "S1", "layers": [0, 1], **options}
        other = attribution_patching(model, right_trace, wrong_trace, **options)
        with pytest.raises(ComparisonError, match=message):
            effect_agreement(first, other)
    with pytest.raises(ComparisonError, match="0 entries are not 0 in both maps"):
        nothing = replace(first, effects=torch.zeros_like(first.effects))
        effect_agreement(nothing, nothing)
