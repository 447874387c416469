"""The bridge on one attention call, from z and the logsumexp alone: no score outlives its block.

The bridge moves attention between two groups of a row and keeps the odds inside them. So with z the plain
output, `z_S` and `z_B` the outputs of attention restricted to S and to B, and `delta = tau - p(B)`,

    z' = z + delta * (z_B - z_S).

1. `p(g) = exp(logsumexp_g - logsumexp)`. Two of the groups are computed, each from its own keys alone: B, and
   whichever of S and O has fewer (while thinking: O, a few tokens of the prompt, gathered); the third is what
   is left to 1, and if that is S, `p(S) z_S = z - p(B) z_B - p(O) z_O`. A small p(S) is lost in rounding, but
   so it is in z': `delta * z_S = (delta / p(S)) * p(S) z_S`, and that quotient is at most 1. A row whose p(S)
   is all rounding is left alone.
   PyTorch's flash kernel computes a group; where it does not serve (`attention.by_kernel`), its scores do.
2. `shifts_of` of `bridge` turns the masses into tau and the shifts of S and B, the same code as for hooks.
3. Rows that are left alone keep their bits. Windows, padding and causality come from the mask, soft-cap and
   sinks from the call, the controls' random regions from the spans.

With `kept`, what a backward pass needs is returned as well (`BridgedRows`).

Cost: attention of each span's queries to B once more, and to the smaller of S and O: while thinking, the
prompt; while summarising, all but the smaller of prompt and summary. Memory: outputs of one block of queries,
and its scores or masks, at most `_BLOCK_ELEMENTS`. While decoding no copy of the cache, and no scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepflow_tl.models.attention import Call, at_keys, by_kernel, weighted_values
from stepflow_tl.stepflow.bridge import Shifts, log_floor, shifts_of
from stepflow_tl.stepflow.report import LayerReport
from stepflow_tl.stepflow.state import QuerySpan

_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Bridge:
    """The bridge of one layer.

    Attributes:
        tau_max: Highest floor.
        max_bridge_share: Highest part of `p(S) + p(B)` that the bridge may be raised to.
        heads: Heads to act on; None for all.
    """

    tau_max: float
    max_bridge_share: float
    heads: Bool[Tensor, "head 1"] | None = None


@dataclass
class BridgedRows:
    """What the bridge did to each row of a call, and what its backward pass needs; zeros elsewhere.

    Attributes:
        spans: Which keys are S and B, by queries.
        own: Logarithm of the factor on S.
        bridge: Logarithm of the factor on B.
        own_mass: p(S), before.
        bridge_mass: p(B), before.
        active: Rows that changed.
        capped: Rows whose tau was capped.
        z_own: p(S) times the output of attention restricted to S.
        z_bridge: Output of attention restricted to B.
    """

    spans: tuple[QuerySpan, ...]
    own: Float[Tensor, "batch head query"]
    bridge: Float[Tensor, "batch head query"]
    own_mass: Float[Tensor, "batch head query"]
    bridge_mass: Float[Tensor, "batch head query"]
    active: Bool[Tensor, "batch head query"]
    capped: Bool[Tensor, "batch head query"]
    z_own: Float[Tensor, "batch head query d_value"]
    z_bridge: Float[Tensor, "batch head query d_value"]

    @classmethod
    def nothing(cls, spans: tuple[QuerySpan, ...], call: Call) -> BridgedRows:
        """No row changed yet."""
        rows = [torch.zeros_like(call.logsumexp) for _ in range(4)]
        marks = [torch.zeros_like(rows[0], dtype=torch.bool) for _ in range(2)]
        outputs = [torch.zeros_like(call.z, dtype=rows[0].dtype) for _ in range(2)]
        return cls(spans, *rows, *marks, *outputs)

    def tensors(self) -> tuple[Tensor, ...]:
        """All but the spans, in order."""
        return tuple(getattr(self, field.name) for field in fields(self)[1:])


def bridged_attention(
    call: Call,
    spans: tuple[QuerySpan, ...],
    bridge: Bridge,
    *,
    counts: LayerReport | None = None,
    kept: BridgedRows | None = None,
) -> Float[Tensor, "batch head query d_value"]:
    """The output of the call under the bridge.

    Args:
        call: The call, computed without it.
        spans: Queries and their groups, from `FlowState.spans` for this number of keys.
        bridge: What to do.
        counts: Where to count what was done.
        kept: Where to leave what a backward pass needs.

    Returns:
        z with some rows replaced; the same tensor if no row changes.
    """
    result = call.z
    for span in spans:
        if not span.n_rows_acted_on:  # a sliding window has left one of the groups behind
            continue
        for queries in _blocks(span, call):
            groups = _groups_of(call, span, queries, bridge.tau_max)
            shifts = groups.shifts(bridge)
            if counts is not None:
                n_looked_at = span.n_rows_acted_on * call.z.shape[1] * (queries.stop - queries.start)
                counts.add_bridge(shifts.active, shifts.capped, shifts.gain, n_looked_at)
            at = (span.rows, slice(None), queries)
            if kept is not None:
                groups.keep(kept, at, shifts)
            if not shifts.active.any():
                continue
            z = call.z[at]
            # f_S = 1 - delta / p(S), so this is delta * (z_B - z_S).
            moved = z + (shifts.gain * groups.z_bridge + torch.expm1(shifts.own) * groups.z_own).to(z.dtype)
            moved = torch.where(shifts.active, moved, z)
            if moved.shape == result.shape:  # the one block of a decoding pass
                return moved
            if result is call.z:
                result = result.clone()
            result[at] = moved
    return result


class _Groups(NamedTuple):
    """Masses and outputs of S and B for a block of queries; `z_own` is p(S) times S's output."""

    log_masses: Float[Tensor, "2 row head query"]
    z_own: Float[Tensor, "row head query d_value"]
    z_bridge: Float[Tensor, "row head query d_value"]
    log_tau: Float[Tensor, "row 1 query"]
    seen: Bool[Tensor, "row head query"]

    def shifts(self, bridge: Bridge) -> Shifts:
        """What becomes of each row."""
        log_masses = torch.where(self.seen, self.log_masses, -1.0)
        return shifts_of(log_masses, self.log_tau, self.seen, bridge.max_bridge_share, bridge.heads)

    def keep(self, kept: BridgedRows, at: tuple[slice, slice, slice], shifts: Shifts) -> None:
        """Write down what a backward pass needs."""
        active = shifts.active[..., 0]
        masses = torch.where(active, self.log_masses, -torch.inf).exp()
        for name, found in (
            ("own", shifts.own[..., 0]),
            ("bridge", shifts.bridge[..., 0]),
            ("own_mass", masses[0]),
            ("bridge_mass", masses[1]),
            ("active", active),
            ("capped", active & shifts.capped[..., 0]),
            ("z_own", self.z_own),
            ("z_bridge", self.z_bridge),
        ):
            getattr(kept, name)[at] = found


