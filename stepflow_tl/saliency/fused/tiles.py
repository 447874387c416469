"""How one `[query, key]` square is walked, and how a tile of it is added into step bins.

1. Query rows are cut into blocks, keys into a fixed grid of columns; the part above the diagonal and, under
   a sliding window, the part before the band is never visited.
2. A tile meets few steps, because steps are contiguous. Its rows are summed per step by a `[step, row]`
   one-hot product, and what is left, one line per step, is summed over keys by a `[column, step]` one-hot
   product. The second is small: it costs `steps / rows` of the first.
3. TEMPLATE queries have no row in the first product, so they are dropped. TEMPLATE keys have the last
   column of the second, so their mass stays beside.

Memory: the key one-hots of a trace take `T * (steps per tile)` numbers and are built once for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

KEYS_PER_TILE = 1024
ROWS_PER_TILE = 512  # query rows of all heads that share one KV head


def keys_per_tile(keys: int, block_divisor: int) -> int:
    """Width of the grid of columns, which sweep and pooling must share."""
    return max(16, keys // block_divisor)


@dataclass(frozen=True)
class StepTiles:
    """Step bins of one trace, cut along the tile grid.

    Attributes:
        step_ids: Step of each token; -1 on TEMPLATE.
        n_steps: Number of steps.
        block_divisor: Tiles are smaller by this factor in rows and in keys.
    """

    step_ids: Int[Tensor, " token"]
    n_steps: int
    block_divisor: int = 1
    _cache: dict[tuple, tuple[Tensor, slice]] = field(default_factory=dict, repr=False, compare=False)

    def rows(self, start: int, end: int, like: Tensor) -> tuple[Float[Tensor, "step row"], slice]:
        """One-hot of the queries `[start, end)` and the steps its lines stand for."""
        return self._one_hot("rows", start, end, like)

    def columns(self, start: int, end: int, like: Tensor) -> tuple[Float[Tensor, "column bin"], slice]:
        """One-hot of the keys `[start, end)`, which lie in one tile of the grid; the last bin is TEMPLATE."""
        width = keys_per_tile(KEYS_PER_TILE, self.block_divisor)
        first = start // width * width
        last = min(first + width, len(self.step_ids))
        one_hot, steps = self._one_hot("columns", first, last, like)
        return one_hot[start - first : end - first], steps

    def steps_of(self, start: int, end: int) -> slice:
        """The steps that the tokens `[start, end)` meet; empty where all are TEMPLATE."""
        ids = self.step_ids[start:end]
        inside = ids[ids >= 0]
        return slice(int(inside.min()), int(inside.max()) + 1) if len(inside) else slice(0, 0)

    def _one_hot(self, kind: str, start: int, end: int, like: Tensor) -> tuple[Tensor, slice]:
        key = (kind, start, end, like.dtype, like.device)
        if key not in self._cache:  # two threads may both build it: the same numbers, and the last one stays
            ids = self.step_ids[start:end].cpu()
            steps = self.steps_of(start, end)
            lines = torch.arange(steps.start, steps.stop)
            if kind == "columns":
                lines = torch.cat([lines, torch.tensor([-1])])
                one_hot = ids[:, None] == lines[None, :]
            else:
                one_hot = lines[:, None] == ids[None, :]
            self._cache[key] = (one_hot.to(like.device, like.dtype), steps)
        return self._cache[key]


@dataclass(frozen=True)
class StripSums:
    """One strip's part of a layer's map: its heads, and the steps that its query rows meet.

    Attributes:
        tiles: The trace's step bins.
        steps: Which query steps the lines of `sums` stand for.
        sums: `[head, strip_step, key_bin]`; the last bin is TEMPLATE.
    """

    tiles: StepTiles
    steps: slice
    sums: Float[Tensor, "head strip_step key_bin"]

    def add(
        self, queries: tuple[int, int], keys: tuple[int, int], saliency: Float[Tensor, "head query key"]
    ) -> None:
        """Add the tile `saliency` (not negative) of these query rows and key columns, both half-open."""
        rows, query_steps = self.tiles.rows(*queries, saliency)
        if not len(rows):
            return
        columns, key_steps = self.tiles.columns(*keys, saliency)
        per_key = torch.matmul(rows, saliency)
        pooled = torch.matmul(per_key, columns).to(self.sums.dtype)
        out = self.sums[:, query_steps.start - self.steps.start : query_steps.stop - self.steps.start]
        out[..., key_steps] += pooled[..., :-1]
        out[..., -1] += pooled[..., -1]


@dataclass
class StepSums:
    """Where one layer's pooled map is added up.

    Attributes:
        tiles: The trace's step bins.
        sums: `[head, query_step, key_bin]`; the last bin is TEMPLATE.
        reached: Whether a gradient has come back to this layer.
    """

    tiles: StepTiles
    sums: Float[Tensor, "head query_step key_bin"]
    reached: bool = False

    @classmethod
    def zeros(cls, tiles: StepTiles, n_heads: int, *, dtype: torch.dtype, device: torch.device) -> StepSums:
        """An empty map."""
        return cls(tiles, torch.zeros(n_heads, tiles.n_steps, tiles.n_steps + 1, dtype=dtype, device=device))

    def strip(self, n_heads: int, start: int, end: int) -> StripSums:
        """An empty part for `n_heads` heads of the query rows `[start, end)`."""
        steps = self.tiles.steps_of(start, end)
        return StripSums(
            self.tiles, steps, self.sums.new_zeros(n_heads, steps.stop - steps.start, self.sums.shape[2])
        )

    def merge(self, heads: slice, strip: StripSums) -> None:
        """Add a finished part."""
        self.reached = True
        self.sums[heads, strip.steps] += strip.sums
