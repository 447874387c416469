"""The bridge on one attention call, from z and the logsumexp alone: no score outlives its block.

The bridge moves attention between two groups of a row and keeps the odds inside them. So with z the plain
output, `z_S` and `z_B` the outputs of attention restricted to S and to B, and `delta = tau - p(B)`,

    z' = z + delta * (z_B - z_S).

1. `p(g) = exp(logsumexp_g - logsumexp)`. Two of the groups are computed, B and whichever of S and O needs the
   shorter range of keys (while thinking: O, a few tokens of the prompt); the third is what is left to 1, and
   if that is S, `p(S) z_S = z - p(B) z_B - p(O) z_O`. A small p(S) is lost in rounding, but so it is in z':
   `delta * z_S = (delta / p(S)) * p(S) z_S`, and that quotient is at most 1. A row whose p(S) is all rounding
   is left alone.
   In a whole pass without a mask, where that range is long, B's own is given to PyTorch's flash kernel, and
   the other group is O, its keys gathered, or S if that has fewer.
2. `shifts_of` of `bridge` turns the masses into tau and the shifts of S and B, the same code as for hooks.
3. Rows that are left alone keep their bits. Windows, padding and causality come from the mask, soft-cap and
   sinks from the call, the controls' random regions from the spans.

With `kept`, what a backward pass needs is returned as well (`BridgedRows`).

Cost: per span, the scores of its queries on the range of keys that the two groups lie in: while thinking,
the prompt; while summarising, all. Memory: one block of at most `_BLOCK_ELEMENTS` scores. While decoding: one
row of scores of that range, and no copy of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepflow_tl.models.attention import Call, by_kernel
from stepflow_tl.stepflow.bridge import Shifts, shifts_of
from stepflow_tl.stepflow.report import LayerReport
from stepflow_tl.stepflow.state import QuerySpan

_BLOCK_ELEMENTS = 1 << 20
#: A range of keys from which on a kernel's call pays.
_KERNEL_KEYS = 128


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
            groups = _groups_of(call, span, queries)
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
    counts: Int[Tensor, "2 row 1 query"]
    has_mass: Bool[Tensor, "row head query"]

    def shifts(self, bridge: Bridge) -> Shifts:
        """What becomes of each row."""
        seen = (self.counts > 0).all(0) & self.has_mass
        log_masses = torch.where(seen, self.log_masses, -1.0)
        total = torch.zeros_like(log_masses[0])
        return shifts_of(
            log_masses, total, self.counts, seen, bridge.tau_max, bridge.max_bridge_share, bridge.heads
        )

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


def _groups_of(call: Call, span: QuerySpan, queries: slice) -> _Groups:
    """Group masses and outputs of these queries of the span."""
    at = (span.rows, slice(None), queries)
    logsumexp = call.logsumexp[at]
    kernel_bridge = _bridge_by_kernel(call, span, queries)
    keys: range | Tensor
    if kernel_bridge is None:
        rest_is_computed = len(span.around_rest) <= len(span.around_own)
        keys = span.around_rest if rest_is_computed else span.around_own
    else:
        strays = _few_rest_keys(call, span, queries)
        rest_is_computed = strays is not None
        last = call.visible.n_keys - call.visible.n_queries + queries.stop
        own = range(span.own_alone.start, min(span.own_alone.stop, last))
        keys = own if strays is None else strays
    second_and_bridge = span.rest_and_bridge if rest_is_computed else span.groups
    inside = slice(keys.start, keys.stop) if isinstance(keys, range) else keys
    wanted = second_and_bridge[: 2 if kernel_bridge is None else 1, ..., inside]
    visible = call.visible.block(span.rows, queries, keys)
    if isinstance(visible, Tensor):
        wanted = wanted & visible.to(wanted.device)
    scores = call.scores(span.rows, queries, keys)
    value = call.value[span.rows, :, inside].to(scores.dtype)
    (log_second, *log_bridges), (z_second, *z_bridges) = _restricted(scores, wanted, value)
    log_bridge, z_bridge = kernel_bridge or (log_bridges[0], z_bridges[0])
    log_bridge, log_second = log_bridge - logsumexp, log_second - logsumexp
    z_second = log_second.exp()[..., None] * z_second
    counts = call.visible.counts(span.rows, queries, span.counted)
    has_mass = log_bridge.isfinite()
    if not rest_is_computed:
        has_mass = has_mass & log_second.isfinite()
        return _Groups(torch.stack([log_second, log_bridge]), z_second, z_bridge, counts, has_mass)
    bridge_mass, rest_mass = log_bridge.exp(), log_second.exp()
    if call.sinks is not None:
        sink = call.sinks.to(call.query.dtype).to(rest_mass.dtype)[:, None]
        rest_mass = rest_mass + (sink - logsumexp).exp()
    own_mass = 1 - rest_mass - bridge_mass
    z_own = call.z[at].to(rest_mass.dtype) - bridge_mass[..., None] * z_bridge - z_second
    no_mass = 8 * torch.finfo(rest_mass.dtype).eps
    has_mass = has_mass & (own_mass > no_mass)
    log_own = own_mass.clamp_min(no_mass).log()
    return _Groups(torch.stack([log_own, log_bridge]), z_own, z_bridge, counts, has_mass)


def _bridge_by_kernel(call: Call, span: QuerySpan, queries: slice) -> tuple[Tensor, Tensor] | None:
    """Logsumexp and output of B, if its keys are many and all seen by each of these queries; else None."""
    if not _is_for_kernel(call, span):
        return None
    at, inside = (span.rows, slice(None), queries), slice(span.bridge_alone.start, span.bridge_alone.stop)
    keys = span.groups[1][..., inside]
    tensors = (call.query[at], call.key[span.rows, :, inside], call.value[span.rows, :, inside])
    found = by_kernel(*tensors, scale=call.scale, mask=None if bool(keys.all()) else keys)
    return None if found is None else (found[1], found[0].to(found[1].dtype))


def _few_rest_keys(call: Call, span: QuerySpan, queries: slice) -> Int[Tensor, " stray"] | None:
    """The keys up to the last query that are in neither group of some row, if they are fewer than S's."""
    last = call.visible.n_keys - call.visible.n_queries + queries.stop
    found = span.rest_and_bridge[0, ..., :last].any(0).flatten().nonzero()[:, 0]
    n_own = min(span.own_alone.stop, last) - span.own_alone.start
    return found if len(found) < n_own else None


