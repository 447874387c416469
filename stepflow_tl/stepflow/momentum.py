"""Step Momentum Injection: at the first token of a new step, add a little of what the step before it held.

1. `capture_values_hook` on `hook_v` keeps the values of every pass, as references.
2. `momentum_hook` on `hook_z` does, for the first token t of each new step and each query head h,
   `z[t, h] += alpha * mean over k in the step before of v[k, kv(h)]`; consecutive query heads share a KV
   head.

Every layer of the band keeps its own values and injects on its own; nothing is consumed (the authors' code
clears its flag in the first layer, so only that one injects). Everywhere else z is left as it is, the same
tensor.

Which first tokens: the paper says "at the boundary between steps", its code knows only steps of the thinking,
takes the last 4 tokens of the step before, and acts while decoding only. Here `boundaries="response"` is
every new step of thinking and summary, whatever came before it (the first thinking step gets the question,
the first summary step the last thinking step: the link that Deep Decay loses); `"within"` asks that both
steps are of one segment, `"thinking"` (the authors' code) that both are thinking, `"summary"` is new summary
steps only, `"all"` also later questions.

Memory: the values of the band's layers for all tokens so far, an eighth of what a full KV cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.models.facts import expand_heads, head_mask
from stepflow_tl.models.hook_names import layer_of
from stepflow_tl.stepflow.placebo import random_direction_like
from stepflow_tl.stepflow.report import FlowReport
from stepflow_tl.stepflow.state import Boundaries, FlowState


def capture_values_hook(
    v: Float[Tensor, "batch pos kv_head d_head"], hook: Any, *, state: FlowState, detach: bool = False
) -> None:
    """Keep the values of this layer for `momentum_hook`; for `hook_v`.

    Args:
        v: Values; they are kept as they are, not copied.
        hook: The hook point.
        state: Which tokens the pass computes; it holds the values.
        detach: Keep values that pass no gradient back, as `objective="per_token"` needs: see
            `StepFlow.hooks`.
    """
    state.check_shape(v.shape[0], v.shape[1], hook.name)
    state.values.add(layer_of(hook.name), state.current.start, v.detach() if detach else v)


def momentum_hook(
    z: Float[Tensor, "batch pos head d_head"],
    hook: Any,
    *,
    state: FlowState,
    alpha: float = 0.06,
    window: int | None = None,
    boundaries: Boundaries = "response",
    heads: Sequence[int] | None = None,
    placebo_seed: int | None = None,
    report: FlowReport | None = None,
) -> Float[Tensor, "batch pos head d_head"]:
    """Inject the mean value of the step before at the first token of each new step; for `hook_z`.

    The paper's SMI.

    Args:
        z: Weighted values, before the output projection.
        hook: The hook point.
        state: Which tokens the pass computes, with the values that `capture_values_hook` kept.
        alpha: Size of the injection; 0 leaves everything as it is.
        window: Average only the last so many tokens of the step before (the authors' code: 4); None: all of
            them.
        boundaries: Which new steps get an injection, see the module.
        heads: Query heads that get it; all by default.
        placebo_seed: If given, the direction is random, with the same norm in each KV head.
        report: Where to count what was done.

    Returns:
        z with some rows moved; the same tensor if there is no new step.

    Raises:
        ModelError: If the pass is not the one that `state` describes, values were not captured, or a head
            does not exist.
    """
    state.check_shape(z.shape[0], z.shape[1], hook.name)
    injections = state.injections(boundaries, window) if alpha else ()
    if not injections:
        return z
    layer, n_heads = layer_of(hook.name), z.shape[2]
    moved = []
    for injection in injections:
        mean = state.values.gather(layer, injection.row, injection.columns).mean(0)
        if placebo_seed is not None:
            row = state.row_ids[injection.row]
            mean = random_direction_like(mean, placebo_seed, layer, row, injection.position)
        moved.append(alpha * expand_heads(mean, n_heads, dim=0))
    added = torch.stack(moved).to(device=z.device, dtype=z.dtype)
    if heads is not None:
        added = added.masked_fill(~head_mask(heads, n_heads, z.device), 0)
    if report is not None:
        report.of(layer).add_injections(added)
    places = torch.tensor([(injection.row, injection.query) for injection in injections], device=z.device)
    return z.index_put(places.unbind(1), added, accumulate=True)
