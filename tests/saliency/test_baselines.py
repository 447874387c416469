"""Other scores, each against its definition written out on captured tensors."""

import pytest
import torch
from tiny_models import TINY_MODEL_KINDS, build_tiny_model

from stepflow_tl.saliency.baselines import BASELINES, baseline_maps


def captured(model, trace):
    """Patterns with their gradients, and each head's output weights times values, by layer."""
    patterns, values = {}, {}
    names = {}
    for layer in range(model.cfg.n_layers):
        names[model.hook_dict[f"blocks.{layer}.attn.hook_pattern"].name] = ("pattern", layer)
        names[model.hook_dict[f"blocks.{layer}.attn.hook_v"].name] = ("value", layer)

    def keep(tensor, hook):
        kind, layer = names[hook.name]
        if kind == "pattern":
            tensor.retain_grad()
            patterns[layer] = tensor
        else:
            values[layer] = tensor.detach()

    embed = model.hook_dict["hook_embed"].name
    hooks = [(embed, lambda e, hook: e.detach().requires_grad_(True)), *((name, keep) for name in names)]
    with model.hooks(fwd_hooks=hooks):
        logits = model(trace.tokens[None], return_type="logits")
    targets = [t for t in range(1, len(trace)) if int(trace.segment_ids[t]) >= 2]
    log_probs = logits[0].double().log_softmax(-1)
    loss = -torch.stack([log_probs[t - 1, trace.tokens[t]] for t in targets]).mean()
    loss.backward()
    return patterns, values


def pooled(trace, tokens):
    n = len(trace.steps)
    out = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            block = tokens[trace.step_ids == i][:, trace.step_ids == j]
            out[i, j] = block.double().sum()
    return out


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_every_baseline_is_what_it_says(kind, tiny_trace, tiny_tokenizer):
    model = build_tiny_model(kind, tokenizer=tiny_tokenizer)
    found = baseline_maps(model, tiny_trace)
    patterns, values = captured(model, tiny_trace)
    assert tuple(found) == BASELINES
    n_heads, n_layers = model.cfg.n_heads, model.cfg.n_layers
    rollout = torch.eye(len(tiny_trace), dtype=torch.float64)
    for layer in range(n_layers):
        pattern = patterns[layer][0].detach().double()
        mixed = torch.zeros_like(rollout)
        for head in range(n_heads):
            mixed += pattern[head] / n_heads
        rollout = 0.5 * (mixed + torch.eye(len(tiny_trace))) @ rollout
        assert torch.allclose(found["rollout"][layer, 0].double(), pooled(tiny_trace, rollout), atol=1e-4)
        value = values[layer][0].reshape(len(tiny_trace), -1, model.cfg.d_head)
        for head in range(n_heads):
            own = value[:, head * value.shape[1] // n_heads].double()
            moved = (own @ model.blocks[layer].attn.W_O[head].double()).norm(dim=-1)
            expected = {
                "attention": pattern[head],
                "value_weighted": pattern[head] * moved[None, :],
                "gradient": patterns[layer].grad[0, head].abs(),
            }
            for name, tokens in expected.items():
                got, wanted = found[name][layer, head].double(), pooled(tiny_trace, tokens)
                assert wanted.abs().sum() > 0
                assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))


def test_nothing_stays_attached(tiny_trace, tiny_tokenizer, hooks_untouched):
    model = build_tiny_model(tokenizer=tiny_tokenizer)
    with hooks_untouched(model):
        baseline_maps(model, tiny_trace)
