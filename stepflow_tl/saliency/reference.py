"""The `hooks` backend: patterns and their gradients at `hook_pattern`, pooled layer by layer.

1. Parameters are frozen and dropout is off for the run; the embedding output becomes the only leaf.
2. A forward hook on every `blocks.{l}.attn.hook_pattern` hangs a gradient hook on the pattern. For
   `per_token`, `PositionLocalGradients` confines gradients to their own position first.
3. One backward pass. As dL/dA of a layer arrives, `|A * dL/dA|` is pooled into step sums and both are let
   go: beyond what autograd itself holds for the pass (T x T per layer and head), only one layer's gradient
   lives at a time.
4. Every layer must have delivered a finite gradient, or an error says which did not.

This is the slow obvious version: it works wherever there is a pattern hook, composes with any hook attached
outside (ours run last), and is the oracle of the faster backends. Memory `O(L H T^2)` in the forward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.models.hook_names import LayerHooks, ModelHooks, resolve_hooks
from stepflow_tl.models.passes import attached, frozen, model_device
from stepflow_tl.saliency.objectives import Objective
from stepflow_tl.saliency.pooling import StepBins, pool_tokens, stack_layers
from stepflow_tl.saliency.position_local import PositionLocalGradients


def hooks_backend(
    model: Any,
    tokens: Int[Tensor, " token"],
    step_ids: Int[Tensor, " token"],
    objective: Objective,
    layers: tuple[int, ...],
    *,
    signed: bool = False,
) -> Float[Tensor, "layer head query_step key_bin"]:
    """Step sums of the chosen layers from one forward and one backward pass.

    Args:
        model: A TransformerLens model.
        tokens: The trace's token ids.
        step_ids: Step of each token, -1 on TEMPLATE.
        objective: What is differentiated.
        layers: Model layers to pool, in order.
        signed: Pool `A * dL/dA` instead of its absolute value.

    Returns:
        Sums of `|A * dL/dA|` on the CPU, in at least float32; the last key bin is TEMPLATE.

    Raises:
        ModelError: If the model lacks a hook point, or a pattern hook never fires.
        GradientError: If a pattern gets no gradient, or one that is not finite.
        ObjectiveError: If a callable objective does not return a differentiable scalar.
    """
    hooks = resolve_hooks(model, None if objective.per_token else layers)
    taps = PatternTaps(step_ids, layers, signed=signed)
    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        leaves: list[Tensor] = []
        local = PositionLocalGradients(model, hooks.layers) if objective.per_token else None
        last = [(hooks.embed, partial(_start_graph, leaves=leaves))]
        last += local.last if local is not None else []
        last += [(h.pattern, partial(taps.attach, layer=h.layer)) for h in hooks.layers if h.layer in layers]
        with attached(model, first=local.first if local is not None else (), last=last):
            batch = tokens[None].to(model_device(model))
            logits = model(batch, return_type="logits")
            _check_fired(hooks, layers, leaves, taps, local)
            loss = objective.loss(logits, batch)
            del logits
            torch.autograd.grad(loss, leaves + taps.leaves, allow_unused=True)
    return taps.collect()


class PatternTaps:
    """Collects pooled saliency as pattern gradients arrive."""

    def __init__(
        self, step_ids: Int[Tensor, " token"], layers: tuple[int, ...], *, signed: bool = False
    ) -> None:
        """Collect for these layers and steps, with the sign of each term or without."""
        self._step_ids = step_ids
        self._layers = layers
        self._signed = signed
        self._bins: dict[tuple[torch.dtype, torch.device], StepBins] = {}
        self._patterns: dict[int, Tensor] = {}
        self._pooled: dict[int, Tensor] = {}
        self.fired: set[int] = set()
        self.leaves: list[Tensor] = []

    def attach(self, pattern: Tensor, hook: Any, *, layer: int) -> Tensor:
        """Forward hook on a pattern: pool its gradient when it comes."""
        self.fired.add(layer)
        if not pattern.requires_grad:
            # A hook put a constant here. |A dL/dA| is still defined: the constant becomes a leaf of its own.
            pattern = pattern.detach().requires_grad_(True)
            self.leaves.append(pattern)
        self._patterns[layer] = pattern.detach()
        pattern.register_hook(partial(self._pool, layer=layer))
        return pattern

    def _pool(self, grad: Tensor, *, layer: int) -> None:
        pattern = self._patterns.pop(layer)
        dtype = torch.promote_types(pattern.dtype, torch.float32)
        key = (dtype, pattern.device)
        if key not in self._bins:
            self._bins[key] = StepBins.from_step_ids(self._step_ids, dtype=dtype, device=pattern.device)
        pooled = pool_tokens(pattern[0], grad[0], self._bins[key], signed=self._signed)
        self._pooled[layer] = pooled.cpu()

    def collect(self) -> Float[Tensor, "layer head query_step key_bin"]:
        """The sums of all layers.

        Raises:
            GradientError: If a layer got no gradient, or one that is not finite.
        """
        return stack_layers(self._pooled, self._layers, "pattern")


def _start_graph(embedding: Tensor, hook: Any, *, leaves: list[Tensor]) -> Tensor:
    leaves.append(embedding.detach().requires_grad_(True))
    return leaves[-1]


def _check_fired(
    hooks: ModelHooks,
    layers: tuple[int, ...],
    leaves: list[Tensor],
    taps: PatternTaps,
    local: PositionLocalGradients | None,
) -> None:
    """A hook that never fires is silent in TransformerLens; here it is an error."""
    if len(leaves) != 1:
        raise ModelError(f"`{hooks.embed}` fired {len(leaves)} times in one forward pass, expected once")
    silent = [_pattern_name(hooks.layers, layer) for layer in layers if layer not in taps.fired]
    if silent:
        raise ModelError(
            f"{len(silent)} of {len(layers)} pattern hooks never fired ({', '.join(silent[:3])}): this "
            "attention implementation does not compute patterns at its hook points. Boot the model with "
            "eager attention."
        )
    if local is not None and len(local.completed) != len(hooks.layers):
        absent = sorted({h.layer for h in hooks.layers} - local.completed)
        raise ModelError(
            f"`hook_z` never fired in layers {absent}: objective='per_token' cannot be served here"
        )


def _pattern_name(layers: tuple[LayerHooks, ...], layer: int) -> str:
    return next(h.pattern for h in layers if h.layer == layer)
