"""One exact map of a whole trace, with nothing of size `T x T` or `T x vocabulary` ever held.

1. The model runs without its unembedding; every attention call goes through `saliency_attention`.
2. For objectives made of token losses, the final residual is unembedded a few rows at a time: logits, loss,
   gradient with respect to those rows, and on (in one piece where hooks sit at the unembedding). The
   architecture's own code does it (logit scale, logit soft-cap): the causal LM is called with its base
   model replaced by one that returns the rows.
3. That gradient is sent back through the layers. Autograd is asked for the gradient of the anchor, a scalar
   that each attention call takes as an input, so neither the embedding nor any parameter needs a gradient,
   and nothing below the lowest layer asked for is differentiated at all.
4. With `checkpoint=True` each block keeps only its input and is run again when its turn comes in the
   backward pass. Hooks of the caller then fire twice in that block.

Memory: activations of the layers as autograd keeps them (checkpointed: one residual per layer), the pooled
maps, one chunk of logits. A callable objective needs all logits at once: `T * vocabulary`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed_call

from stepflow_tl.errors import FusedRefusal, GradientError
from stepflow_tl.models.facts import is_bridge
from stepflow_tl.models.passes import frozen, replaced_forward
from stepflow_tl.saliency.fused.install import installed, transformers_model
from stepflow_tl.saliency.fused.session import FusedSession
from stepflow_tl.saliency.fused.steps import StepTiles
from stepflow_tl.saliency.objectives import Objective
from stepflow_tl.saliency.pooling import stack_layers

LOGITS_PER_CHUNK = 1 << 24


def fused_backend(
    model: Any,
    tokens: Int[Tensor, " token"],
    step_ids: Int[Tensor, " token"],
    objective: Objective,
    layers: tuple[int, ...],
    *,
    checkpoint: bool = False,
    block_divisor: int = 1,
) -> Float[Tensor, "layer head query_step key_bin"]:
    """Step sums of the chosen layers, exact, from one forward and one backward pass.

    Args:
        model: TransformerBridge or transformers causal LM.
        tokens: The trace's token ids.
        step_ids: Step of each token, -1 on TEMPLATE.
        objective: What is differentiated.
        layers: Layers to pool, in order. Only layers from the lowest of them up are differentiated.
        checkpoint: Recompute blocks in the backward pass: less memory, one more forward pass of time.
        block_divisor: Attention tiles and chunks of logits are smaller by this factor.

    Returns:
        Sums of `|A * dL/dA|` on the CPU, in at least float32; the last key bin is TEMPLATE.

    Raises:
        FusedRefusal: If the model, a hook on it or its mask cannot be served by this backend.
        GradientError: If a layer received no gradient, or one that is not finite.
    """
    inner = transformers_model(model)
    n_layers = int(inner.config.get_text_config().num_hidden_layers)
    n_steps = int(step_ids.max()) + 1
    session = FusedSession(
        StepTiles(step_ids, n_steps, block_divisor), frozenset(layers), objective.per_token
    )
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(frozen(inner))
        stack.enter_context(installed(model, session))
        if checkpoint:
            for block in _blocks(model, inner, n_layers)[min(layers) :]:
                stack.enter_context(_checkpointed(block))
        batch = tokens[None].to(_input_device(inner))
        if objective.targets is None:
            logits = inner(input_ids=batch, use_cache=False).logits
            _check_layers(session, n_layers)
            _backward(objective.loss(logits, batch.to(logits.device)), None, session)
        else:
            hidden = _base_model(inner)(input_ids=batch, use_cache=False)[0]
            _check_layers(session, n_layers)
            whole = _unembedding_is_hooked(model)
            session.closed = True  # until blocks run again in the backward pass, if they are checkpointed
            gradient = _loss_gradient(inner, hidden.detach(), batch, objective, whole, block_divisor)
            session.closed = False
            _backward(hidden, gradient, session)
    return _collect(session, layers)


def _loss_gradient(
    inner: Any, hidden: Tensor, batch: Tensor, objective: Objective, whole: bool, block_divisor: int
) -> Float[Tensor, "1 token d_model"]:
    """Derivative of the objective by the final residual `[1, token, d_model]`, some rows at a time."""
    assert objective.targets is not None
    if whole:
        residual = hidden.requires_grad_()
        loss = objective.loss(_unembed(inner, residual, batch), batch.to(hidden.device))
        return torch.autograd.grad(loss, residual)[0]
    targets = objective.targets.to(hidden.device)
    labels = batch.to(hidden.device)[0, targets]
    scale = 1.0 if objective.per_token else 1.0 / len(targets)
    gradient = torch.zeros_like(hidden)
    rows = max(16, LOGITS_PER_CHUNK // block_divisor // int(inner.config.get_text_config().vocab_size))
    for first in range(0, len(targets), rows):
        chunk = slice(first, first + rows)
        residual = hidden[:, targets[chunk] - 1].requires_grad_()
        logits = _unembed(inner, residual, batch)
        precise = logits[0].to(torch.promote_types(logits.dtype, torch.float32))
        nll = nn.functional.cross_entropy(precise, labels[chunk].to(logits.device), reduction="sum")
        gradient[:, targets[chunk] - 1] = torch.autograd.grad(nll * scale, residual)[0]
    return gradient


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


def _unembed(inner: Any, residual: Tensor, batch: Tensor) -> Tensor:
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


def _backward(root: Tensor, gradient: Tensor | None, session: FusedSession) -> None:
    if not root.requires_grad:
        raise GradientError("the objective does not depend on any of the chosen layers' attention")
    torch.autograd.grad(root, session.anchor, gradient, allow_unused=True)


def _check_layers(session: FusedSession, n_layers: int) -> None:
    missing = sorted(set(range(n_layers)) - session.seen)
    if missing:
        raise FusedRefusal(
            f"layer(s) {missing} did not call transformers' attention interface (a state-space, convolution "
            "or linear-attention layer, or an attention of its own)"
        )


def _collect(
    session: FusedSession, layers: tuple[int, ...]
) -> Float[Tensor, "layer head query_step key_bin"]:
    reached = {layer: session.sums[layer] for layer in layers if session.sums[layer].reached}
    return stack_layers({layer: found.sums.cpu() for layer, found in reached.items()}, layers, "attention")


@contextmanager
def _checkpointed(block: nn.Module) -> Iterator[None]:
    forward = block.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpointed_call(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    with replaced_forward(block, recomputed):
        yield


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
