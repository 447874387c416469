"""`bridge_hook`: the Odds-Equal Bridge on `hook_attn_scores`, for every query of a pass at once.

1. `FlowState.spans` gives the queries that see the same groups of keys; queries of the question and of
   TEMPLATE are in none and are not touched.
2. Each span is cut into blocks of queries that stay in the processor's cache, and each block goes through
   `projection.bridge_scores`, only up to the last key that its queries may see.
3. A block without an active row is dropped; if that is so for all, the hook returns the tensor it was given.

Cost: about one softmax over the scores; memory one copy of them, if any row changes. While decoding: about
forty operations on a row of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.models.hook_names import layer_of
from stepflow_tl.stepflow.projection import Shifts, bridge_pattern, bridge_scores
from stepflow_tl.stepflow.report import FlowReport
from stepflow_tl.stepflow.state import FlowState, Granularity, QuerySpan

_BLOCK_ELEMENTS = 1 << 18


def bridge_hook(
    attn_scores: Float[Tensor, "batch head query key"],
    hook: Any,
    *,
    state: FlowState,
    tau_max: float | int = 0.15,
    max_bridge_share: float | int = 0.9,
    granularity: Granularity = "segment",
    heads: Sequence[int] | None = None,
    sinks: Float[Tensor, " head"] | None = None,
    placebo_seed: int | None = None,
    report: FlowReport | None = None,
) -> Float[Tensor, "batch head query key"]:
    """Raise the bridge mass of each query to its floor; for `hook_attn_scores`.

    The paper's OEB, equations 5 to 8.

    Args:
        attn_scores: Pre-softmax scores, masked with -inf or the dtype's lowest value.
        hook: The hook point.
        state: Where queries and keys stand.
        tau_max: Highest floor; 0 leaves everything as it is.
        max_bridge_share: Highest part of `p(S) + p(B)` that the bridge may be raised to.
        granularity: What S and B are, see `state`.
        heads: Heads to act on; all by default.
        sinks: Logits that join the softmax after this hook (gpt-oss), one a head; they count into O.
        placebo_seed: If given, a random region as large as the bridge is raised instead, to the same floor.
        report: Where to count what was done.

    Returns:
        The scores with shifted rows; the same tensor if no row changes.

    Raises:
        ModelError: If the pass is not the one that `state` describes.
        ValueError: If `tau_max` or `max_bridge_share` is out of range.
    """
    project = partial(bridge_scores, tau_max=tau_max, max_bridge_share=max_bridge_share, sinks=sinks)
    check_bridge(tau_max, max_bridge_share)
    if tau_max == 0:
        return attn_scores
    return _rewrite(attn_scores, hook, project, state, granularity, heads, placebo_seed, report)


def bridge_pattern_hook(
    pattern: Float[Tensor, "batch head query key"],
    hook: Any,
    *,
    state: FlowState,
    tau_max: float | int = 0.15,
    max_bridge_share: float | int = 0.9,
    granularity: Granularity = "segment",
    heads: Sequence[int] | None = None,
    placebo_seed: int | None = None,
    report: FlowReport | None = None,
) -> Float[Tensor, "batch head query key"]:
    """`bridge_hook` on post-softmax probabilities; for `hook_pattern` where scores cannot be edited.

    Arguments, result and errors as in `bridge_hook`.
    """
    project = partial(bridge_pattern, tau_max=tau_max, max_bridge_share=max_bridge_share)
    check_bridge(tau_max, max_bridge_share)
    if tau_max == 0:
        return pattern
    return _rewrite(pattern, hook, project, state, granularity, heads, placebo_seed, report)


def check_bridge(tau_max: float | int, max_bridge_share: float | int) -> None:
    """Refuse parameters without a meaning.

    Raises:
        ValueError: If `tau_max` is outside [0, 1) or `max_bridge_share` outside (0, 1).
    """
    if not 0 <= tau_max < 1:
        raise ValueError(f"tau_max is {tau_max}: expected 0 <= tau_max < 1, a floor of attention mass")
    if not 0 < max_bridge_share < 1:
        raise ValueError(
            f"max_bridge_share is {max_bridge_share}: expected a number between 0 and 1, both excluded; "
            "at 1 the own segment would be emptied"
        )


def _rewrite(
    attention: Tensor,
    hook: Any,
    project: Callable[..., tuple[Tensor, Shifts]],
    state: FlowState,
    granularity: Granularity,
    heads: Sequence[int] | None,
    placebo_seed: int | None,
    report: FlowReport | None,
) -> Tensor:
    n_rows, n_heads, n_queries, n_keys = attention.shape
    state.check_shape(n_rows, n_queries, hook.name)
    spans = state.spans(n_keys, granularity, placebo_seed=placebo_seed, device=attention.device)
    head_mask = None if heads is None else _head_mask(tuple(heads), n_heads, attention.device)
    counts = None if report is None else report.of(layer_of(hook.name))
    result = attention
    for span in spans:
        for queries in _blocks(span, attention):
            n_seen = span.n_keys - (span.queries.stop - queries.stop)
            block = attention[span.rows, :, queries, :n_seen]
            groups, counted = span.groups[..., :n_seen], span.counted[..., :n_seen]
            projected, shifts = project(block, groups, counted=counted, heads=head_mask)
            if counts is not None:
                counts.add_bridge(shifts, span.n_rows_acted_on * n_heads * block.shape[2])
            if not shifts.active.any():
                continue
            if projected.shape == attention.shape:
                return projected
            if result is attention:
                result = attention.clone()
            result[span.rows, :, queries, :n_seen] = projected
    return result


def _blocks(span: QuerySpan, attention: Tensor) -> Iterator[slice]:
    start, stop = span.queries.start, span.queries.stop
    size = stop - start
    if not (attention.requires_grad and torch.is_grad_enabled()):  # the graph grows with every write
        size = max(8, _BLOCK_ELEMENTS // (attention.shape[0] * attention.shape[1] * span.n_keys))
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


@lru_cache(maxsize=256)
def _head_mask(heads: tuple[int, ...], n_heads: int, device: torch.device) -> Tensor:
    outside = [head for head in heads if not 0 <= head < n_heads]
    if outside:
        raise ValueError(f"heads {outside} do not exist: the layer has heads 0..{n_heads - 1}")
    mask = torch.zeros(n_heads, 1, dtype=torch.bool)
    mask[list(heads)] = True
    return mask.to(device)
