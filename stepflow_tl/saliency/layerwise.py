"""The `layerwise` backend: one block's patterns at a time, from cached residuals, the last block first.

1. One forward pass up to the last block keeps the residual that enters each block (`block_calls`).
2. The gradient at the final residual comes from the model's own final norm and unembedding. They work on
   each position by itself, so NLL objectives take them a few hundred rows at a time. A callable objective,
   or a hook outside the blocks that may know its positions, gets the logits of the whole trace, once.
3. From the last block down to the lowest layer asked for: run the block again from its residual, this time
   with pattern gradient hooks (and `PositionLocalGradients` for `per_token`), pool `|A * dL/dA|`, pass the
   gradient on to the residual below, and let the block's graph go.
4. Every block must give the same output again; if not, a hook with state (a counter, random numbers) is at
   work, and that is an error.

The numbers are those of the `hooks` backend, for HookedTransformer and TransformerBridge alike. Hooks from
outside stay in force: inside a block they run twice (forward pass, second run), at the embeddings twice
(forward pass, tail), at the final norm and unembedding once, backward hooks once.

Memory `O(H T^2 + L T d_model)` where the `hooks` backend takes `O(L H T^2)`. Cost: a second forward pass
through the blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.models.block_calls import BlockCall, RecordedBlocks, record_blocks, run_tail
from stepflow_tl.models.hook_names import LayerHooks, hook_counts, resolve_hooks
from stepflow_tl.models.passes import attached, frozen, model_device
from stepflow_tl.saliency.objectives import Objective, token_nll
from stepflow_tl.saliency.position_local import PositionLocalGradients
from stepflow_tl.saliency.reference import PatternTaps

_TAIL_ROWS = 256
# A second run of the same operations on the same numbers; kernels may still sum in another order.
_SAME_OUTPUT = {torch.float64: 1e-8, torch.float32: 1e-4}
_SAME_OUTPUT_HALF = 0.05


def layerwise_backend(
    model: Any,
    tokens: Int[Tensor, " token"],
    step_ids: Int[Tensor, " token"],
    objective: Objective,
    layers: tuple[int, ...],
) -> Float[Tensor, "layer head query_step key_bin"]:
    """Step sums of the chosen layers, with the patterns of one layer in memory at a time.

    Args:
        model: A TransformerLens model.
        tokens: The trace's token ids.
        step_ids: Step of each token, -1 on TEMPLATE.
        objective: What is differentiated.
        layers: Model layers to pool, in order; no block below the lowest runs a second time.

    Returns:
        Sums of `|A * dL/dA|` on the CPU, in at least float32; the last key bin is TEMPLATE.

    Raises:
        ModelError: If the model lacks a hook point, a pattern hook never fires, blocks share more than the
            residual, or a block's second run gives another output.
        GradientError: If a pattern gets no gradient, or one that is not finite.
        ObjectiveError: If a callable objective does not return a differentiable scalar.
    """
    resolved = resolve_hooks(model, None if objective.per_token else layers).layers
    hooks = {layer_hooks.layer: layer_hooks for layer_hooks in resolved}
    taps = PatternTaps(step_ids, layers)
    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        batch = tokens[None].to(model_device(model))
        recorded = record_blocks(model, batch, lowest=min(layers))
        calls, output = recorded.calls, recorded.final_residual
        grad = _gradient_at_final_residual(model, recorded, objective, batch)
        del recorded
        while calls and grad is not None:
            layer, call = calls.popitem()
            local = PositionLocalGradients(model, (hooks[layer],)) if objective.per_token else None
            tapped = hooks[layer] if layer in layers else None
            rerun, leaf = _run_again(model, layer, call, taps, local, tapped)
            _check_same(rerun.detach(), output, layer)
            output = call.residual
            grad = _gradient_below(rerun, leaf, grad, taps)
            del rerun, leaf, call, local
    return taps.collect()


def _gradient_at_final_residual(
    model: Any, recorded: RecordedBlocks, objective: Objective, batch: Int[Tensor, "1 token"]
) -> Float[Tensor, "1 token d_model"] | None:
    final, sizes = recorded.final_residual, recorded.output_sizes
    if objective.targets is None or any(not name.startswith("blocks.") for name in hook_counts(model)):
        leaf = final.clone().requires_grad_(True)
        loss = objective.loss(run_tail(model, sizes, batch, leaf), batch)
        return torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    gradient = torch.zeros_like(final)
    weight = 1.0 if objective.per_token else 1.0 / len(objective.targets)
    for targets in objective.targets.to(final.device).split(_TAIL_ROWS):
        leaf = final[:, targets - 1].requires_grad_(True)
        targets_at_input = targets.to(batch.device)
        logits = run_tail(model, sizes, batch[:, targets_at_input - 1], leaf)
        nll = token_nll(logits[0], batch[0, targets_at_input].to(logits.device))
        del logits
        (grad,) = torch.autograd.grad(nll.sum() * weight, leaf)
        gradient.index_add_(1, targets - 1, grad)
        del nll
    return gradient


def _run_again(
    model: Any,
    layer: int,
    call: BlockCall,
    taps: PatternTaps,
    local: PositionLocalGradients | None,
    tapped: LayerHooks | None,
) -> tuple[Float[Tensor, "1 token d_model"], Float[Tensor, "1 token d_model"]]:
    """One block with graph: what leaves it, and the leaf that enters it."""
    leaf = call.residual.detach().requires_grad_(True)
    last = list(local.last) if local is not None else []
    last += [(tapped.pattern, partial(taps.attach, layer=layer))] if tapped is not None else []
    with attached(model, first=local.first if local is not None else (), last=last):
        output = call.run(leaf)
    if tapped is not None and layer not in taps.fired:
        raise ModelError(
            f"the pattern hook `{tapped.pattern}` never fired: this attention implementation does not "
            "compute patterns at its hook points. Boot the model with eager attention."
        )
    if local is not None and layer not in local.completed:
        raise ModelError(
            f"`hook_z` never fired in layers {[layer]}: objective='per_token' cannot be served here"
        )
    return output, leaf


def _gradient_below(
    output: Float[Tensor, "1 token d_model"],
    leaf: Float[Tensor, "1 token d_model"],
    grad: Float[Tensor, "1 token d_model"],
    taps: PatternTaps,
) -> Float[Tensor, "1 token d_model"] | None:
    """Backward through one block; patterns are pooled on the way. None where the residual is cut."""
    if not output.requires_grad:
        return None
    leaves = [leaf, *taps.leaves]
    taps.leaves.clear()
    return torch.autograd.grad(output, leaves, grad.to(output.device), allow_unused=True)[0]


def _check_same(
    found: Float[Tensor, "1 token d_model"], expected: Float[Tensor, "1 token d_model"], layer: int
) -> None:
    """A block that gives another output the second time would give another model's map."""
    expected = expected.to(found.device)
    tolerance = _SAME_OUTPUT.get(found.dtype, _SAME_OUTPUT_HALF)
    scale = float(expected.nan_to_num(0, 0, 0).abs().max())
    if found.shape != expected.shape or not torch.allclose(
        found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True
    ):
        raise ModelError(
            f"block {layer} gave another output when it was run a second time: a hook with state (a counter, "
            "random numbers) or a random layer is at work in it. Make it depend on its input alone, or use "
            "backend='hooks', which runs every hook once."
        )
