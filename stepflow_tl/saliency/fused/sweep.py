"""The tile sweeps behind `attention`: z and the logsumexp forward; the pooled map, dq, dk and dv backward.

1. A call is cut into strips (`cores`), a strip into blocks of query rows, and the keys that a block sees into
   a fixed grid of columns. One (block, column) pair is a tile; the rows of its heads are stacked into one
   matrix. Tiles above the diagonal or before the band are never visited.
2. Per tile, as `attention` numbers it: the pattern again, the saliency, its pooling, the scores' gradient.
   What the mask hides inside a tile is zeroed in the pattern, and so in everything made from it.
3. A strip owns its rows of z and dq. Its parts of dk, dv and of the pooled map are added up after all strips
   are done, in the order of the strips.

Memory: two or three tiles a worker. If several strips share a KV head, dk and dv are held once more for each
of them; the pooled map is held twice.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.saliency.fused.cores import Strip, count_workers, cut_into_strips, share_out
from stepflow_tl.saliency.fused.spec import AttentionSpec
from stepflow_tl.saliency.fused.tiles import KEYS_PER_TILE, ROWS_PER_TILE, StripSums, keys_per_tile

LOG2_E = math.log2(math.e)


def tiled_forward(
    query: Float[Tensor, "batch head token d_head"],
    key: Float[Tensor, "batch kv_head token d_head"],
    value: Float[Tensor, "batch kv_head token d_value"],
    spec: AttentionSpec,
) -> tuple[Float[Tensor, "batch head token d_value"], Float[Tensor, "batch head token"]]:
    """Return z and the logsumexp of each row's scores, in at least float32."""
    work = accumulation_dtype(query.dtype)
    batches, n_heads, n_tokens, _ = query.shape
    z = query.new_empty(batches, n_heads, n_tokens, value.shape[-1])
    logsumexp = query.new_empty(batches, n_heads, n_tokens, dtype=work)
    groups = n_heads // key.shape[1]

    def forward_strip(strip: Strip) -> None:
        at = (strip.batch, slice(strip.kv_head * groups, (strip.kv_head + 1) * groups))
        k, v = key[strip.batch, strip.kv_head].to(work), value[strip.batch, strip.kv_head].to(work)
        for start, end in _query_blocks(strip, groups, spec.block_divisor):
            first = spec.first_key(start)
            scores = (query[at][:, start:end].to(work) * spec.scale) @ k[first:end].T
            if spec.softcap is not None:
                scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
            scores.masked_fill_(_hidden((start, end), (first, end), spec, scores.device), float("-inf"))
            row = torch.logsumexp(scores, dim=-1)
            logsumexp[at][:, start:end] = row
            z[at][:, start:end] = (torch.exp(scores.sub_(row[..., None])) @ v[first:end]).to(z.dtype)

    _over_strips(forward_strip, query, key, spec)
    return z, logsumexp


