"""Keep every gradient path at its own position, so one backward pass gives dL_t/dA[t, :] for all t at once.

The paper's token saliency needs dL_t/dA_l[t, k]: how L_t depends on row t of layer l's pattern. That
dependence runs from z_l[t] up the residual stream at position t. It may cross to other positions only
through keys and values that later tokens read, and those paths never come back to position t. In the
backward pass of the *summed* loss, rows of later tokens t' > t would reach z_l[t] exactly through the keys
and values of position t. So:

1. Keys and values pass no gradient to other positions: `hook_k` / `hook_rot_k` and `hook_v` hand on detached
   copies.
2. A token also attends to itself, and that path stays at position t. It is given back on the diagonal:
   * values: at `hook_z`, add `A[t,t] * (v_t - detach(v_t))`, zero in value, gradient `dv_t = A[t,t] dz_t`;
   * keys: an identity takes the diagonal score `s_tt = f(q_t . k_t)` as a second input and sends it `ds_tt`.
     At `hook_attn_scores` that is the diagonal of its gradient. Where those scores cannot be edited it
     stands at `hook_pattern`, with the softmax's own derivative `ds_tt = A_tt (dA_tt - sum_k A_tk dA_tk)` (a
     sink needs nothing: its column has no dA). The query is detached in s_tt, since dq flows in full through
     the attention itself.
3. f is the model's scale and soft-cap: `f(x) = cap * tanh(scale x / cap)`, or `scale x`.

Order among hooks: what detaches or reads runs after a user's hooks, what gives a path back runs before them,
so that an edit of scores, pattern or z acts on the diagonal path as it does on all others.

Exact for models in which attention alone mixes positions. `backends` measures that on the model at hand.
Cost: one backward pass without cross-position dk, dv; memory `O(H T)` per layer beyond the hooks backend's
own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.models.facts import expand_heads, score_function
from stepflow_tl.models.hook_names import LayerHooks, by_heads, refuse_delegated
from stepflow_tl.models.passes import NamedHook


class _DiagonalOfScores(torch.autograd.Function):
    """Identity on the scores whose backward also feeds the diagonal scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, diagonal_scores: Tensor) -> Tensor:
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grad_outputs
        return grad, _diagonal(grad)


class _DiagonalOfPattern(torch.autograd.Function):
    """The same one step later: identity on the pattern, the softmax's derivative for the diagonal scores."""

    @staticmethod
    def forward(ctx: Any, pattern: Tensor, diagonal_scores: Tensor) -> Tensor:
        ctx.save_for_backward(pattern)
        return pattern.view_as(pattern)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (pattern,) = ctx.saved_tensors
        (grad,) = grad_outputs
        row_mean = (pattern * grad).sum(-1)
        return grad, _diagonal(pattern) * (_diagonal(grad) - row_mean)


class PositionLocalGradients:
    """The forward hooks that confine gradients to their own position, for one forward pass.

    Attributes:
        first: Hooks to attach before those already there.
        last: Hooks to attach after them.
        pending: Layers whose paths have not all been given back yet.
    """

    def __init__(self, model: Any, layers: tuple[LayerHooks, ...]) -> None:
        """Prepare hooks for all `layers` of `model`.

        Raises:
            ModelError: If a layer lacks a query, key, value or z hook point, or delegates its attention.
        """
        self._kept: dict[tuple[int, str], Tensor] = {}  # what one layer's hooks hand to each other
        self._score = {hooks.layer: score_function(model, hooks.layer) for hooks in layers}
        self.pending = {hooks.layer for hooks in layers}
        self.first: list[NamedHook] = []
        self.last: list[NamedHook] = []
        for hooks in layers:
            refuse_delegated(
                model,
                hooks,
                "Gradients cannot be kept at their position there, which objective='per_token' needs: use "
                "backend='fused' where it serves the model, or an ordinary objective such as 'response'.",
            )
            missing = [n for n in ("query", "key", "value", "z") if getattr(hooks, n) is None]
            if missing:
                raise ModelError(
                    f"layer {hooks.layer} has no hook point for its {', '.join(missing)}, which "
                    "objective='per_token' needs to keep gradients at their position. Use an ordinary "
                    "objective such as 'response'."
                )
            z = str(hooks.z)
            self.first += [
                (hooks.scores or hooks.pattern, partial(self._return_key_path, layer=hooks)),
                (z, by_heads(model, z, partial(self._return_value_path, layer=hooks))),
            ]
            for part in ("query", "key", "value"):
                name = str(getattr(hooks, part))
                keep = partial(self._keep_and_detach, layer=hooks.layer, part=part)
                self.last.append((name, by_heads(model, name, keep)))
            self.last.append((hooks.pattern, partial(self._keep_diagonal, layer=hooks.layer)))

    def _keep_and_detach(self, tensor: Tensor, hook: Any, *, layer: int, part: str) -> Tensor | None:
        self._kept[layer, part] = tensor
        return None if part == "query" else tensor.detach()

    def _keep_diagonal(self, pattern: Tensor, hook: Any, *, layer: int) -> None:
        self._kept[layer, "pattern"] = _diagonal(pattern.detach()).transpose(1, 2)

    def _take(self, layer: LayerHooks, where: str | None, *parts: str) -> list[Tensor]:
        """What hooks earlier in this pass have kept of a layer, each once."""
        if any((layer.layer, part) not in self._kept for part in parts):
            raise ModelError(
                f"layer {layer.layer}: {' or '.join(str(getattr(layer, part)) for part in parts)} did not "
                f"fire before {where}, so objective='per_token' cannot be served here. Use an ordinary "
                "objective such as 'response'."
            )
        return [self._kept.pop((layer.layer, part)) for part in parts]

    def _return_key_path(self, attention: Tensor, hook: Any, *, layer: LayerHooks) -> Tensor:
        query, key = self._take(layer, hook.name, "query", "key")
        products = (query.detach() * expand_heads(key, query.shape[2], dim=2)).sum(-1)
        diagonal_scores = self._score[layer.layer](products).transpose(1, 2).to(attention.dtype)
        identity = _DiagonalOfScores if layer.scores is not None else _DiagonalOfPattern
        return identity.apply(attention, diagonal_scores)  # pyright: ignore[reportReturnType]

    def _return_value_path(self, z: Tensor, hook: Any, *, layer: LayerHooks) -> Tensor:
        value, pattern = self._take(layer, layer.z, "value", "pattern")
        value = expand_heads(value, z.shape[2], dim=2)
        own = pattern[..., None].to(z.dtype) * (value - value.detach()).to(z.dtype)
        self.pending.discard(layer.layer)
        return z + own


def _diagonal(pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query"]:
    return torch.diagonal(pattern, dim1=-2, dim2=-1)
