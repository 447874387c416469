"""The bridge's mathematics: raise the mass of one group of keys to a floor at the cost of another.

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

Tensors are `[row, head, query, key]`; groups are `[2, row, 1, 1, key]`, S first, the same for all queries of
a call.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

#: A group mass below this, relative to the row's largest term, is summed again in its own scale.
_TINY = 1e-25


class Shifts(NamedTuple):
    """What becomes of each row, `[row, head, query, 1]`.

    Attributes:
        own: Logarithm of the factor on S; -0.0 in rows that are left alone.
        bridge: Logarithm of the factor on B; -0.0 in rows that are left alone.
        active: Rows that change.
        gain: `tau - p(B)` in rows that change, 0 elsewhere.
        capped: Rows whose bridge is below the paper's tau, and whose tau was capped.
    """

    own: Tensor
    bridge: Tensor
    active: Tensor
    gain: Tensor
    capped: Tensor


def bridge_scores(
    scores: Float[Tensor, "row head query key"],
    groups: Bool[Tensor, "2 row 1 1 key"],
    *,
    tau_max: float | int = 0.15,
    max_bridge_share: float | int = 0.9,
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
    shifts = _shifts(log_masses, log_total, counts, seen, tau_max, max_bridge_share, heads)
    # -0.0 is the one number that changes no other when added to it, +0.0 and -0.0 included.
    shift = torch.where(groups[0], shifts.own, torch.where(groups[1], shifts.bridge, -0.0))
    return (x + shift).to(scores.dtype), shifts


def bridge_pattern(
    pattern: Float[Tensor, "row head query key"],
    groups: Bool[Tensor, "2 row 1 1 key"],
    *,
    tau_max: float | int = 0.15,
    max_bridge_share: float | int = 0.9,
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
    shifts = _shifts(
        log_masses, torch.zeros_like(log_masses[0]), counts, seen, tau_max, max_bridge_share, heads
    )
    factor = torch.where(groups[0], shifts.own.exp(), torch.where(groups[1], shifts.bridge.exp(), 1.0))
    return (p * factor).to(pattern.dtype), shifts


def _shifts(
    log_masses: Float[Tensor, "2 row head query"],
    log_total: Float[Tensor, "row head query"],
    counts: Tensor,
    seen: Bool[Tensor, "row head query"],
    tau_max: float | int,
    max_bridge_share: float | int,
    heads: Bool[Tensor, "head 1"] | None,
) -> Shifts:
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