def tiled_backward(
    query: Float[Tensor, "batch head token d_head"],
    key: Float[Tensor, "batch kv_head token d_head"],
    value: Float[Tensor, "batch kv_head token d_value"],
    logsumexp: Float[Tensor, "batch head token"],
    dz: Float[Tensor, "batch head token d_value"],
    delta: Float[Tensor, "batch head token"],
    spec: AttentionSpec,
    needed: tuple[bool, bool, bool],
) -> tuple[Any, Any, Any]:
    """Pool the saliency into `spec.step_sums`; return dq, dk, dv like q, k, v, or None where not `needed`."""
    work = logsumexp.dtype
    dq = torch.empty_like(query) if needed[0] else None
    dk = torch.zeros_like(key, dtype=work) if needed[1] else None
    dv = torch.zeros_like(value, dtype=work) if needed[2] else None
    groups = query.shape[1] // key.shape[1]
    own = threading.local()

    def backward_strip(strip: Strip) -> _Partial:
        if not hasattr(own, "buffers"):
            own.buffers = _TileBuffers(query.device, work)
        at = (strip.batch, slice(strip.kv_head * groups, (strip.kv_head + 1) * groups))
        group = _Group(
            query=query[at],
            key=key[strip.batch, strip.kv_head].to(work).contiguous(),
            value=value[strip.batch, strip.kv_head].to(work).contiguous(),
            dz=dz[at],
            delta=delta[at],
            logsumexp=logsumexp[at],
            dq=None if dq is None else dq[at],
        )
        sums = None if spec.step_sums is None else spec.step_sums.strip(groups, strip.start, strip.end)
        keys = slice(spec.first_key(strip.start), strip.end)
        partial = _Partial(
            keys=keys,
            dk=None if dk is None else torch.zeros_like(group.key[keys]),
            dv=None if dv is None else torch.zeros_like(group.value[keys]),
            sums=sums,
        )
        _backward_strip(group, strip, spec, partial, own.buffers)
        return partial

    for strip, partial in _over_strips(backward_strip, query, key, spec):
        if dk is not None and partial.dk is not None:
            dk[strip.batch, strip.kv_head, partial.keys] += partial.dk
        if dv is not None and partial.dv is not None:
            dv[strip.batch, strip.kv_head, partial.keys] += partial.dv
        if spec.step_sums is not None and partial.sums is not None:
            spec.step_sums.merge(slice(strip.kv_head * groups, (strip.kv_head + 1) * groups), partial.sums)
    return dq, None if dk is None else dk.to(key.dtype), None if dv is None else dv.to(value.dtype)


@dataclass(frozen=True)
class _Group:
    """The query heads that share one KV head."""

    query: Tensor  # [head, token, d_head]
    key: Tensor  # [token, d_head]
    value: Tensor  # [token, d_value]
    dz: Tensor  # [head, token, d_value]
    delta: Tensor  # [head, token]
    logsumexp: Tensor  # [head, token]
    dq: Tensor | None  # [head, token, d_head], written


@dataclass(frozen=True)
class _Partial:
    """What a strip adds to tensors that other strips add to as well; None where nobody asks."""

    keys: slice
    dk: Tensor | None  # [key, d_head]
    dv: Tensor | None  # [key, d_value]
    sums: StripSums | None


