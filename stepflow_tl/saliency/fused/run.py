"""One exact map of a whole trace, with nothing of size `T x T` or `T x vocabulary` ever held.

1. The model runs without its unembedding; every attention call goes through `saliency_attention`.
2. For objectives made of token losses, the final residual is unembedded a few rows at a time (in one piece
   where hooks sit at the unembedding). The architecture's own code does it (logit scale, logit soft-cap): the
   causal LM is called with its base model replaced by one that returns the rows.
3. That gradient is sent back through the layers. Autograd is asked for the gradient of the anchor, a scalar
   that each attention call takes as an input, so neither the embedding nor any parameter needs a gradient,
   and nothing below the lowest layer asked for is differentiated at all.
4. Under StepFlow the attention calls of its layers apply the bridge, and momentum where the model has no hook
   points. Elsewhere nothing changes.
5. With `checkpoint=True` each block keeps only its input and is run again when its turn comes in the
   backward pass. Hooks of the caller then fire twice in that block.

Memory: activations of the layers as autograd keeps them (checkpointed: one residual per layer), the pooled
maps, one chunk of logits. A callable objective needs all logits at once: `T * vocabulary`.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed_call

from stepflow_tl.errors import FusedRefusal, GradientError
from stepflow_tl.models.attention_interface import installed, transformers_model
from stepflow_tl.models.facts import is_bridge
from stepflow_tl.models.passes import frozen, replaced_forward
from stepflow_tl.saliency.fused.session import FusedSession
from stepflow_tl.saliency.fused.steps import StepTiles
from stepflow_tl.saliency.objectives import Objective
from stepflow_tl.saliency.pooling import stack_layers
from stepflow_tl.saliency.scores import Score
from stepflow_tl.stepflow.calls import FlowCalls

LOGITS_PER_CHUNK = 1 << 24


def fused_backend(
    model: Any,
    tokens: Int[Tensor, " token"],
    step_ids: Int[Tensor, " token"],
    objective: Objective,
    layers: tuple[int, ...],
    *,
    score: Score = "saliency",
    checkpoint: bool = False,
    block_divisor: int = 1,
    flow: FlowCalls | None = None,
) -> Float[Tensor, "layer head query_step key_bin"]:
    """Step sums of the chosen layers, exact, from one forward and one backward pass.

    Arguments and result as in `hooks_backend`; `model` may also be a transformers causal LM, and only layers
    from the lowest chosen one up are differentiated. `checkpoint` runs blocks again in the backward pass:
    less memory, one more forward pass of time. `block_divisor` makes attention tiles and chunks of logits
    smaller. `flow` is what StepFlow does inside the attention calls; its hooks are the caller's to attach.

    Raises:
        FusedRefusal: If the model, a hook on it or its mask cannot be served by this backend.
        GradientError: If a layer received no gradient, or one that is not finite.
    """
    inner = transformers_model(model)
    config = inner.config.get_text_config()
    n_layers = int(config.num_hidden_layers)
    tiles = StepTiles(step_ids, int(step_ids.max()) + 1, block_divisor)
    session = FusedSession(tiles, frozenset(layers), objective.per_token, flow, score)
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), frozen(inner)):
            stack.enter_context(context)
        stack.enter_context(installed(model, session))
        if checkpoint:
            for block in _blocks(model, inner, n_layers)[min(layers) :]:
                again = partial(
                    checkpointed_call, block.forward, use_reentrant=False, preserve_rng_state=False
                )
                stack.enter_context(replaced_forward(block, again))
        batch = tokens[None].to(_input_device(inner))
        forward = inner if objective.targets is None else _base_model(inner)
        output = forward(input_ids=batch, use_cache=False)
        session.check_seen(n_layers)
        if objective.targets is None:
            root = objective.loss(output.logits, batch.to(output.logits.device))
            gradient = torch.ones_like(root)
        else:
            root = output[0]
            rows = max(16, LOGITS_PER_CHUNK // block_divisor // int(config.vocab_size))
            session.closed = True  # until blocks run again in the backward pass, if they are checkpointed
            gradient = objective.residual_gradient(
                root.detach(),
                batch,
                partial(_unembed, inner, batch),
                rows=None if _unembedding_is_hooked(model) else rows,
            )
            session.closed = False
        if gradient is None or not root.requires_grad:
            raise GradientError("the objective does not depend on any of the chosen layers' attention")
        torch.autograd.grad(root, session.anchor, gradient, allow_unused=True)
    reached = {layer: session.sums[layer] for layer in layers if session.sums[layer].reached}
    return stack_layers({layer: found.sums.cpu() for layer, found in reached.items()}, layers, "attention")


def _base_model(inner: Any) -> Any:
    """The part of a causal LM that ends at the final residual."""
    if inner.base_model is inner:
        raise FusedRefusal(f"{type(inner).__name__} does not say which part of it is its base model")
    return inner.base_model


class _Residual(dict):
    """A base model's output that consists of the final residual; every other field is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return self.get("last_hidden_state") if key == 0 else self.get(key)


def _unembed(inner: Any, batch: Tensor, residual: Tensor) -> Tensor:
    """Logits of these residual rows by the architecture's own code."""
    output = _Residual(last_hidden_state=residual)
    with replaced_forward(_base_model(inner), lambda *args, **kwargs: output):
        logits = inner(input_ids=batch[:, : residual.shape[1]], use_cache=False).logits
    if logits.shape[:2] != residual.shape[:2]:
        raise FusedRefusal(
            f"{type(inner).__name__} makes {tuple(logits.shape)} logits of {tuple(residual.shape)} residuals"
        )
    return logits


def _unembedding_is_hooked(model: Any) -> bool:
    """Whether the caller's hooks expect to see all positions' logits, or their residuals, at once."""
    points = getattr(model, "hook_dict", {}).items()
    return any(name.startswith("unembed.") and (hook.fwd_hooks or hook.bwd_hooks) for name, hook in points)


def _blocks(model: Any, inner: Any, n_layers: int) -> list[nn.Module]:
    if is_bridge(model):
        return list(model.blocks)
    for module in inner.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return list(module)
    raise FusedRefusal(f"checkpoint=True finds no list of {n_layers} blocks in {type(inner).__name__}")


def _input_device(inner: Any) -> torch.device:
    device = inner.get_input_embeddings().weight.device
    # Offloaded weights are on "meta" until their module runs; accelerate then moves the ids to them.
    return torch.device("cpu") if device.type == "meta" else device
