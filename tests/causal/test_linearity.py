"""Signed saliency predicts what a small dose of knockout does; a wrong factor or head would be seen."""

from dataclasses import replace

import pytest
import torch
from tiny_models import FLOAT64_KINDS, TINY_MODEL_KINDS

from stepflow_tl import StepFlow
from stepflow_tl.causal import linearity_check as check

PAIRS = [("T1", "Q"), ("T2", "T1"), ("T3", "T3"), ("S1", "Q"), ("S1", "T2")]


@pytest.mark.parametrize("n_key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", FLOAT64_KINDS)
def test_every_edge_of_a_float64_model_is_predicted(tiny_model, right_trace, kind, n_key_value_heads):
    model = tiny_model(kind, n_key_value_heads=n_key_value_heads)
    found = check(model, right_trace, "all" if n_key_value_heads == 2 else PAIRS)
    assert len(found.pairs) == (15 if n_key_value_heads == 2 else len(PAIRS))
    assert (found.predicted.abs() > 1e-5).all()
    assert found.max_relative_error < 1e-3


@pytest.mark.parametrize("kind", FLOAT64_KINDS)
def test_single_heads_are_predicted_and_no_head_for_another(tiny_model, right_trace, kind):
    model = tiny_model(kind)
    each = [check(model, right_trace, PAIRS[:2], layers=[1], heads=[head]) for head in range(4)]
    assert max(found.max_relative_error for found in each) < 1e-3
    for head, found in enumerate(each):
        for other in each[:head] + each[head + 1 :]:
            crossed = replace(found, measured=other.measured)
            assert crossed.relative_error.min() > 0.01, "a head taken for another would be seen"
    doubled = replace(each[0], predicted=2 * each[0].predicted)
    assert torch.allclose(doubled.relative_error, torch.full((2,), 0.5, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("kind", [kind for kind in TINY_MODEL_KINDS if kind not in FLOAT64_KINDS])
def test_the_bridges_over_transformers_are_predicted_too(tiny_model, right_trace, kind):
    # Their softmax and norms run in float32: slopes near 0 drown in rounding, so the scale is the largest.
    found = check(tiny_model(kind), right_trace, PAIRS, eps=3e-2)
    scale = found.predicted.abs().max()
    assert scale > 1e-2 and ((found.measured - found.predicted).abs() / scale).max() < 0.01


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "phi3"])
def test_windows_sinks_and_soft_caps_are_predicted_in_float64(bridges, right_trace, name, float64_throughout):
    # gpt_oss routes tokens to experts: at a dose of 0.01 a token changes its expert and the loss jumps.
    eps = 1e-4 if name == "gpt_oss" else 1e-2
    found = check(bridges(name), right_trace, eps=eps)
    assert (found.predicted.abs() > 1e-4).sum() >= 8
    # A pair out of every window has slope 0 both ways; what is not 0 agrees.
    assert found.max_relative_error < 1e-2
    assert torch.allclose(found.measured, found.predicted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("objective", ["summary", "T3", "query_step", (40, 60)])
def test_any_scalar_loss_will_do(tiny_model, right_trace, objective):
    found = check(tiny_model(), right_trace, [("T2", "Q"), ("T3", "T1")], objective=objective)
    assert (found.predicted.abs() > 1e-6).all() and found.max_relative_error < 1e-3


def test_the_query_steps_own_loss_is_that_of_each_pair(tiny_model, right_trace):
    model = tiny_model()
    together = check(model, right_trace, [("T2", "T1"), ("T3", "T1")], objective="query_step")
    for n, pair in enumerate(together.pairs):
        alone = check(model, right_trace, [pair], objective=pair[0])
        assert torch.allclose(together.predicted[n], alone.predicted[0], rtol=1e-12)
        assert torch.allclose(together.measured[n], alone.measured[0], rtol=1e-9)


def test_a_dose_after_the_loss_does_nothing_and_is_predicted_to(tiny_model, right_trace):
    found = check(tiny_model(), right_trace, [("S1", "T1"), ("T1", "Q")], objective="T2")
    assert found.predicted[0] == 0 and found.measured[0] == 0 and found.relative_error[0] == 0
    assert found.measured[1].abs() > 1e-5


def test_it_holds_under_stepflow_given_made_or_attached_outside(tiny_model, right_trace, hooks_untouched):
    model, flow = tiny_model(), StepFlow(tau_max=0.5, alpha=0.5)
    hooks = flow.hooks(model, right_trace)
    plain = check(model, right_trace, PAIRS[:2])
    with hooks_untouched(model):
        found = check(model, right_trace, PAIRS[:2], fwd_hooks=hooks)
        given = check(model, right_trace, PAIRS[:2], stepflow=flow)
        made = check(model, right_trace, PAIRS[:2], fwd_hooks=lambda trace: flow.hooks(model, trace))
    assert found.max_relative_error < 1e-3
    assert not torch.allclose(found.predicted, plain.predicted, rtol=0.01)
    with model.hooks(fwd_hooks=list(hooks)):
        attached = check(model, right_trace, PAIRS[:2])
    assert torch.allclose(attached.predicted, found.predicted) and attached.max_relative_error < 1e-3
    for other in (made, found, attached):
        assert torch.equal(given.predicted, other.predicted) and torch.equal(given.measured, other.measured)


def test_patterns_that_nothing_reads_are_seen(tiny_model, right_trace):
    model = tiny_model()
    name = model.hook_dict["blocks.1.attn.hook_z"].name
    kept = []

    def remember(z, hook):
        kept.append(z.detach())
        return z if len(kept) == 1 else z * 0 + kept[0]

    # The backward pass sees a live layer, the dosed passes a dead one: prediction and measurement part.
    found = check(model, right_trace, PAIRS[:2], layers=[1], fwd_hooks=[(name, remember)])
    assert (found.measured == 0).all() and (found.relative_error == 1).all()


def test_no_hook_is_left_when_the_loss_raises(tiny_model, right_trace, hooks_untouched):
    calls = []

    def explode(logits, tokens):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("from inside")
        return logits[0, -1, 0]

    model = tiny_model()
    with hooks_untouched(model), pytest.raises(RuntimeError, match="from inside"):
        check(model, right_trace, PAIRS, objective=explode)


def test_the_table_has_a_line_a_pair(tiny_model, right_trace):
    found = check(tiny_model(), right_trace, PAIRS[:2], layers=[0])
    lines = found.table().splitlines()
    assert len(lines) == 3 and lines[1].startswith("T1     Q ") and lines[1].endswith("%")


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        (PAIRS, {"objective": "per_token"}, "no change of an edge moves only that one"),
        (PAIRS, {"eps": 0.7}, "eps is 0.7: expected a dose between 0 and 0.5"),
        (PAIRS, {"heads": [4]}, r"heads=\[4\]: the model has query heads 0..3; \[4\] are outside it"),
        (PAIRS, {"layers": [7]}, "the model has layers 0..3"),
        ([], {}, "pairs is empty"),
        ([("T9", "Q")], {}, "no step 'T9'"),
        ([("Q", "T1")], {}, r"pair \(Q, T1\): the key step comes after"),
    ],
)
def test_what_cannot_be_checked_is_an_error(tiny_model, right_trace, pairs, options, message):
    with pytest.raises(ValueError, match=message):
        check(tiny_model(), right_trace, pairs, **options)