class _TileBuffers:
    """A few flat buffers, reused by every tile so that they stay in cache."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._flat: dict[str, Tensor] = {}

    def matrix(self, name: str, rows: int, columns: int) -> Tensor:
        flat = self._flat.get(name)
        if flat is None or flat.numel() < rows * columns:
            flat = self._flat[name] = torch.empty(rows * columns, device=self._device, dtype=self._dtype)
        return flat[: rows * columns].view(rows, columns)


def _backward_strip(
    group: _Group, strip: Strip, spec: AttentionSpec, partial: _Partial, buffers: _TileBuffers
) -> None:
    """One sweep over the tiles of one strip."""
    n_heads, _, d_head = group.query.shape
    # Scores come out of the product in units of log 2: exp2 is a third of the price of exp on a CPU.
    unit = spec.scale * LOG2_E if spec.softcap is None else spec.scale / spec.softcap
    for start, end in _query_blocks(strip, n_heads, spec.block_divisor):
        rows = slice(start, end)
        n_rows = n_heads * (end - start)
        q = buffers.matrix("q", n_rows, d_head)
        torch.mul(group.query[:, rows], unit, out=q.view(n_heads, end - start, d_head))
        dz = buffers.matrix("dz", n_rows, group.value.shape[-1])
        dz.view(n_heads, end - start, -1).copy_(group.dz[:, rows])
        row_logsumexp = (group.logsumexp[:, rows] * LOG2_E).reshape(n_rows, 1)
        row_delta = group.delta[:, rows].reshape(n_rows, 1)
        dq = buffers.matrix("dq", n_rows, d_head).zero_() if group.dq is not None else None
        for first, last in _key_tiles(
            spec.first_key(start), end, keys_per_tile(KEYS_PER_TILE, spec.block_divisor)
        ):
            own = slice(first - partial.keys.start, last - partial.keys.start)
            k, v = group.key[first:last], group.value[first:last]
            pattern = buffers.matrix("pattern", n_rows, len(k))
            torch.mm(q, k.T, out=pattern)
            capped = None
            if spec.softcap is not None:
                capped = buffers.matrix("capped", n_rows, len(k))
                torch.tanh(pattern, out=capped)
                torch.mul(capped, spec.softcap * LOG2_E, out=pattern)
            pattern.sub_(row_logsumexp).exp2_()
            _hide(pattern.view(n_heads, end - start, len(k)), (start, end), (first, last), spec)
            if partial.dv is not None:
                partial.dv[own].addmm_(pattern.T, dz)
            saliency = torch.mm(dz, v.T, out=buffers.matrix("saliency", n_rows, len(k))).mul_(pattern)
            if dq is not None or partial.dk is not None:
                dscores = torch.addcmul(saliency, pattern, row_delta, value=-1, out=pattern)
                if capped is not None:
                    dscores.mul_(capped.square_().neg_().add_(1))
                if dq is not None:
                    dq.addmm_(dscores, k)
                if partial.dk is not None:
                    partial.dk[own].addmm_(dscores.T, q)
            if partial.sums is not None:
                tile = saliency.abs_().view(n_heads, end - start, len(k))
                partial.sums.add((start, end), (first, last), tile)
        if dq is not None and group.dq is not None:
            group.dq[:, rows] = dq.mul_(spec.scale).view(n_heads, end - start, d_head)
    if partial.dk is not None:
        partial.dk.mul_(spec.scale / unit)


def _over_strips(
    function: Any, query: Tensor, key: Tensor, spec: AttentionSpec
) -> Iterator[tuple[Strip, Any]]:
    """Strips and what `function` made of them, in order."""
    n_workers = count_workers(query.device, query.shape[2])
    strips = cut_into_strips(query.shape[0], key.shape[1], query.shape[2], spec.window, n_workers)
    return zip(strips, share_out(function, strips, n_workers), strict=True)


def _query_blocks(strip: Strip, heads_per_group: int, block_divisor: int) -> list[tuple[int, int]]:
    step = max(16, ROWS_PER_TILE // block_divisor // heads_per_group // 16 * 16)
    return [(start, min(start + step, strip.end)) for start in range(strip.start, strip.end, step)]


def _key_tiles(first: int, end: int, width: int) -> list[tuple[int, int]]:
    edges = [first, *range(first // width * width + width, end, width), end]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _hide(pattern: Tensor, queries: tuple[int, int], keys: tuple[int, int], spec: AttentionSpec) -> None:
    """Zero what the mask hides of a `[head, query, key]` tile; tiles inside the band cost nothing."""
    (start, end), (first, last) = queries, keys
    if spec.first_key(end - 1) > first:
        pattern.masked_fill_(_hidden(queries, keys, spec, pattern.device), 0.0)
    elif last - 1 > start:
        # Only the columns from the block's first query on can lie above the diagonal.
        later = max(first, start)
        pattern[..., later - first :].tril_(start - later)


def _hidden(
    queries: tuple[int, int], keys: tuple[int, int], spec: AttentionSpec, device: torch.device
) -> Tensor:
    """`[query, key]` bool: True where the query does not see the key."""
    shape = (queries[1] - queries[0], keys[1] - keys[0])
    return _band(shape, keys[0] - queries[0], spec.window, device)


@functools.lru_cache(maxsize=64)
def _band(shape: tuple[int, int], offset: int, window: int | None, device: torch.device) -> Tensor:
    # What is hidden depends on positions only through the tile's distance from the diagonal, so tiles share
    # masks.
    distance = (
        torch.arange(shape[0], device=device)[:, None]
        - torch.arange(shape[1], device=device)[None, :]
        - offset
    )
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)
