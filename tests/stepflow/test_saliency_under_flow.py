"""Saliency of the repaired flow: per-token rows stay exact under both hooks."""

import pytest
import torch
from tiny_models import TINY_MODEL_KINDS

from stepflow_tl import step_saliency
from stepflow_tl.saliency import backends
from stepflow_tl.saliency.hooks_backend import hooks_backend
from stepflow_tl.saliency.objectives import Objective
from stepflow_tl.stepflow import StepFlow

TOLERANCE = {"hooked": 1e-11, "native": 1e-7, "llama": 2e-6, "qwen2": 2e-6, "gemma2": 2e-6, "gpt_oss": 2e-5}


@pytest.fixture
def short_trace(make_trace):
    return make_trace("2+2?", "Add.\n\nIt is 4.", "So 4.")


def separate_rows(model, trace, hooks, rows):
    """|A dL_t/dA| at row t, each from a backward pass of L_t alone through all paths, momentum included."""
    names = [model.hook_dict[f"blocks.{layer}.attn.hook_pattern"].name for layer in range(model.cfg.n_layers)]
    found = {}
    for t in rows:
        patterns = {}

        def keep(pattern, hook, patterns=patterns):
            pattern.retain_grad()
            patterns[hook.name] = pattern

        start = (model.hook_dict["hook_embed"].name, lambda e, hook: e.detach().requires_grad_(True))
        with model.hooks(fwd_hooks=[start, *hooks, *((name, keep) for name in names)]):
            logits = model(trace.tokens[None], return_type="logits")
        loss = -logits[0, t].log_softmax(-1)[trace.tokens[t + 1]]
        loss.backward()
        found[t] = torch.stack(
            [(patterns[n].detach() * patterns[n].grad)[0, :, t].abs().double() for n in names]
        )
    return found


@pytest.mark.parametrize("kind", (*TINY_MODEL_KINDS, "gemma2", "gpt_oss"))
@pytest.mark.parametrize("granularity", ["segment", "step"])
def test_per_token_rows_equal_separate_backward_passes_under_stepflow(
    flow_model, short_trace, kind, granularity
):
    model, trace = flow_model(kind), short_trace
    flow = StepFlow(alpha=0.7, tau_max=0.3, granularity=granularity)
    each = torch.arange(len(trace))
    objective = Objective("per_token", each[1:], per_token=True)
    layers = tuple(range(model.cfg.n_layers))
    with model.hooks(fwd_hooks=flow.hooks(model, trace, detach_values=True)):
        found = hooks_backend(model, trace.tokens, each, objective, layers).double()
    with model.hooks(fwd_hooks=flow.hooks(model, trace)):
        leaking = hooks_backend(model, trace.tokens, each, objective, layers).double()
    starts = [step.token_start for step in trace.steps]
    rows = sorted({*starts, *(t - 1 for t in starts), *(t + 1 for t in starts)})
    expected = separate_rows(model, trace, flow.hooks(model, trace), rows)
    scale = torch.stack(list(expected.values())).amax((0, 2, 3))
    assert scale.min() > 1e-6
    worst = {
        name: max(
            float(((rows_found[:, :, t, : len(trace)] - expected[t]).abs().amax((1, 2)) / scale).max())
            for t in rows
        )
        for name, rows_found in (("detached", found), ("leaking", leaking))
    }
    assert worst["detached"] < TOLERANCE[kind]
    assert worst["leaking"] > 1e-3, "without detaching, later steps leak into the rows of earlier ones"


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_step_saliency_maps_the_repaired_flow(flow_model, short_trace, hooks_untouched, kind):
    model, flow = flow_model(kind), StepFlow(alpha=0.7, tau_max=0.3)
    with hooks_untouched(model):
        plain = step_saliency(model, short_trace, backend="hooks")
        repaired = step_saliency(model, short_trace, stepflow=flow, backend="hooks")
    with model.hooks(fwd_hooks=flow.hooks(model, short_trace, detach_values=True)):
        by_hand = step_saliency(model, short_trace, backend="hooks")
    assert torch.allclose(repaired.sums, by_hand.sums, rtol=1e-6)
    assert not torch.allclose(repaired.sums, plain.sums, rtol=1e-2)
    assert repaired.provenance.backend == "hooks"
    assert repaired.provenance.notes["stepflow"] == repr(flow)


@pytest.mark.parametrize("backend", ["auto", "hooks", "layerwise"])
def test_the_self_check_runs_without_the_flow_even_at_first_use(flow_model, short_trace, backend):
    model = flow_model("qwen2") if "qwen2" in TINY_MODEL_KINDS else flow_model("hooked")
    backends._checked.pop(model, None)
    for flow in (StepFlow(), StepFlow(tau_max=0)):
        notes = step_saliency(model, short_trace, stepflow=flow, backend=backend).provenance.notes
        assert "max relative deviation" in notes["self_check"]


@pytest.mark.parametrize("kind", [kind for kind in TINY_MODEL_KINDS if kind in ("llama", "qwen2")])
@pytest.mark.parametrize("objective", ["per_token", "response"])
def test_momentum_alone_goes_with_the_fused_backend(flow_model, short_trace, kind, objective):
    model, flow = flow_model(kind), StepFlow(alpha=0.7, tau_max=0)
    fused = step_saliency(model, short_trace, objective=objective, stepflow=flow)
    hooks = step_saliency(model, short_trace, objective=objective, stepflow=flow, backend="hooks")
    plain = step_saliency(model, short_trace, objective=objective)
    assert fused.provenance.backend == "fused"
    scale = hooks.sums.amax((1, 2, 3), keepdim=True)
    # The eager softmax of these models runs in float32; its rounding passes through eight layers.
    assert ((fused.sums - hooks.sums).abs() / scale).max() < 1e-5
    assert not torch.allclose(fused.sums, plain.sums, rtol=1e-2)
