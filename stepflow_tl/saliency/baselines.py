"""Other ways to say where a step looks, to hold Step-Saliency against.

- `attention`: the pattern A.
- `value_weighted`: `A[t, k] * |v[k] W_O|`, attention times the size of what it moves (Kobayashi et al. 2020,
  arXiv 2004.10102).
- `gradient`: `|dL/dA|` without A, of the mean NLL of the response.
- `rollout`: `prod (A + I) / 2` over the layers up to this one, heads averaged (Abnar and Zuidema 2020, arXiv
  2005.00928).

Each is pooled into the same step pairs as a saliency map, by sums. All need the patterns of every layer:
memory `O(L H T^2)`, as the hooks backend. For short traces and comparisons.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.models.facts import expand_heads
from stepflow_tl.models.hook_names import by_heads, resolve_hooks
from stepflow_tl.models.passes import attached, frozen, model_device
from stepflow_tl.saliency.objectives import resolve_objective
from stepflow_tl.saliency.pooling import step_bins
from stepflow_tl.trace import ReasoningTrace

BASELINES = ("attention", "value_weighted", "gradient", "rollout")


def baseline_maps(
    model: Any, trace: ReasoningTrace
) -> dict[str, Float[Tensor, "layer head query_step key_step"]]:
    """Step sums of every baseline, on the CPU; `rollout` has one head.

    Args:
        model: A TransformerLens model whose patterns are live.
        trace: The trace, in this model's token ids, with a response.

    Raises:
        ModelError: If a hook point is missing or never fires.
        ObjectiveError: If the trace has no response token.
    """
    hooks = resolve_hooks(model).layers
    patterns: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    pairs: list[Any] = []
    for h in hooks:
        if h.value is None:
            raise ModelError(f"layer {h.layer} has no hook point for its values: no value-weighted attention")
        pairs.append((h.pattern, partial(_keep_with_gradient, kept=patterns, layer=h.layer)))
        pairs.append((h.value, by_heads(model, h.value, partial(_keep, kept=values, layer=h.layer))))
    with frozen(model), torch.inference_mode(False), torch.enable_grad(), attached(model, last=pairs):
        batch = trace.tokens[None].to(model_device(model))
        loss = resolve_objective("response", trace).loss(model(batch, return_type="logits"), batch)
        silent = [h.pattern for h in hooks if h.layer not in patterns or h.layer not in values]
        if silent:
            raise ModelError(f"{', '.join(silent[:3])} never fired: boot the model with eager attention")
        layers = sorted(patterns)
        gradients = torch.autograd.grad(loss, [patterns[layer] for layer in layers])
    one_hot = step_bins(trace.step_ids, dtype=torch.float32, device=batch.device)[:, :-1]
    found: dict[str, list[Tensor]] = {name: [] for name in BASELINES}
    rollout = torch.eye(len(trace), device=batch.device)
    for layer, gradient in zip(layers, gradients, strict=True):
        pattern = patterns[layer][0].detach().float()
        rollout = (pattern.mean(0) + torch.eye(len(trace), device=batch.device)) / 2 @ rollout
        moved = _output_norms(model, layer, values[layer], pattern.shape[0])
        for name, tokens in (
            ("attention", pattern),
            ("value_weighted", pattern * moved[:, None, :]),
            ("gradient", gradient[0].float().abs()),
            ("rollout", rollout[None]),
        ):
            found[name].append((one_hot.T @ tokens @ one_hot).cpu())
    return {name: torch.stack(maps) for name, maps in found.items()}


def _keep_with_gradient(pattern: Tensor, hook: Any, *, kept: dict[int, Tensor], layer: int) -> Tensor:
    kept[layer] = pattern if pattern.requires_grad else pattern.detach().requires_grad_(True)
    return kept[layer]


def _keep(value: Tensor, hook: Any, *, kept: dict[int, Tensor], layer: int) -> None:
    kept[layer] = value.detach()


def _output_norms(model: Any, layer: int, value: Tensor, n_heads: int) -> Float[Tensor, "head token"]:
    """Length of what each head writes into the residual if it attends to one token only."""
    weight = model.blocks[layer].attn.W_O.detach().float()  # [head, d_head, d_model]
    value = value[0].detach().float()
    value = value.reshape(value.shape[0], -1, weight.shape[1])  # [token, kv_head, d_head]
    value = expand_heads(value, n_heads, dim=1)
    return torch.einsum("thd,hdm->htm", value, weight).norm(dim=-1)