def _groups_of(call: Call, span: QuerySpan, queries: slice, tau_max: float) -> _Groups:
    """Group masses and outputs of these queries of the span."""
    at = (span.rows, slice(None), queries)
    logsumexp, view = call.logsumexp[at], _view_of(call, span, queries, tau_max)
    log_second, z_second = _restricted(call, at, view.second)
    log_bridge, z_bridge = _restricted(call, at, view.bridge)
    log_masses = torch.stack([log_second, log_bridge]) - logsumexp
    masses = log_masses.exp()
    z_second = masses[0, ..., None] * z_second
    has_mass = log_masses > -torch.inf
    seen = view.sees_both & has_mass[1]
    if not view.second_is_rest:
        return _Groups(log_masses, z_second, z_bridge, view.log_tau, seen & has_mass[0])
    own_mass = 1 - masses.sum(0)
    if call.sinks is not None:
        sink = call.sinks.to(call.query.dtype).to(masses.dtype)[:, None]
        own_mass = own_mass - (sink - logsumexp).exp()
    z_own = call.z[at] - masses[1, ..., None] * z_bridge - z_second
    no_mass = 8 * torch.finfo(masses.dtype).eps
    log_masses = torch.stack([own_mass.clamp_min(no_mass).log(), log_masses[1]])
    return _Groups(log_masses, z_own, z_bridge, view.log_tau, seen & (own_mass > no_mass))


class _Part(NamedTuple):
    """What a block of queries sees of a group.

    Attributes:
        keys: Keys that include all of it.
        mask: Minus infinity at keys that are not of it or not seen, else 0; None if there are none.
        is_empty: Queries that see none of it; None if there are none.
    """

    keys: range | Int[Tensor, " key"]
    mask: Float[Tensor, "row 1 #query key"] | None
    is_empty: Bool[Tensor, "row 1 #query"] | None


