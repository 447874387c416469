"""Whole maps of the repaired flow, against the hooks backend."""

import pytest
import torch
from tiny_architectures import ATTENTION_VARIETIES, build_bridge, build_hf_model

from stepflow_tl import step_saliency
from stepflow_tl.errors import FusedRefusal, ModelError
from stepflow_tl.stepflow import StepFlow
from stepflow_tl.trace import ReasoningTrace

# Both halves on everywhere; in two layers both at once.
BOTH = dict(tau_max=0.4, max_bridge_share=0.6, alpha=0.7, shallow=(0, 1, 2), deep=(1, 2, 3))


def last_logits(logits, tokens):
    return logits[0, -2, 7] - logits[0, -9, 9]


CASES = {
    "per_token": StepFlow(**BOTH),
    "response": StepFlow(**BOTH, granularity="step"),
    "summary": StepFlow(**BOTH, placebo="both", seed=5),
    last_logits: StepFlow(**BOTH, granularity="step", placebo="bridge", heads={0: [1], 1: [0, 3], 3: [2]}),
}


@pytest.fixture(scope="module")
def trace(tiny_tokenizer):
    """Ragged steps, two of them of one token."""
    thinking = "Two and two.\n\nIt is 4, as I said before\n\nno\n\nX"
    made = ReasoningTrace.from_parts(tiny_tokenizer, "What is 2+2?", thinking, "It is four.\n\n4")
    assert min(step.n_tokens for step in made.steps) == 1 and len(made) % 16
    return made


def close(ours, theirs, tolerance):
    assert theirs.sums.abs().sum() > 0
    for name in ("sums", "template_sums"):
        mine, reference = getattr(ours, name), getattr(theirs, name)
        scale = reference.abs().amax((1, 2, 3) if name == "sums" else (1, 2))
        error = (mine - reference).abs().amax((1, 2, 3) if name == "sums" else (1, 2))
        assert bool((error <= tolerance * scale.clamp_min(1e-30)).all()), (name, (error / scale).tolist())


@pytest.mark.parametrize("name", ATTENTION_VARIETIES)
def test_fused_equals_hooks_under_stepflow(name, trace, float64_throughout):
    model = build_bridge(name)
    plain_model = build_hf_model(name)
    for objective, flow in CASES.items():
        hooks = flow.hooks(model, trace)
        with torch.no_grad():
            model.run_with_hooks(trace.tokens[None], fwd_hooks=hooks)
        report = hooks.report()
        assert (
            0 < report.adjusted < sum(report.of(layer).rows for layer in flow.shallow) and report.injections
        )
        theirs = step_saliency(model, trace, objective=objective, stepflow=flow, backend="hooks")
        ours = step_saliency(model, trace, objective=objective, stepflow=flow)
        plain = step_saliency(plain_model, trace, objective=objective, stepflow=flow)
        assert ours.provenance.backend == plain.provenance.backend == "fused"
        assert ours.provenance.notes["stepflow"] == repr(flow)
        close(ours, theirs, 1e-8)
        close(plain, theirs, 1e-8)
        assert step_saliency(model, trace, objective=objective).sums.sub(ours.sums).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION_VARIETIES)
def test_fused_equals_hooks_in_the_cut_score_under_stepflow(name, trace, float64_throughout):
    model = build_bridge(name)
    for objective, case in (("per_token", "per_token"), ("log_odds", "response"), ("response", "summary")):
        arguments = dict(objective=objective, stepflow=CASES[case], score="cut")
        theirs = step_saliency(model, trace, **arguments, backend="hooks")
        ours = step_saliency(model, trace, **arguments)
        assert ours.provenance.backend == "fused" and (ours.sums < 0).any()
        close(ours, theirs, 1e-8)
        close(step_saliency(build_hf_model(name), trace, **arguments), theirs, 1e-8)
        plain = step_saliency(model, trace, objective=objective, score="cut")
        assert plain.sums.sub(ours.sums).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION_VARIETIES)
def test_in_float32_and_in_compatibility_mode(name, trace):
    for in_compatibility_mode in {False, name in ("llama", "gemma2", "gpt_oss")}:
        model = build_bridge(name, dtype=torch.float32, compatibility_mode=in_compatibility_mode)
        for objective in ("per_token", "response"):
            arguments = dict(objective=objective, stepflow=CASES[objective])
            close(
                step_saliency(model, trace, **arguments),
                step_saliency(model, trace, **arguments, backend="hooks"),
                1e-4,
            )


@pytest.mark.parametrize("objective", ["per_token", "response"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_tiles_checkpoints_and_layers_change_nothing(name, objective, trace, tile_size):
    flow = CASES[objective]
    for model in (build_bridge(name), build_hf_model(name)):
        arguments = dict(objective=objective, stepflow=flow)
        whole = step_saliency(model, trace, **arguments)
        again = step_saliency(model, trace, **arguments, checkpoint=True, block_divisor=2)
        close(again, whole, 1e-9)
        some = step_saliency(model, trace, **arguments, layers=(3, 1), checkpoint=True)
        torch.testing.assert_close(some.sums, whole.sums[[3, 1]], rtol=1e-9, atol=1e-12)


def test_a_hook_on_scores_still_needs_hooks_and_checkpointing_still_refuses_it(trace):
    model = build_bridge("llama")
    listener = [("blocks.0.attn.hook_attn_scores", lambda scores, hook: None)]
    arguments = dict(objective="response", stepflow=StepFlow(**BOTH), fwd_hooks=listener)
    assert step_saliency(model, trace, **arguments).provenance.backend == "hooks"
    with pytest.raises(FusedRefusal, match="hook_attn_scores"):
        step_saliency(model, trace, **arguments, checkpoint=True)


def test_layers_and_heads_that_do_not_exist_are_named_on_a_transformers_model(trace):
    model = build_hf_model("llama")
    with pytest.raises(ModelError, match="layers"):
        step_saliency(model, trace, stepflow=StepFlow(shallow=[9]))
    with pytest.raises(ModelError, match="heads"):
        step_saliency(model, trace, stepflow=StepFlow(heads=[7]))


def test_a_flow_without_strength_changes_no_bit(trace):
    model = build_hf_model("llama")
    plain = step_saliency(model, trace)
    off = step_saliency(model, trace, stepflow=StepFlow(tau_max=0, alpha=0))
    assert torch.equal(off.sums, plain.sums)
