"""The `hooks` backend: patterns and their gradients at `hook_pattern`, pooled layer by layer.

1. Parameters are frozen and dropout is off for the run; the embedding output becomes the only leaf.
2. A forward hook on every `blocks.{l}.attn.hook_pattern` hangs a gradient hook on the pattern. For
   `per_token`, `PositionLocalGradients` confines gradients to their own position first.
3. One backward pass. As dL/dA of a layer arrives, `|A * dL/dA|` (or another of `scores`) is pooled into step
   sums and both are let go: beyond what autograd itself holds for the pass (T x T per layer and head), only
   one layer's gradient lives at a time.
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
from stepflow_tl.models.facts import attention_sinks
from stepflow_tl.models.hook_names import ModelHooks, resolve_hooks
from stepflow_tl.models.passes import NamedHook, attached, frozen, model_device
from stepflow_tl.saliency.objectives import Objective
from stepflow_tl.saliency.pooling import pool_tokens, stack_layers, step_bins
from stepflow_tl.saliency.position_local import PositionLocalGradients
from stepflow_tl.saliency.scores import Score


def hooks_backend(
    model: Any,
    tokens: Int[Tensor, " token"],
    step_ids: Int[Tensor, " token"],
    objective: Objective,
    layers: tuple[int, ...],
    *,
    score: Score = "saliency",
) -> Float[Tensor, "layer head query_step key_bin"]:
    """Step sums of the chosen layers from one forward and one backward pass.

    Args:
        model: A TransformerLens model.
        tokens: The trace's token ids.
        step_ids: Step of each token, -1 on TEMPLATE.
        objective: What is differentiated.
        layers: Model layers to pool, in order.
        score: What is made of pattern and gradient.

    Returns:
        Sums of the score on the CPU, in at least float32; the last key bin is TEMPLATE.

    Raises:
        ModelError: If the model lacks a hook point, or a pattern hook never fires.
        GradientError: If a pattern gets no gradient, or one that is not finite.
        ObjectiveError: If a callable objective does not return a differentiable scalar.
    """
    taps = PatternTaps(model, step_ids, layers, per_token=objective.per_token, score=score)
    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        with attached(model, last=taps.start), attached(model, first=taps.first, last=taps.last):
            batch = tokens[None].to(model_device(model))
            logits = model(batch, return_type="logits")
            taps.check_fired()
            loss = objective.loss(logits, batch)
            del logits
            torch.autograd.grad(loss, taps.embeddings + taps.constants, allow_unused=True)
    return stack_layers(taps.pooled, layers, "pattern")


class PatternTaps:
    """The hooks of one run, and the pooled saliency that they collect as pattern gradients arrive.

    Attributes:
        start: Hook that begins the graph at the embedding.
        first: Hooks to attach before those already there.
        last: Hooks to attach after them.
        pooled: Step sums `[head, query_step, key_bin]` by layer, as far as gradients have arrived.
        embeddings: Leaf that the embedding became.
        constants: Patterns that a hook had made constant, each a leaf of its own.
    """

    def __init__(
        self,
        model: Any,
        step_ids: Int[Tensor, " token"],
        layers: tuple[int, ...],
        *,
        per_token: bool,
        score: Score = "saliency",
        recomputed: bool = False,
    ) -> None:
        """Collect for these layers and steps.

        With `recomputed`, every block runs a second time in the backward pass, and its pattern is kept only
        then.

        Raises:
            ModelError: If the model lacks a hook point that this needs.
        """
        self._hooks: ModelHooks = resolve_hooks(model, None if per_token else layers)
        self._local = PositionLocalGradients(model, self._hooks.layers if per_token else ())
        self._step_ids, self._layers = step_ids, layers
        self._score, self._recomputed = score, recomputed
        self._has_sink = {
            layer: score == "cut" and attention_sinks(model, layer) is not None for layer in layers
        }
        self._bins: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._patterns: dict[int, Tensor] = {}
        self._fired: set[int] = set()
        self.pooled: dict[int, Tensor] = {}
        self.embeddings: list[Tensor] = []
        self.constants: list[Tensor] = []
        self.start: list[NamedHook] = [(self._hooks.embed, self._start_graph)]
        self.first = self._local.first
        self.last = self._local.last + [
            (h.pattern, partial(self._tap, layer=h.layer)) for h in self._hooks.layers if h.layer in layers
        ]

    def check_fired(self) -> None:
        """A hook that never fires is silent in TransformerLens; here it is an error that names it."""
        if len(self.embeddings) != 1:
            raise ModelError(
                f"`{self._hooks.embed}` fired {len(self.embeddings)} times in one forward pass, expected once"
            )
        names = {h.layer: h.pattern for h in self._hooks.layers}
        silent = [names[layer] for layer in self._layers if layer not in self._fired]
        if silent:
            raise ModelError(
                f"{len(silent)} of {len(self._layers)} pattern hooks never fired ({', '.join(silent[:3])}): "
                "this attention implementation does not compute patterns at its hook points. Boot the model "
                "with eager attention."
            )
        if self._local.pending:
            raise ModelError(
                f"`hook_z` never fired in layers {sorted(self._local.pending)}: objective='per_token' cannot "
                "be served here"
            )

    def _start_graph(self, embedding: Tensor, hook: Any) -> Tensor:
        self.embeddings.append(embedding.detach().requires_grad_(True))
        return self.embeddings[-1]

    def _tap(self, pattern: Tensor, hook: Any, *, layer: int) -> Tensor:
        is_first_run = layer not in self._fired
        if not pattern.requires_grad:
            # A hook put a constant here. |A dL/dA| is still defined: the constant becomes a leaf of its own.
            pattern = pattern.detach().requires_grad_(True)
            if is_first_run:
                self.constants.append(pattern)
        if is_first_run:
            self._fired.add(layer)
            pattern.register_hook(partial(self._pool, layer=layer))
        if not (is_first_run and self._recomputed):
            self._patterns[layer] = pattern.detach()
        return pattern

    def _pool(self, grad: Tensor, *, layer: int) -> None:
        pattern = self._patterns.pop(layer)
        dtype = torch.promote_types(pattern.dtype, torch.float32)
        key = (dtype, pattern.device)
        if key not in self._bins:
            self._bins[key] = step_bins(self._step_ids, dtype=dtype, device=pattern.device)
        how: Any = dict(score=self._score, has_sink=self._has_sink[layer])
        self.pooled[layer] = pool_tokens(pattern[0], grad[0], self._bins[key], **how).cpu()
