"""The tile sweeps behind `attention`: z and the logsumexp forward; the pooled map, dq, dk and dv backward.

1. A call is cut into strips: the heads of one KV head times a range of query rows. A strip is cut into
   blocks of query rows, and the keys that a block sees into a fixed grid of columns. One block of rows and
   one column are a tile; the rows of its heads are stacked into one matrix. Tiles above the diagonal or
   before the band are never visited.
2. Per tile, as `attention` numbers it: the pattern again, the saliency, its pooling (for `score="cut"` by
   `cut_rows`, which ends with the block's last tile), the scores' gradient.
   What the mask hides inside a tile is zeroed in the pattern, and so in everything made from it. Under the
   bridge, f and E of `bridged` come in.
3. A strip owns its rows of z and dq. Its parts of dk, dv and of the pooled map are added up after all strips
   are done, in the order of the strips.

A tile's operations are too small for PyTorch's own threading (on two cores they take as long as on one). So
each core is given strips of its own and runs them single-threaded. Strips have equal numbers of visible keys,
and there are as few as keep all cores busy. Equal inputs on equally many threads give equal bits.
`torch.set_num_threads` is the only control; with one thread, on a GPU and for short calls nothing is shared
out. Threads live as long as one call: about 0.1 ms to start.

Memory: two or three tiles per worker. If several strips share a KV head, dk and dv are held once more for
each of them; the pooled map is held twice.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stepflow_tl.saliency.fused.call import AttentionSpec, BackwardCall, accumulation_dtype
from stepflow_tl.saliency.fused.cut_rows import CutRows
from stepflow_tl.saliency.fused.steps import StepSums, keys_per_tile

ROWS_PER_TILE = 512  # query rows of all heads that share one KV head
SHORTEST_SHARED = 256  # tokens; below, starting threads costs more than they save
LOG2_E = math.log2(math.e)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Strip:
    """A range of query rows `[start, end)` of the heads that share one KV head."""

    batch: int
    kv_head: int
    start: int
    end: int


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
        at = (strip.batch, _heads(strip, groups))
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
    call: BackwardCall, sums: StepSums | None, needed: tuple[bool, bool, bool]
) -> tuple[Any, Any, Any]:
    """Pool the saliency into `sums`, if given; return dq, dk, dv like q, k, v, or None where not `needed`."""
    work = call.logsumexp.dtype
    dq = torch.empty_like(call.query) if needed[0] else None
    dk = torch.zeros_like(call.key, dtype=work) if needed[1] else None
    dv = torch.zeros_like(call.value, dtype=work) if needed[2] else None
    groups = call.heads_per_group
    own = threading.local()

    def backward_strip(strip: Strip) -> _Partial:
        if not hasattr(own, "buffers"):
            own.buffers = {}
        group = call.sequence(strip.batch).kv_heads(strip.kv_head, strip.kv_head + 1)
        key, value = (x[0].to(work).contiguous() for x in (group.key, group.value))
        keys = slice(call.spec.first_key(strip.start), strip.end)
        partial = _Partial(
            keys=keys,
            dk=None if dk is None else torch.zeros_like(key[keys]),
            dv=None if dv is None else torch.zeros_like(value[keys]),
            sums=None if sums is None else sums.strip(groups, strip.start, strip.end),
        )
        own_dq = None if dq is None else dq[strip.batch, _heads(strip, groups)]
        _backward_strip(group, key, value, strip, partial, own_dq, own.buffers)
        return partial

    for strip, partial in _over_strips(backward_strip, call.query, call.key, call.spec):
        if dk is not None and partial.dk is not None:
            dk[strip.batch, strip.kv_head, partial.keys] += partial.dk
        if dv is not None and partial.dv is not None:
            dv[strip.batch, strip.kv_head, partial.keys] += partial.dv
        if sums is not None and partial.sums is not None:
            sums.add(_heads(strip, groups), partial.sums.steps, partial.sums.sums)
    return dq, None if dk is None else dk.to(call.key.dtype), None if dv is None else dv.to(call.value.dtype)


@dataclass
class _Partial:
    """A strip's growing share of sums that other strips add to as well; None where nobody asks."""

    keys: slice
    dk: Tensor | None  # [key, d_head]
    dv: Tensor | None  # [key, d_value]
    sums: StepSums | None


def _matrix(buffers: dict[str, Tensor], name: str, rows: int, columns: int, like: Tensor) -> Tensor:
    """A flat buffer of that name, reused by every tile of a worker so that it stays in cache."""
    if name not in buffers or buffers[name].numel() < rows * columns:
        buffers[name] = like.new_empty(rows * columns)
    return buffers[name][: rows * columns].view(rows, columns)