class _View(NamedTuple):
    """What a block of queries sees of B and of the smaller of S and O, and each row's floor."""

    bridge: _Part
    second: _Part
    second_is_rest: bool
    log_tau: Float[Tensor, "row 1 query"]
    sees_both: Bool[Tensor, "row 1 query"]


def _view_of(call: Call, span: QuerySpan, queries: slice, tau_max: float) -> _View:
    """What these queries see; the layers of a decoding pass share it."""
    visible, dtype = call.visible, call.query.dtype
    known_by = (id(visible.mask), visible.window, dtype, tau_max)
    if known_by in span.views:
        return span.views[known_by][0]

    def part(group: Tensor, keys: range | Tensor) -> _Part:
        inside = slice(keys.start, keys.stop) if isinstance(keys, range) else keys
        wanted, block = group[..., inside], visible.block(span.rows, queries, keys)
        if isinstance(block, Tensor):
            wanted = wanted & block.to(wanted.device)
        if bool(wanted.all()):
            return _Part(keys, None, None)
        mask = torch.zeros(wanted.shape, dtype=dtype, device=wanted.device)
        is_empty = ~wanted.any(-1)
        return _Part(keys, mask.masked_fill_(~wanted, -torch.inf), is_empty if is_empty.any() else None)

    last = visible.n_keys - visible.n_queries + queries.stop
    own_keys = range(span.own_keys.start, min(span.own_keys.stop, last))
    second_is_rest = len(span.rest_keys) < len(own_keys)
    second = part(span.rest, span.rest_keys) if second_is_rest else part(span.groups[0], own_keys)
    counts = visible.counts(span.rows, queries, span.counted)
    log_tau = log_floor(counts, tau_max, call.logsumexp.dtype)
    bridge = part(span.groups[1], span.bridge_keys)
    view = _View(bridge, second, second_is_rest, log_tau, (counts > 0).all(0))
    if visible.n_queries == 1:
        span.views[known_by] = view, visible.mask  # so that no other mask gets its id
    return view


def _restricted(
    call: Call, at: tuple[slice, slice, slice], part: _Part
) -> tuple[Float[Tensor, "row head query"], Float[Tensor, "row head query d_value"]]:
    """Logsumexp and output of attention to one group alone; minus infinity and zeros where it is empty."""
    (rows, _, queries), keys, query, work = at, part.keys, call.query[at], call.logsumexp.dtype
    shape, value, found = query.shape, at_keys(call.value[rows], keys), None
    if not len(keys):
        z = query.new_zeros(*shape[:-1], value.shape[-1])
        return query.new_full(shape[:-1], -torch.inf, dtype=work), z
    if _kernel_serves(call):
        key = at_keys(call.key[rows], keys)
        if query.shape[2] == 1:  # a KV head's queries as the rows of one head, several times as fast
            query = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
        found = by_kernel(query, key, value, scale=call.scale, mask=part.mask)
    if found is not None:
        logsumexp = found[1].reshape(shape[:-1])
        if part.is_empty is not None:  # the kernel says 0 there
            logsumexp = torch.where(part.is_empty, -torch.inf, logsumexp)
        return logsumexp, found[0].reshape(shape)
    scores = call.scores(rows, queries, keys)
    scores = scores if part.mask is None else scores + part.mask
    peak = scores.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    terms = (scores - peak).exp()
    total = terms.sum(-1, keepdim=True)
    z = weighted_values(terms, value.to(work)) / torch.where(total > 0, total, 1.0)
    return (total.log() + peak)[..., 0], z


def _blocks(span: QuerySpan, call: Call) -> Iterator[slice]:
    """Blocks of queries, shorter where scores are formed of every head."""
    n_keys = max(min(len(span.rest_keys), len(span.own_keys)), len(span.bridge_keys), 1)
    n_heads = 1 if _kernel_serves(call) else call.z.shape[1]
    size = max(8, _BLOCK_ELEMENTS // ((span.rows.stop - span.rows.start) * n_heads * n_keys))
    for first in range(span.queries.start, span.queries.stop, size):
        yield slice(first, min(first + size, span.queries.stop))


def _kernel_serves(call: Call) -> bool:
    same_width = call.query.shape[-1] == call.value.shape[-1]
    return same_width and call.softcap is None and call.shift is None
