"""The Odds-Equal Bridge: raise the attention mass of one group of keys to a floor at the cost of another.

For a query with keys split into S (own segment), B (the bridge) and O (the rest, attention sinks included):

1. Masses p(S), p(B), p(O), and the number of keys the query sees in S and B. A key is seen unless its score
   is -inf or about the dtype's lowest value, which is what causality, sliding window and padding leave there.
2. `tau = min(sqrt(|B| / (|B| + |S|)), tau_max)` (paper, equation 6).
3. The paper leaves `tau >= 1 - p(O)` undefined; a head that gives BOS 0.9 meets it. Here tau is capped at
   `max_bridge_share * (1 - p(O))`, so S always keeps the other part of the movable mass.
4. Where `p(B) < tau`: `log(tau / p(B))` for the scores of B, `log((1 - p(O) - tau) / p(S))` for those of S
   (equations 7 and 8). Every other row is left bit for bit as it was.

That is the distribution q nearest to p in `KL(q || p)` with `q(O) = p(O)` and `q(B) >= tau`. All of it is
done with logarithms of masses in float32 (float64 for float64), so no row overflows, empties S or becomes
NaN: a group whose mass would underflow beside the row's largest score is summed again in its own scale.

`bridge_scores` and `bridge_pattern` do this for a block of rows, `[row, head, query, key]`, whose queries
share their groups, `[2, row, 1, 1, key]`, S first. `bridge_hook` and `bridge_pattern_hook` do it for every
query of a pass:

5. `FlowState.spans` gives the queries that see the same groups of keys; queries of the question and of
   TEMPLATE are in none and are not touched.
6. Each span is cut into blocks of queries that stay in the processor's cache, and each block is projected
   only up to the last key that its queries may see.
7. A block without an active row is dropped; if that is so for all, the hook returns the tensor it was given.

Cost: about one softmax over the scores; memory one copy of them, if any row changes. While decoding: about
forty operations on a row of scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepflow_tl.models.facts import head_mask
from stepflow_tl.models.hook_names import layer_of
from stepflow_tl.stepflow.report import FlowReport
from stepflow_tl.stepflow.state import FlowState, Granularity, QuerySpan

_BLOCK_ELEMENTS = 1 << 18
#: A group mass below this, relative to the row's largest term, is summed again in its own scale.
_TINY = 1e-25


def bridge_hook(
    attn_scores: Float[Tensor, "batch head query key"],
    hook: Any,
    *,
    state: FlowState,
    tau_max: float = 0.15,
    max_bridge_share: float = 0.9,
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
        state: Which tokens the rows and columns of this pass are.
        tau_max: Highest floor; 0 leaves everything as it is.
        max_bridge_share: Highest part of `p(S) + p(B)` that the bridge may be raised to.
        granularity: What S and B are, see `state`.
        heads: Heads to act on; all by default.
        sinks: Logits that join the softmax after this hook (gpt-oss), one per head; they count into O.
        placebo_seed: If given, a random region as large as the bridge is raised instead, to the same floor.
        report: Where to count what was done.

    Returns:
        The scores with shifted rows; the same tensor if no row changes.

    Raises:
        ModelError: If the pass is not the one that `state` describes, or a head does not exist.
        ValueError: If `tau_max` or `max_bridge_share` is out of range.
    """
    check_bridge(tau_max, max_bridge_share)
    project = partial(bridge_scores, tau_max=tau_max, max_bridge_share=max_bridge_share, sinks=sinks)
    where = (state, granularity, heads, placebo_seed, report)
    return _rewrite(attn_scores, hook, project, *where) if tau_max else attn_scores