def _backward_strip(
    group: BackwardCall,
    key: Float[Tensor, "token d_head"],
    value: Float[Tensor, "token d_value"],
    strip: Strip,
    partial: _Partial,
    dq_out: Float[Tensor, "head token d_head"] | None,
    buffers: dict[str, Tensor],
) -> None:
    """One sweep over the tiles of one strip; `key` and `value` are the group's own in the working type."""
    spec = group.spec
    n_heads, _, d_head = group.query.shape
    matrix = functools.partial(_matrix, buffers, like=key)
    # Scores come out of the product in units of log 2: exp2 is a third of the price of exp on a CPU.
    unit = spec.scale * LOG2_E if spec.softcap is None else spec.scale / spec.softcap
    for start, end in _query_blocks(strip, n_heads, spec.block_divisor):
        rows = slice(start, end)
        n_rows = n_heads * (end - start)
        q = matrix("q", n_rows, d_head)
        torch.mul(group.query[:, rows], unit, out=q.view(n_heads, end - start, d_head))
        dz = matrix("dz", n_rows, value.shape[-1])
        dz.view(n_heads, end - start, -1).copy_(group.dz[:, rows])
        row_logsumexp = (group.logsumexp[:, rows] * LOG2_E).reshape(n_rows, 1)
        row_delta = group.delta[:, rows].reshape(n_rows, 1)
        dq = matrix("dq", n_rows, d_head).zero_() if dq_out is not None else None
        cut = None
        if partial.sums is not None and partial.sums.score == "cut":
            sink_mass = None if group.sink_mass is None else group.sink_mass[:, rows]
            cut = CutRows(partial.sums, (start, end), sink_mass)
        for first, last in _key_tiles(spec.first_key(start), end, keys_per_tile(spec.block_divisor)):
            own = slice(first - partial.keys.start, last - partial.keys.start)
            k, v = key[first:last], value[first:last]
            pattern = matrix("pattern", n_rows, len(k))
            torch.mm(q, k.T, out=pattern)
            capped = None
            if spec.softcap is not None:
                capped = matrix("capped", n_rows, len(k))
                torch.tanh(pattern, out=capped)
                torch.mul(capped, spec.softcap * LOG2_E, out=pattern)
            pattern.sub_(row_logsumexp).exp2_()
            _hide(pattern.view(n_heads, end - start, len(k)), (start, end), (first, last), spec)
            bridged, weighted, offset, row_factor = pattern, dz, row_delta, None
            if group.bridged is not None:
                factor, offset = group.bridged.tile((start, end), (first, last))
                if factor is not None and factor.shape[1] == 1:  # cheaper on dz than on the tile
                    row_factor = factor
                    weighted = torch.mul(dz, factor, out=matrix("weighted", n_rows, dz.shape[1]))
                elif factor is not None:
                    bridged = torch.mul(pattern, factor, out=matrix("bridged", n_rows, len(k)))
            if partial.dv is not None:
                partial.dv[own].addmm_(bridged.T, weighted)
            saliency = torch.mm(weighted, v.T, out=matrix("saliency", n_rows, len(k))).mul_(bridged)
            if cut is not None:
                cut.add_tile(first, bridged, saliency, row_factor)
            if dq is not None or partial.dk is not None:
                dscores = torch.addcmul(saliency, pattern, offset, value=-1, out=pattern)
                if capped is not None:
                    dscores.mul_(capped.square_().neg_().add_(1))
                if dq is not None:
                    dq.addmm_(dscores, k)
                if partial.dk is not None:
                    partial.dk[own].addmm_(dscores.T, q)
            if partial.sums is not None and cut is None:
                tile = saliency.view(n_heads, end - start, len(k))
                partial.sums.add_tile((start, end), (first, last), tile)
        if cut is not None:
            cut.close()
        if dq is not None and dq_out is not None:
            dq_out[:, rows] = dq.mul_(spec.scale).view(n_heads, end - start, d_head)
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
) -> Bool[Tensor, "query key"]:
    """True where the query does not see the key."""
    rows = torch.arange(*queries, device=device)[:, None]
    columns = torch.arange(*keys, device=device)
    hidden = columns > rows
    return hidden if spec.window is None else hidden | (columns <= rows - spec.window)


def _heads(strip: Strip, groups: int) -> slice:
    return slice(strip.kv_head * groups, (strip.kv_head + 1) * groups)


def cut_into_strips(
    n_batches: int, n_kv_heads: int, n_tokens: int, window: int | None, n_workers: int
) -> list[Strip]:
    """Strips of equal work that tile the call, as few as `n_workers` can share evenly."""
    n_ranges = n_workers // math.gcd(n_workers, n_batches * n_kv_heads)
    n_ranges = max(1, min(n_ranges, n_tokens // (SHORTEST_SHARED // 2)))
    visible = torch.arange(1, n_tokens + 1).clamp(max=window if window is not None else n_tokens).cumsum(0)
    shares = visible[-1] * torch.arange(1, n_ranges) / n_ranges
    edges = sorted({0, *torch.searchsorted(visible.to(shares.dtype), shares).tolist(), n_tokens})
    return [
        Strip(batch, kv_head, start, end)
        for batch in range(n_batches)
        for kv_head in range(n_kv_heads)
        for start, end in zip(edges[:-1], edges[1:], strict=True)
    ]


def count_workers(device: torch.device, n_tokens: int) -> int:
    """How many threads share a call of this length."""
    return torch.get_num_threads() if device.type == "cpu" and n_tokens >= SHORTEST_SHARED else 1


def share_out(function: Callable[[Item], Result], items: Sequence[Item], n_workers: int) -> list[Result]:
    """`[function(item) for item in items]` without gradients, on `n_workers` single-threaded workers."""
    n_workers = min(n_workers, len(items))
    if n_workers <= 1:
        with torch.no_grad():
            return [function(item) for item in items]

    def quietly(item: Item) -> Result:
        with torch.no_grad():  # the grad mode is a thread's own
            return function(item)

    n_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(quietly, items))
    finally:
        # The setting is a thread's own, but also the default of threads that start later.
        torch.set_num_threads(n_threads)
