"""The embedded model in float32, against separate backward passes and retained gradients."""

import pytest
import torch
from saliency_oracles import nll, patterns_and_logits, pool_by_loops, separate_backward_passes

from stepflow_tl import step_saliency
from stepflow_tl.trace import ReasoningTrace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def short_trace(default_model):
    question = "What is 2 + 3?\n\n"
    text = question + "2 + 3 = 5.\n\nIt is 5."
    return ReasoningTrace.from_text(default_model.tokenizer, text, format="plain", question=question)


def test_per_token_equals_separate_backward_passes_on_smollm2(default_model, short_trace):
    found = step_saliency(default_model, short_trace)
    oracle = separate_backward_passes(default_model, short_trace.tokens)
    expected = pool_by_loops(oracle, short_trace.step_ids)[..., :-1]
    scale = expected.amax((1, 2, 3), keepdim=True)
    assert scale.min() > 1e-4, "the oracle must have mass in every layer"
    assert ((found.sums - expected).abs() / scale).max() < 1e-4


def test_a_mean_loss_equals_retained_gradients_and_inflates_the_shallow_layers(default_model, short_trace):
    n_losses = len(short_trace) - 1
    found = step_saliency(default_model, short_trace, objective=(1, len(short_trace)))
    patterns, logits = patterns_and_logits(default_model, short_trace.tokens)
    nll(logits, short_trace.tokens).mean().backward()
    saliency = torch.stack([(p.detach() * p.grad)[0].abs().double() for _, p in sorted(patterns.items())])
    expected = pool_by_loops(saliency, short_trace.step_ids)[..., :-1]
    assert ((found.sums - expected).abs() / expected.amax((1, 2, 3), keepdim=True)).max() < 1e-4

    own = step_saliency(default_model, short_trace)
    ratio = found.sums.sum((1, 2, 3)) * n_losses / own.sums.sum((1, 2, 3))
    assert ratio[-1].item() == pytest.approx(1, abs=1e-4), "above the last layer no path crosses positions"
    assert ratio[:7].mean() > 1.02, "the mean loss counts what a row does to later tokens"
