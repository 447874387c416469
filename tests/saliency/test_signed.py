"""The signed map: the sum of A dL/dA with its sign, and never larger than Step-Saliency."""

import pytest
import torch
from saliency_oracles import nll, patterns_and_logits
from tiny_models import TINY_MODEL_KINDS

from stepflow_tl import StepFlow, step_saliency
from stepflow_tl.errors import ObjectiveError
from stepflow_tl.saliency.run import signed_step_saliency


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_it_is_the_sum_of_pattern_times_gradient(tiny_model, tiny_trace, hooks_untouched, kind):
    model = tiny_model(kind)
    patterns, logits = patterns_and_logits(model, tiny_trace.tokens)
    step = tiny_trace.steps[-1]
    nll(logits, tiny_trace.tokens)[step.token_start - 1 : step.token_end - 1].mean().backward()
    with hooks_untouched(model):
        found = signed_step_saliency(model, tiny_trace, objective="S1", layers=[2, 0])
    for row, layer in enumerate((2, 0)):
        product = (patterns[layer].detach() * patterns[layer].grad)[0].double()
        for i in tiny_trace.steps:
            for j in tiny_trace.steps:
                expected = product[:, slice(*i.token_span), slice(*j.token_span)].sum((1, 2))
                assert torch.allclose(found[row, :, i.index, j.index].double(), expected, atol=2e-6)
    assert found.max() > 1e-4 and found.min() < -1e-4


def test_it_is_bounded_by_step_saliency(tiny_model, tiny_trace):
    unsigned = step_saliency(tiny_model(), tiny_trace, objective="response", backend="hooks").sums
    signed = signed_step_saliency(tiny_model(), tiny_trace)
    assert (signed.abs() <= unsigned + 1e-12).all() and (signed.abs() < 0.9 * unsigned).any()


def test_the_per_token_loss_is_refused(tiny_model, tiny_trace):
    with pytest.raises(ObjectiveError, match="objective='per_token' has a loss for each row"):
        signed_step_saliency(tiny_model(), tiny_trace, objective="per_token")


@pytest.mark.parametrize("as_function", [False, True], ids=["pairs", "function of the trace"])
def test_standing_hooks_give_the_map_of_hooks_attached_around_the_call(tiny_model, tiny_trace, as_function):
    model, flow = tiny_model(), StepFlow(alpha=0.7, tau_max=0)
    own = [("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern * 0.5)]
    with model.hooks(fwd_hooks=own), model.hooks(fwd_hooks=flow.hooks(model, tiny_trace)):
        expected = signed_step_saliency(model, tiny_trace)
    given = (lambda trace: own if trace is tiny_trace else []) if as_function else own
    found = signed_step_saliency(model, tiny_trace, stepflow=flow, fwd_hooks=given)
    assert torch.equal(found, expected)
    for part in ({"stepflow": flow}, {"fwd_hooks": own}, {}):
        assert not torch.allclose(found, signed_step_saliency(model, tiny_trace, **part), rtol=1e-3)
