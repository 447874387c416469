"""`step_saliency` from trace to result: shapes, layers, provenance, the self-check, and every refusal."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FLOAT64_KINDS, TINY_MODEL_KINDS, build_tiny_model
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaForCausalLM

from stepflow_tl import StepFlow, step_saliency
from stepflow_tl.errors import ModelError
from stepflow_tl.trace import ReasoningTrace


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_a_trace_goes_in_and_a_labelled_map_comes_out(tiny_model, tiny_trace, hooks_untouched, kind):
    model = tiny_model(kind)
    with hooks_untouched(model):
        saliency = step_saliency(model, tiny_trace)
    n_steps = len(tiny_trace.steps)
    assert saliency.sums.shape == (4, 4, n_steps, n_steps)
    assert saliency.template_sums.shape == (4, 4, n_steps)
    assert saliency.labels == ["Q", "T1", "T2", "T3", "S1"]
    assert (saliency.sums >= 0).all() and (saliency.sums.sum((1, 2, 3)) > 0).all()
    above = torch.triu(torch.ones(n_steps, n_steps, dtype=torch.bool), diagonal=1)
    assert (saliency.sums[..., above] == 0).all(), "no step draws on a later one"
    assert (saliency.template_sums.sum((1, 2)) > 0).all()
    provenance = saliency.provenance
    assert provenance.objective == "per_token"
    assert provenance.backend == ("hooks" if kind in FLOAT64_KINDS else "fused")
    assert provenance.versions["torch"] == torch.__version__
    assert "max relative deviation" in provenance.notes["self_check"]


def test_a_selection_of_layers_is_what_the_whole_map_holds_there(tiny_model, tiny_trace):
    model = tiny_model()
    whole = step_saliency(model, tiny_trace)
    some = step_saliency(model, tiny_trace, layers=[3, 1])
    assert some.layers == (3, 1) and some.n_layers == 4
    assert torch.equal(some.sums, whole.sums[[3, 1]])
    assert torch.equal(whole.select([3, 1]).template_sums, some.template_sums)
    assert torch.equal(whole.head_mean(layers=[1])[0], whole.pooled()[1].mean(0))


def test_an_objective_of_one_step_leaves_later_rows_empty(tiny_model, tiny_trace):
    saliency = step_saliency(tiny_model(), tiny_trace, objective="T2")
    assert (saliency.sums[:, :, 2].sum((1, 2)) > 0).all()
    assert (saliency.sums[:, :, 3:] == 0).all()


def test_float32_agrees_with_float64(tiny_model, tiny_trace, tiny_tokenizer):
    double_model = tiny_model()
    single_model = build_tiny_model(tokenizer=tiny_tokenizer, dtype=torch.float32)
    for single, double in zip(single_model.parameters(), double_model.parameters(), strict=True):
        single.data.copy_(double.data)
    double = step_saliency(double_model, tiny_trace)
    single = step_saliency(single_model, tiny_trace)
    assert single.sums.dtype == torch.float32 and double.sums.dtype == torch.float64
    scale = double.sums.amax((1, 2, 3), keepdim=True)
    assert ((single.sums - double.sums).abs() / scale).max() < 1e-4


def test_the_self_check_is_left_out_under_foreign_hooks_and_says_so(tiny_trace, tiny_tokenizer):
    model = build_tiny_model(tokenizer=tiny_tokenizer)
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda pattern, hook: None)]):
        assert "not run" in step_saliency(model, tiny_trace).provenance.notes["self_check"]
    assert "max relative deviation" in step_saliency(model, tiny_trace).provenance.notes["self_check"]


def test_a_model_that_mixes_positions_outside_attention_is_refused_for_per_token(tiny_trace, tiny_tokenizer):
    model = build_tiny_model(tokenizer=tiny_tokenizer)
    mix = model.blocks[1].mlp.register_forward_pre_hook(
        lambda mlp, x: (x[0] + 0.5 * x[0].roll(1, dims=1), *x[1:])
    )
    with pytest.raises(ModelError, match=r"per_token' cannot be served.*mixes positions.*'response'"):
        step_saliency(model, tiny_trace)
    assert step_saliency(model, tiny_trace, objective="response").sums.sum() > 0
    mix.remove()
    assert step_saliency(model, tiny_trace).sums.sum() > 0, "without the mixing the same model is served"


@pytest.mark.parametrize("layers", [[4], [-1], [], [1, 1]])
def test_layers_the_model_does_not_have_are_refused(tiny_model, tiny_trace, layers):
    with pytest.raises(ModelError, match=r"the model has layers 0\.\.3"):
        step_saliency(tiny_model(), tiny_trace, layers=layers)


def test_tokens_outside_the_vocabulary_are_named(tiny_model, tiny_trace):
    small = tiny_model(d_vocab=100)
    first = int((tiny_trace.tokens >= 100).nonzero()[0])
    bad = int(tiny_trace.tokens[first])
    message = f"token id {bad} at position {first} is outside the model's vocabulary of 100"
    with pytest.raises(ModelError, match=message):
        step_saliency(small, tiny_trace)


def test_a_trace_longer_than_the_context_is_refused(tiny_model, tiny_trace):
    with pytest.raises(
        ModelError, match=rf"{len(tiny_trace)} tokens, but the model's context holds 32: shorten"
    ):
        step_saliency(tiny_model(n_ctx=32), tiny_trace)


def test_something_that_is_no_transformerlens_model_is_refused(tiny_trace):
    with pytest.raises(ModelError, match="Linear is neither a TransformerLens model.*boot_transformers"):
        step_saliency(torch.nn.Linear(2, 2), tiny_trace)


def test_a_layer_without_a_pattern_hook_is_named(tiny_model, tiny_trace):
    model = tiny_model()
    blind = SimpleNamespace(
        hook_dict={
            name: hook for name, hook in model.hook_dict.items() if name != "blocks.2.attn.hook_pattern"
        },
        hooks=model.hooks,
        cfg=model.cfg,
        blocks=model.blocks,
    )
    with pytest.raises(ModelError, match=r"layer 2 has no `blocks\.2\.attn\.hook_pattern`"):
        step_saliency(blind, tiny_trace)


def test_an_unknown_backend_is_named(tiny_model, tiny_trace):
    with pytest.raises(Exception, match="eager"):
        step_saliency(tiny_model(), tiny_trace, backend="eager")


def test_a_last_token_that_stands_alone_in_its_step_has_an_empty_row(tiny_model, tiny_tokenizer):
    trace = ReasoningTrace.from_parts(tiny_tokenizer, "Q?", "A b.\n\nC")
    assert trace.steps[-1].token_end == len(trace) and trace.steps[-1].n_tokens == 1
    saliency = step_saliency(tiny_model(), trace)
    assert (saliency.sums[:, :, -1] == 0).all(), "nothing follows the last token, so it has no L_t"


BRIDGED_KINDS = [kind for kind in TINY_MODEL_KINDS if kind not in FLOAT64_KINDS]


@pytest.mark.parametrize("kind", BRIDGED_KINDS)
@pytest.mark.parametrize("objective", ["per_token", "response"])
def test_auto_takes_fused_and_agrees_with_hooks(tiny_model, tiny_trace, hooks_untouched, kind, objective):
    model = tiny_model(kind)
    with hooks_untouched(model):
        auto = step_saliency(model, tiny_trace, objective=objective)
        lean = step_saliency(model, tiny_trace, objective=objective, checkpoint=True)
        hooks = step_saliency(model, tiny_trace, objective=objective, backend="hooks")
    assert (auto.provenance.backend, hooks.provenance.backend) == ("fused", "hooks")
    scale = hooks.sums.amax((1, 2, 3), keepdim=True)
    assert ((auto.sums - hooks.sums).abs() / scale).max() < 2e-6
    assert ((auto.template_sums - hooks.template_sums).abs() / scale[..., 0]).max() < 2e-6
    assert torch.allclose(auto.sums, lean.sums, rtol=1e-12)


@pytest.mark.parametrize("kind", BRIDGED_KINDS)
def test_a_pattern_hook_makes_auto_fall_back_and_fused_refuse(tiny_model, tiny_trace, kind):
    model = tiny_model(kind)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern * 1.0)]):
        saliency = step_saliency(model, tiny_trace)
        with pytest.raises(
            ModelError, match=r"'fused' cannot serve this run: .*hook_pattern.*Use backend='hooks'"
        ):
            step_saliency(model, tiny_trace, backend="fused")
    assert saliency.provenance.backend == "hooks"
    assert "hook_pattern" in saliency.provenance.notes["not_fused"]


@pytest.mark.parametrize("kind", BRIDGED_KINDS)
def test_fused_composes_with_a_hook_on_the_residual(tiny_model, tiny_trace, kind):
    model = tiny_model(kind)
    steer = [("blocks.1.hook_resid_pre", lambda residual, hook: residual * 1.3 + 0.1)]
    plain = step_saliency(model, tiny_trace)
    with model.hooks(fwd_hooks=[(model.hook_dict[name].name, hook) for name, hook in steer]):
        fused = step_saliency(model, tiny_trace, backend="fused")
        hooks = step_saliency(model, tiny_trace, backend="hooks")
    scale = hooks.sums.amax((1, 2, 3), keepdim=True)
    assert ((fused.sums - hooks.sums).abs() / scale).max() < 2e-6
    assert not torch.allclose(plain.sums, fused.sums, rtol=1e-2)


def test_a_plain_transformers_model_is_served_by_fused(tiny_model, tiny_trace, tiny_tokenizer):
    torch.manual_seed(0)
    plain = LlamaForCausalLM(tiny_model("llama").original_model.config).double().eval()
    bridge = TransformerBridge.boot_transformers(
        "tiny", hf_model=deepcopy(plain), tokenizer=tiny_tokenizer, device="cpu", dtype=torch.float64
    )
    expected = step_saliency(bridge, tiny_trace, backend="hooks")
    found = step_saliency(plain, tiny_trace)
    assert found.provenance.backend == "fused"
    scale = expected.sums.amax((1, 2, 3), keepdim=True)
    assert scale.min() > 0 and ((found.sums - expected.sums).abs() / scale).max() < 2e-6


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
@pytest.mark.parametrize("objective", ["per_token", "response"])
def test_layerwise_agrees_with_hooks(tiny_model, tiny_trace, hooks_untouched, kind, objective):
    model = tiny_model(kind)
    with hooks_untouched(model):
        layerwise = step_saliency(model, tiny_trace, objective=objective, backend="layerwise")
        hooks = step_saliency(model, tiny_trace, objective=objective, backend="hooks")
    assert layerwise.provenance.backend == "layerwise"
    assert torch.allclose(layerwise.sums, hooks.sums, rtol=1e-6)


def test_checkpointing_goes_with_fused_only(tiny_model, tiny_trace):
    with pytest.raises(ValueError, match="checkpoint=True needs backend='fused'"):
        step_saliency(tiny_model(), tiny_trace, backend="hooks", checkpoint=True)
    with pytest.raises(ModelError, match="cannot serve this run"):
        step_saliency(tiny_model(FLOAT64_KINDS[0]), tiny_trace, checkpoint=True)


def dampen(tensor, hook):
    return tensor * torch.linspace(0.5, 1.5, tensor.shape[-1], dtype=tensor.dtype)


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
@pytest.mark.parametrize("where", ["hook_resid_pre", "attn.hook_z", "attn.hook_pattern"])
@pytest.mark.parametrize("backend", ["auto", "hooks", "layerwise"])
def test_fwd_hooks_give_the_map_of_hooks_attached_around_the_call(
    tiny_model, tiny_trace, hooks_untouched, kind, where, backend
):
    model = tiny_model(kind)
    edits = [(f"blocks.{layer}.{where}", dampen) for layer in (1, 2)]
    with hooks_untouched(model):
        found = step_saliency(model, tiny_trace, backend=backend, fwd_hooks=edits)
        plain = step_saliency(model, tiny_trace, backend=backend)
    with model.hooks(fwd_hooks=[(model.hook_dict[name].name, hook) for name, hook in edits]):
        around = step_saliency(model, tiny_trace, backend=backend)
    assert torch.equal(found.sums, around.sums) and torch.equal(found.template_sums, around.template_sums)
    assert not torch.allclose(found.sums, plain.sums, rtol=1e-2)
    assert found.provenance.backend == around.provenance.backend
    assert found.provenance.notes["fwd_hooks"] == f"blocks.1.{where}, blocks.2.{where}"
    assert "max relative deviation" in found.provenance.notes["self_check"], "the check runs without them"


@pytest.mark.parametrize("kind", BRIDGED_KINDS)
def test_auto_takes_hooks_only_where_fwd_hooks_listen_at_scores_or_patterns(tiny_model, tiny_trace, kind):
    model = tiny_model(kind)
    chosen = {}
    for where in ("hook_attn_scores", "hook_pattern", "hook_q", "hook_z"):
        edits = [(f"blocks.1.attn.{where}", lambda tensor, hook: None)]
        chosen[where] = step_saliency(model, tiny_trace, fwd_hooks=edits).provenance.backend
    assert chosen == {
        "hook_attn_scores": "hooks",
        "hook_pattern": "hooks",
        "hook_q": "fused",
        "hook_z": "fused",
    }
    with pytest.raises(ModelError, match=r"'fused' cannot serve this run: .*hook_pattern"):
        edits = [("blocks.1.attn.hook_pattern", dampen)]
        step_saliency(model, tiny_trace, backend="fused", fwd_hooks=edits)


@pytest.mark.parametrize("backend", ["auto", "layerwise"])
def test_fwd_hooks_as_a_function_of_the_trace_run_before_stepflow(tiny_model, tiny_trace, backend):
    model, flow = tiny_model(), StepFlow(alpha=0.7, tau_max=0.3)
    edit = ("blocks.0.attn.hook_pattern", dampen)
    both = step_saliency(
        model, tiny_trace, backend=backend, stepflow=flow, fwd_hooks=lambda t: [edit] * (t is tiny_trace)
    )
    with model.hooks(fwd_hooks=[edit]):
        around = step_saliency(model, tiny_trace, backend=backend, stepflow=flow)
    assert torch.equal(both.sums, around.sums)
    for part in ({"stepflow": flow}, {"fwd_hooks": [edit]}):
        alone = step_saliency(model, tiny_trace, backend=backend, **part)
        assert not torch.allclose(both.sums, alone.sums, rtol=1e-3)


def test_fwd_hooks_on_a_model_without_hook_points_are_refused(tiny_model, tiny_trace):
    plain = LlamaForCausalLM(tiny_model("llama").original_model.config).eval()
    with pytest.raises(ModelError, match="LlamaForCausalLM has no hook points for `fwd_hooks`: wrap it"):
        step_saliency(plain, tiny_trace, fwd_hooks=[("blocks.0.attn.hook_z", dampen)])