def _is_for_kernel(call: Call, span: QuerySpan) -> bool:
    """Whether B is long, before the queries of the span, and hidden by nothing."""
    visible = call.visible
    first = visible.n_keys - visible.n_queries + span.queries.start
    return (
        min(len(span.around_rest), len(span.around_own)) >= _KERNEL_KEYS
        and visible.n_queries > 1
        and visible.mask is None
        and visible.window is None
        and call.softcap is None
        and call.shift is None
        and span.bridge_alone.stop <= first + 1
    )


def _restricted(
    scores: Float[Tensor, "row head query key"],
    groups: Bool[Tensor, "group row 1 #query key"],
    value: Float[Tensor, "row kv_head key d_value"],
) -> tuple[list[Float[Tensor, "row head query"]], list[Float[Tensor, "row head query d_value"]]]:
    """Logsumexp and output of attention to each group alone; minus infinity and zeros if it is empty."""
    n_rows, n_heads, n_queries, n_keys = scores.shape
    by_kv_head = scores.view(n_rows, value.shape[1], 1, -1, n_queries, n_keys)
    alone = torch.where(groups.transpose(0, 1)[:, None], by_kv_head, -torch.inf)
    peak = alone.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    terms = (alone - peak).exp()
    total = terms.sum(-1)
    logsumexp = total.log() + peak[..., 0]
    # Groups are further rows of the product, so that no value is copied for them.
    z = (terms.flatten(2, 4) @ value).view(*total.shape, value.shape[-1])
    z = z / torch.where(total > 0, total, 1.0)[..., None]
    shape = (n_rows, n_heads, n_queries)
    return (
        [found.reshape(shape) for found in logsumexp.unbind(2)],
        [found.reshape(*shape, -1) for found in z.unbind(2)],
    )


def _blocks(span: QuerySpan, call: Call) -> Iterator[slice]:
    start, stop = span.queries.start, span.queries.stop
    n_keys = min(len(span.around_rest), len(span.around_own))
    if _is_for_kernel(call, span):
        strays = _few_rest_keys(call, span, span.queries)
        n_keys = len(span.own_alone) if strays is None else len(strays)
    size = max(8, _BLOCK_ELEMENTS // max(1, (span.rows.stop - span.rows.start) * call.z.shape[1] * n_keys))
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
