"""How the tiles of one attention call are shared out among CPU cores.

A tile's operations are too small for PyTorch's own threading: on two cores the products, the exponentials
and the pooling of a tile together take as long as on one. So each core is given tiles of its own and runs
them single-threaded.

1. The call is cut into strips: the heads of one KV head times a range of query rows. Ranges have equal
   numbers of visible keys, and there are as few as keep all cores busy.
2. Each worker thread sets its own number of PyTorch threads to one and takes strips from the list.
3. Results come back in the order of the strips, whichever core finished first, so equal inputs on equally
   many threads give equal bits.

`torch.set_num_threads` is the only control, as for PyTorch's own operations; with one thread, on a GPU and
for short calls nothing is shared out. Threads live as long as one call: about 0.1 ms to start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

SHORTEST_SHARED = 256  # tokens; below, starting threads costs more than they save

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Strip:
    """A range of query rows `[start, end)` of the heads that share one KV head."""

    batch: int
    kv_head: int
    start: int
    end: int


def cut_into_strips(
    n_batches: int, n_kv_heads: int, n_tokens: int, window: int | None, n_workers: int
) -> list[Strip]:
    """Strips of equal work that tile the call, as few as `n_workers` can share evenly."""
    n_ranges = n_workers // math.gcd(n_workers, n_batches * n_kv_heads)
    n_ranges = max(1, min(n_ranges, n_tokens // (SHORTEST_SHARED // 2)))
    edges = _equal_ranges(n_tokens, window, n_ranges)
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


def _equal_ranges(n_tokens: int, window: int | None, n_ranges: int) -> list[int]:
    if n_ranges == 1:
        return [0, n_tokens]
    visible = torch.arange(1, n_tokens + 1).clamp(max=window if window is not None else n_tokens).cumsum(0)
    shares = visible[-1] * torch.arange(1, n_ranges) / n_ranges
    inner = torch.searchsorted(visible.to(shares.dtype), shares).tolist()
    return sorted({0, *inner, n_tokens})
