"""Does the per-token trick hold on this very model? Measured, once per model, on a handful of tokens.

1. Take the first few tokens of the trace.
2. Get the token saliency rows once through the one-pass trick, by the backend that is to run.
3. Get them again the slow obvious way: for each position t a backward pass of L_t alone, reading only row t.
   The hooks backend does it where there are hook points, so a fused run is held against the reference too.
4. The largest deviation, relative to the layer's largest entry, must be below a tolerance of the dtype.

It fails where something besides attention mixes positions (state-space or convolution layers), where values
are transformed between pattern and z, or where scores are not `f(q . k)`: exactly the cases the trick cannot
serve.
Cost: `n` extra backward passes over `n <= 6` tokens, well under a second; remembered per model object.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.models.facts import is_transformerlens, model_facts
from stepflow_tl.models.hook_names import hook_counts
from stepflow_tl.saliency.backends import backend_function
from stepflow_tl.saliency.fused.refusal import FusedRefusal
from stepflow_tl.saliency.objectives import Objective

N_TOKENS = 6
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.15

_checked: weakref.WeakKeyDictionary[Any, dict[str, float]] = weakref.WeakKeyDictionary()


def per_token_deviation(model: Any, tokens: Int[Tensor, " token"], backend: str) -> float:
    """Largest relative deviation of the one-pass rows from separate backward passes, over layers and heads.

    Each token is its own step, so pooled sums are token saliency. The deviation of a layer is taken relative
    to its largest entry; layers whose saliency is all zero count as 0.
    """
    few = tokens[:N_TOKENS]
    each = torch.arange(len(few))
    layers = tuple(range(model_facts(model).n_layers))
    one = backend_function(backend)
    other = backend_function("hooks" if is_transformerlens(model) else "fused")
    one_pass = one(model, few, each, Objective("per_token", each[1:], per_token=True), layers)
    separate = torch.zeros_like(one_pass)
    for t in range(len(few) - 1):
        rows = other(model, few, each, Objective(f"token {t}", each[t + 1 : t + 2]), layers)
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
        return f"max relative deviation {passed[backend]:.1e} over {N_TOKENS} tokens"
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
            f"{min(len(tokens), N_TOKENS)} tokens its one-pass rows deviate from separate backward passes by "
            f"{deviation:.1e} (tolerance {tolerance:.0e}). Something besides attention mixes positions "
            "(state-space or convolution layers), or the attention scales its scores or values in a way "
            "this package does not know. Use an ordinary objective such as 'response'."
        )
    _checked[model] = {**passed, backend: deviation}
    return f"max relative deviation {deviation:.1e} over {N_TOKENS} tokens"


def check_ahead(model: Any, tokens: Int[Tensor, " token"]) -> None:
    """Run the check that `backend="auto"` would run, on tokens of the caller's choice.

    The note that results carry is that of the first check of a model object; after this one it no longer
    depends on which trace came first.

    Raises:
        ModelError: As `check_per_token`.
    """
    from stepflow_tl.saliency.backends import refuse_early

    try:
        refuse_early(model)
        check_per_token(model, tokens, "fused")
    except FusedRefusal:
        if not is_transformerlens(model):
            raise
        check_per_token(model, tokens, "hooks")