def bridge_pattern_hook(
    pattern: Float[Tensor, "batch head query key"],
    hook: Any,
    *,
    state: FlowState,
    tau_max: float = 0.15,
    max_bridge_share: float = 0.9,
    granularity: Granularity = "segment",
    heads: Sequence[int] | None = None,
    placebo_seed: int | None = None,
    report: FlowReport | None = None,
) -> Float[Tensor, "batch head query key"]:
    """`bridge_hook` on post-softmax probabilities; for `hook_pattern` where scores cannot be edited.

    `pattern` takes the place of the scores. Arguments, result and errors as in `bridge_hook`.
    """
    check_bridge(tau_max, max_bridge_share)
    project = partial(bridge_pattern, tau_max=tau_max, max_bridge_share=max_bridge_share)
    where = (state, granularity, heads, placebo_seed, report)
    return _rewrite(pattern, hook, project, *where) if tau_max else pattern


def check_bridge(tau_max: float, max_bridge_share: float) -> None:
    """Refuse parameters without a meaning, with a ValueError."""
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
    chosen = None if heads is None else head_mask(heads, n_heads, attention.device)
    counts = None if report is None else report.of(layer_of(hook.name))
    result = attention
    for span in spans:
        for queries in _blocks(span, attention):
            n_seen = span.n_keys - (span.queries.stop - queries.stop)
            block = attention[span.rows, :, queries, :n_seen]
            groups, counted = span.groups[..., :n_seen], span.counted[..., :n_seen]
            projected, shifts = project(block, groups, counted=counted, heads=chosen)
            if counts is not None:
                n_looked_at = span.n_rows_acted_on * n_heads * block.shape[2]
                counts.add_bridge(shifts.active, shifts.capped, shifts.gain, n_looked_at)
            if not shifts.active.any():
                continue
            if projected.shape == attention.shape:  # the one block of a decoding pass
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


class Shifts(NamedTuple):
    """What becomes of each row.

    Attributes:
        own: Logarithm of the factor on S; -0.0 in rows that are left alone.
        bridge: Logarithm of the factor on B; -0.0 in rows that are left alone.
        active: Rows that change.
        gain: `tau - p(B)` in rows that change, 0 elsewhere.
        capped: Rows whose bridge is below the paper's tau, and whose tau was capped.
    """

    own: Float[Tensor, "row head query 1"]
    bridge: Float[Tensor, "row head query 1"]
    active: Bool[Tensor, "row head query 1"]
    gain: Float[Tensor, "row head query 1"]
    capped: Bool[Tensor, "row head query 1"]


def bridge_scores(
    scores: Float[Tensor, "row head query key"],
    groups: Bool[Tensor, "2 row 1 1 key"],
    *,
    tau_max: float = 0.15,
    max_bridge_share: float = 0.9,
    counted: Bool[Tensor, "2 row 1 1 key"] | None = None,
    heads: Bool[Tensor, "head 1"] | None = None,
    sinks: Float[Tensor, " head"] | None = None,
) -> tuple[Float[Tensor, "row head query key"], Shifts]:
    """Project pre-softmax scores.

    Args:
        scores: Masked scores.
        groups: Keys of S and of B.
        tau_max: Highest floor.
        max_bridge_share: Highest part of `p(S) + p(B)` that B may be raised to, below 1.
        counted: Keys whose number sets tau; `groups` by default.
        heads: Heads to act on; all by default.
        sinks: Logits that join the softmax after the scores; they count into O.

    Returns:
        New scores of the same dtype, and what was done.
    """
    lowest = -1e30 if torch.finfo(scores.dtype).max > 1e30 else -3e4
    x = scores.to(torch.promote_types(scores.dtype, torch.float32))
    visible = x.detach() > lowest
    counts = (visible & (groups if counted is None else counted)).sum(-1)
    peak = x.detach().amax(-1, keepdim=True).clamp_min(lowest)
    sink = None if sinks is None else sinks.detach().to(scores.dtype).to(x.dtype).view(-1, 1, 1)
    if sink is not None:
        peak = torch.maximum(peak, sink)
    terms = (x - peak).exp()
    masses, total = (terms * groups).sum(-1), terms.sum(-1)
    if sink is not None:
        total = total + (sink - peak).exp().squeeze(-1)
    seen = (counts > 0).all(0)
    if (seen & (masses < _TINY).any(0)).any():
        log_masses = x.masked_fill(~(visible & groups), -torch.inf).logsumexp(-1) - peak.squeeze(-1)
        seen = seen & log_masses.isfinite().all(0)
        log_masses = torch.where(seen, log_masses, 0.0)
    else:
        log_masses = torch.where(seen, masses, 1.0).log()
    log_total = torch.where(seen, total, 2.0).log()
    shifts = shifts_of(log_masses, log_total, counts, seen, tau_max, max_bridge_share, heads)
    # -0.0 is the one number that changes no other when added to it, +0.0 and -0.0 included.
    shift = torch.where(groups[0], shifts.own, torch.where(groups[1], shifts.bridge, -0.0))
    return (x + shift).to(scores.dtype), shifts


