"""The three backends, and whether the per-token rows of one hold on a given model.

1. `"fused"`: exact in O(T) memory, wherever attention goes through transformers' attention interface.
2. `"hooks"`: the reference, wherever there is a pattern hook; holds the T x T patterns of all layers.
3. `"layerwise"`: the same with the patterns of one layer at a time, for one more forward pass; hooks inside
   blocks fire twice.

The one-pass rows of `per_token` are measured once per model, on the first few tokens of a trace: the backend
that is to run gives them through the trick, and for each position t a backward pass of L_t alone, of which
only row t is read, gives them the slow obvious way. The hooks backend does that where there are hook points,
so a fused run is held against the reference too. The check fails where something besides attention mixes
positions (state-space or convolution layers), where values are transformed between pattern and z, or where
scores are not `f(q . k)`: exactly the cases that the trick cannot serve. Cost: `n` extra backward passes over
`n <= 6` tokens, well under a second; remembered per model object.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from stepflow_tl.errors import FusedRefusal, ModelError
from stepflow_tl.models.attention_interface import refusal_reason
from stepflow_tl.models.facts import is_transformerlens, model_facts
from stepflow_tl.models.hook_names import hook_counts
from stepflow_tl.saliency.fused.run import fused_backend
from stepflow_tl.saliency.hooks_backend import hooks_backend
from stepflow_tl.saliency.layerwise import layerwise_backend
from stepflow_tl.saliency.objectives import Objective

Backend = Literal["auto", "hooks", "fused", "layerwise"]

#: All take `(model, tokens, step_ids, objective, layers)` and return `[layer head query_step key_bin]`.
BACKENDS: dict[str, Callable[..., Tensor]] = {
    "fused": fused_backend,
    "hooks": hooks_backend,
    "layerwise": layerwise_backend,
}
N_CHECKED_TOKENS = 6
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.15

_checked: weakref.WeakKeyDictionary[Any, dict[str, float]] = weakref.WeakKeyDictionary()


def per_token_deviation(model: Any, tokens: Int[Tensor, " token"], backend: str) -> float:
    """Largest relative deviation of the one-pass rows from separate backward passes, over layers and heads.

    Each token is its own step, so pooled sums are token saliency. The deviation of a layer is taken relative
    to its largest entry; layers whose saliency is all zero count as 0.
    """
    few = tokens[:N_CHECKED_TOKENS]
    each = torch.arange(len(few))
    layers = tuple(range(model_facts(model).n_layers))
    one_pass = BACKENDS[backend](model, few, each, Objective("per_token", each[1:], per_token=True), layers)
    reference = hooks_backend if is_transformerlens(model) else fused_backend
    separate = torch.zeros_like(one_pass)
    for t in range(len(few) - 1):
        rows = reference(model, few, each, Objective(f"token {t}", each[t + 1 : t + 2]), layers)
        separate[:, :, t] = rows[:, :, t]
    scale = separate.flatten(1).amax(1).clamp(min=torch.finfo(separate.dtype).tiny)
    return float(((one_pass - separate).abs().flatten(1).amax(1) / scale).max())


def check_per_token(model: Any, tokens: Int[Tensor, " token"], backend: str) -> str:
    """Run the check unless this model object has passed it; return a note for the provenance.

    Hooks that are attached from outside belong to the user's run and may know its positions, so the check,
    which runs on a few tokens only, is left out while there are any.

    Raises:
        FusedRefusal: If the fused backend deviates by more than the tolerance.
        ModelError: If the hooks backend does; the message says what that means and what to do.
    """
    passed = _checked.get(model, {})
    if backend in passed:
        return f"max relative deviation {passed[backend]:.1e} over {N_CHECKED_TOKENS} tokens"
    if is_transformerlens(model) and hook_counts(model):
        return "not run: hooks were attached from outside"
    deviation = per_token_deviation(model, tokens, backend)
    facts = model_facts(model)
    tolerance = _TOLERANCE.get(facts.dtype, _HALF_TOLERANCE)
    if not deviation <= tolerance and backend == "fused":
        raise FusedRefusal(f"its per-token rows deviate from separate backward passes by {deviation:.1e}")
    if not deviation <= tolerance:
        raise ModelError(
            f"objective='per_token' cannot be served on {facts.name!r}: on "
            f"{min(len(tokens), N_CHECKED_TOKENS)} tokens its one-pass rows deviate from separate backward "
            f"passes by {deviation:.1e} (tolerance {tolerance:.0e}). Something besides attention mixes "
            "positions (state-space or convolution layers), or the attention scales its scores or values in "
            "a way this package does not know. Use an ordinary objective such as 'response'."
        )
    _checked[model] = {**passed, backend: deviation}
    return f"max relative deviation {deviation:.1e} over {N_CHECKED_TOKENS} tokens"


def check_ahead(model: Any, tokens: Int[Tensor, " token"]) -> None:
    """Run the check that `backend="auto"` would run, on tokens of the caller's choice.

    The note that results carry is that of the first check of a model object; after this one it no longer
    depends on which trace came first. Raises as `check_per_token`.
    """
    try:
        refuse_early(model)
        check_per_token(model, tokens, "fused")
    except FusedRefusal:
        if not is_transformerlens(model):
            raise
        check_per_token(model, tokens, "hooks")


def refuse_early(model: Any) -> None:
    """Refuse what can be told from model and hooks alone, before any forward pass."""
    if (reason := refusal_reason(model)) is not None:
        raise FusedRefusal(reason)
