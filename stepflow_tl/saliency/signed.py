"""The signed step map: `A * dL/dA` summed over step pairs, so that opposite signs cancel.

Step-Saliency says how strongly a loss hangs on an edge; this says what a small change of the edge does. Scale
the attention of an edge by `1 - eps` (after the softmax, without renormalising) and the loss changes by
`- eps * sum of A * dL/dA` over its tokens, layers and heads, to first order. `causal.linearity` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from stepflow_tl.errors import ObjectiveError
from stepflow_tl.models.facts import check_fit, check_layers, model_facts
from stepflow_tl.models.hooking import NamedHook, attached
from stepflow_tl.saliency.hooks_backend import hooks_backend
from stepflow_tl.saliency.objectives import ObjectiveLike, resolve_objective
from stepflow_tl.trace import ReasoningTrace


def signed_step_saliency(
    model: Any,
    trace: ReasoningTrace,
    *,
    objective: ObjectiveLike = "response",
    layers: Sequence[int] | None = None,
    fwd_hooks: Sequence[NamedHook] = (),
) -> Float[Tensor, "layer head query_step key_step"]:
    """Sums of `A * dL/dA` over step pairs, L one scalar, through all paths.

    Args:
        model: A TransformerLens model whose patterns are live.
        trace: The trace, in this model's token ids.
        objective: Any objective of `step_saliency` but "per_token", whose rows each have a loss of their own:
            no intervention on an edge changes only that.
        layers: Layers to keep, in order; all by default.
        fwd_hooks: Hooks in force in the pass, after those already attached.

    Returns:
        Signed sums on the CPU, in the objective's unit (nats).

    Raises:
        ModelError: If the trace does not fit, or a hook point is missing or silent.
        ObjectiveError: If the objective is "per_token", unknown, no scalar, or touches no token.
        GradientError: If a gradient is missing or not finite.

    Cost: that of `step_saliency(backend="hooks")`, `O(L H T^2)` memory.
    """
    facts = model_facts(model)
    check_fit(facts, trace)
    chosen = check_layers(facts, layers)
    resolved = resolve_objective(objective, trace)
    if resolved.per_token:
        raise ObjectiveError(
            "objective='per_token' has a loss for each row, and no change of an edge moves only that one: "
            "use a scalar such as 'response', 'summary' or a step's label"
        )
    with attached(model, last=fwd_hooks):
        sums = hooks_backend(model, trace.tokens, trace.step_ids, resolved, chosen, signed=True)
    return sums[..., :-1].contiguous()