def bridge_pattern(
    pattern: Float[Tensor, "row head query key"],
    groups: Bool[Tensor, "2 row 1 1 key"],
    *,
    tau_max: float = 0.15,
    max_bridge_share: float = 0.9,
    counted: Bool[Tensor, "2 row 1 1 key"] | None = None,
    heads: Bool[Tensor, "head 1"] | None = None,
) -> tuple[Float[Tensor, "row head query key"], Shifts]:
    """Project post-softmax probabilities, for models whose scores cannot be edited.

    The same projection as a product. A key is seen if its probability is above 0, a group of probability 0
    cannot be raised, and what a row lacks to 1 (a sink) counts into O. Arguments as in `bridge_scores`.
    """
    p = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    counts = ((p.detach() > 0) & (groups if counted is None else counted)).sum(-1)
    masses = (p * groups).sum(-1)
    seen = (counts > 0).all(0) & (masses > 0).all(0)
    log_masses = torch.where(seen, masses, 0.5).log()
    shifts = shifts_of(
        log_masses, torch.zeros_like(log_masses[0]), counts, seen, tau_max, max_bridge_share, heads
    )
    factor = torch.where(groups[0], shifts.own.exp(), torch.where(groups[1], shifts.bridge.exp(), 1.0))
    return (p * factor).to(pattern.dtype), shifts


def shifts_of(
    log_masses: Float[Tensor, "2 row head query"],
    log_total: Float[Tensor, "row head query"],
    counts: Int[Tensor, "2 row #head query"],
    seen: Bool[Tensor, "row head query"],
    tau_max: float,
    max_bridge_share: float,
    heads: Bool[Tensor, "head 1"] | None,
) -> Shifts:
    """What becomes of rows whose groups have these masses.

    Args:
        log_masses: Logarithms of the masses of S and B, less `log_total`.
        log_total: Logarithm of what they are parts of.
        counts: Keys of S and B that a row sees.
        seen: Rows that see both.
        tau_max: Highest floor.
        max_bridge_share: Highest part of `p(S) + p(B)` that B may be raised to.
        heads: Heads to act on; None for all.
    """
    log_own, log_bridge = (log_masses - log_total).unbind(0)
    ratio = counts[1].to(log_own.dtype) / counts.sum(0).clamp_min(1)
    log_tau = 0.5 * ratio.clamp_max(tau_max**2).log()
    log_movable = torch.logaddexp(log_own, log_bridge)
    log_cap = log_movable + math.log(max_bridge_share)
    log_target = torch.minimum(log_tau, log_cap)
    if heads is not None:
        seen = seen & heads
    active = seen & (log_bridge < log_target)
    own = log_movable + torch.log1p(-(log_target - log_movable).exp()) - log_own
    parts = (
        torch.where(active, own, -0.0),
        torch.where(active, log_target - log_bridge, -0.0),
        active,
        torch.where(active, log_target.exp() - log_bridge.exp(), 0.0),
        seen & (log_bridge < log_tau) & (log_cap < log_tau),
    )
    return Shifts(*(part.unsqueeze(-1) for part in parts))
