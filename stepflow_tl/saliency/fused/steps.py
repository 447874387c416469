"""Where the steps of a trace lie among tiles of the `[query, key]` square, and among blocks of GPU kernels.

On a CPU, `StepTiles` and `StepSums` add a tile of saliency into step bins. A tile meets few steps, because
steps are contiguous. Its rows are summed per step by a `[step, row]` one-hot product, and what is left, one
line per step, is summed over keys by a `[column, step]` one-hot product, which costs `steps / rows` of the
first. TEMPLATE queries have no row in the first product, so they are dropped; TEMPLATE keys have the last
column of the second, so their mass stays beside. `cut_rows` needs each row by itself, and cuts a tile's keys
into strips of `KEYS_PER_STRIP`, which meet few steps too: `StepTiles.strips`.

On a GPU, kernels index by runs and pairs (`StepRuns`). A run is a stretch of consecutive tokens of one step,
or of TEMPLATE between two steps. Runs tile the sequence, so consecutive bins need no special case inside a
kernel. A pair is a block of query rows together with a run that it meets. Pairs are numbered block by block,
so there are fewer than `blocks + runs` of them, and those of one run follow each other. With blocks of 4
tokens:

    step_ids    0 0 -1 1 | 1 1 1 1 | 2
    run_of      0 0  1 2 | 2 2 2 2 | 3
    pairs       0 0  1 2 | 3 3 3 3 | 4      first_pair = 0 3 4 5; step 1 has the pairs 2 and 3

Memory: the key one-hots of a trace take `T * (steps per tile)` numbers, or `T * (steps per strip)`, and are
built once for all layers.
Runs cost a few passes over the `T` step ids on the CPU, about a millisecond.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import FusedRefusal
from stepflow_tl.saliency.scores import Score

KEYS_PER_TILE = 1024
KEYS_PER_STRIP = 64


def keys_per_tile(block_divisor: int) -> int:
    """Width of the grid of columns, which sweep and pooling share."""
    return max(16, KEYS_PER_TILE // block_divisor)


class StepTiles:
    """Step bins of one trace, cut along the tile grid. Keeps the one-hots it has built.

    Attributes:
        step_ids: Step of each token; -1 on TEMPLATE.
        n_steps: Number of steps.
        block_divisor: Tiles are smaller by this factor in rows and in keys.
    """

    def __init__(self, step_ids: Int[Tensor, " token"], n_steps: int, block_divisor: int = 1) -> None:
        """Nothing is built until a tile asks for it."""
        self.step_ids, self.n_steps, self.block_divisor = step_ids, n_steps, block_divisor
        self._one_hots: dict[tuple, tuple[Tensor, slice]] = {}
        self._strips: dict[tuple, tuple[Tensor, Tensor]] = {}

    def rows(self, start: int, end: int, like: Tensor) -> tuple[Float[Tensor, "step row"], slice]:
        """One-hot of the queries `[start, end)` and the steps its lines stand for."""
        return self._one_hot("rows", start, end, like)

    def columns(self, start: int, end: int, like: Tensor) -> tuple[Float[Tensor, "column bin"], slice]:
        """One-hot of the keys `[start, end)`, which lie in one tile of the grid; the last bin is TEMPLATE."""
        width = keys_per_tile(self.block_divisor)
        first = start // width * width
        last = min(first + width, len(self.step_ids))
        one_hot, steps = self._one_hot("columns", first, last, like)
        return one_hot[start - first : end - first], steps

    def strips(self, like: Tensor) -> tuple[Float[Tensor, "strip line column"], Int[Tensor, "strip line"]]:
        """One-hots of strips of `KEYS_PER_STRIP` keys, one line per bin that a strip meets, and those bins.

        Lines that a strip does not need, and columns after the last key, are zero.
        """
        kind = (like.dtype, like.device)
        if kind not in self._strips:  # as with the one-hots, two threads may both build them
            width = KEYS_PER_STRIP
            bins = torch.where(self.step_ids >= 0, self.step_ids, self.n_steps).cpu().split(width)
            met = [strip.unique() for strip in bins]
            lines = torch.zeros(len(bins), max(map(len, met)), dtype=torch.long)
            one_hots = torch.zeros(*lines.shape, width, dtype=like.dtype)
            for number, (strip, own) in enumerate(zip(bins, met, strict=True)):
                lines[number, : len(own)] = own
                one_hots[number, : len(own), : len(strip)] = (own[:, None] == strip).to(like.dtype)
            self._strips[kind] = one_hots.to(like.device), lines.to(like.device)
        return self._strips[kind]

    def steps_of(self, start: int, end: int) -> slice:
        """The steps that the tokens `[start, end)` meet; empty where all are TEMPLATE."""
        ids = self.step_ids[start:end]
        inside = ids[ids >= 0]
        return slice(int(inside.min()), int(inside.max()) + 1) if len(inside) else slice(0, 0)

    def _one_hot(self, kind: str, start: int, end: int, like: Tensor) -> tuple[Tensor, slice]:
        key = (kind, start, end, like.dtype, like.device)
        if key not in self._one_hots:  # two threads may both build it: the same numbers, the last one stays
            ids = self.step_ids[start:end].cpu()
            steps = self.steps_of(start, end)
            lines = torch.arange(steps.start, steps.stop)
            if kind == "columns":
                lines = torch.cat([lines, torch.tensor([-1])])
                one_hot = ids[:, None] == lines[None, :]
            else:
                one_hot = lines[:, None] == ids[None, :]
            self._one_hots[key] = (one_hot.to(like.device, like.dtype), steps)
        return self._one_hots[key]


@dataclass
class StepSums:
    """Where one layer's pooled map is added up, or a strip's part of it, whose query rows meet few steps.

    Attributes:
        tiles: The trace's step bins.
        sums: `[head, query_step, key_bin]`; the last bin is TEMPLATE.
        steps: Which query steps the rows of `sums` stand for.
        score: What is added up.
        reached: Whether a gradient has come back to this layer.
    """

    tiles: StepTiles
    sums: Float[Tensor, "head query_step key_bin"]
    steps: slice
    score: Score = "saliency"
    reached: bool = False

    @classmethod
    def zeros(
        cls,
        tiles: StepTiles,
        n_heads: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        score: Score = "saliency",
    ) -> StepSums:
        """An empty map."""
        sums = torch.zeros(n_heads, tiles.n_steps, tiles.n_steps + 1, dtype=dtype, device=device)
        return cls(tiles, sums, slice(0, tiles.n_steps), score)

    def strip(self, n_heads: int, start: int, end: int) -> StepSums:
        """An empty part for `n_heads` heads of the query rows `[start, end)`."""
        steps = self.tiles.steps_of(start, end)
        sums = self.sums.new_zeros(n_heads, steps.stop - steps.start, self.sums.shape[2])
        return StepSums(self.tiles, sums, steps, self.score)

    def add_tile(
        self, queries: tuple[int, int], keys: tuple[int, int], products: Float[Tensor, "head query key"]
    ) -> None:
        """Add a tile of these query rows and key columns, half-open, of a score that is a sum over tokens.

        `products` are pattern times gradient, and may be overwritten.
        """
        rows, query_steps = self.tiles.rows(*queries, products)
        if not len(rows):
            return
        columns, key_steps = self.tiles.columns(*keys, products)
        per_key = torch.matmul(rows, products.abs_() if self.score == "saliency" else products)
        pooled = torch.matmul(per_key, columns).to(self.sums.dtype)
        out = self._of(query_steps)
        out[..., key_steps] += pooled[..., :-1]
        out[..., -1] += pooled[..., -1]

    def add_rows(self, queries: tuple[int, int], values: Float[Tensor, "head query key_bin"]) -> None:
        """Add these query rows, half-open, their keys summed already."""
        rows, query_steps = self.tiles.rows(*queries, values)
        self._of(query_steps).add_(torch.matmul(rows, values))

    def _of(self, query_steps: slice) -> Float[Tensor, "head query_step key_bin"]:
        return self.sums[:, query_steps.start - self.steps.start : query_steps.stop - self.steps.start]

    def add(self, heads: slice, steps: slice, sums: Float[Tensor, "head step key_bin"]) -> None:
        """Add a finished part, of some heads and query steps."""
        self.reached = True
        self.sums[heads, steps] += sums.to(self.sums.dtype)


@dataclass(frozen=True)
class StepRuns:
    """Runs of one bin, and the pairs of a query block and a run that it meets.

    Attributes:
        run_of: Run of each token.
        first_pair: First pair of each query block, and the number of pairs at the end.
        step_pairs: Half-open range of pairs of each step that occurs.
        steps: The steps that occur, ascending.
        step_runs: Run of each of these.
        template_runs: Runs of TEMPLATE.
        runs_per_block: The most runs that a block meets.
        n_runs: Number of runs.
        n_pairs: Number of pairs.
    """

    run_of: Int[Tensor, " token"]
    first_pair: Int[Tensor, " block_edge"]
    step_pairs: Int[Tensor, "step 2"]
    steps: Int[Tensor, " step"]
    step_runs: Int[Tensor, " step"]
    template_runs: Int[Tensor, " template_run"]
    runs_per_block: int
    n_runs: int
    n_pairs: int

    @classmethod
    def of(cls, step_ids: Int[Tensor, " token"], block: int) -> StepRuns:
        """Find the runs of `step_ids` and how blocks of `block` queries meet them.

        Raises:
            FusedRefusal: If a step occurs in two places.
        """
        step_ids = step_ids.cpu()
        bins, run_of = torch.unique_consecutive(step_ids, return_inverse=True)
        starts = torch.arange(0, len(step_ids), block)
        last_rows = (starts + block - 1).clamp(max=len(step_ids) - 1)
        met = run_of[last_rows] - run_of[starts] + 1
        first_pair = torch.cat([torch.zeros(1, dtype=torch.long), met.cumsum(0)])
        # A run's pairs: from the block of its first token to that of its last.
        first_token = torch.searchsorted(run_of, torch.arange(len(bins)))
        last_token = torch.cat([first_token[1:], torch.tensor([len(step_ids)])]) - 1

        def pair_of(token: Tensor) -> Tensor:
            return first_pair[token // block] + run_of[token] - run_of[token // block * block]

        pairs = torch.stack([pair_of(first_token), pair_of(last_token) + 1], dim=1)
        step_runs = torch.nonzero(bins >= 0).flatten()
        order = bins[step_runs].argsort()
        step_runs = step_runs[order]
        steps = bins[step_runs]
        if bool((steps[1:] == steps[:-1]).any()):
            twice = int(steps[1:][steps[1:] == steps[:-1]][0])
            raise FusedRefusal(f"step {twice} occurs in two places: a step's tokens must be consecutive")
        return cls(
            run_of=run_of.int(),
            first_pair=first_pair.int(),
            step_pairs=pairs[step_runs].int(),
            steps=steps,
            step_runs=step_runs,
            template_runs=torch.nonzero(bins < 0).flatten(),
            runs_per_block=int(met.max()),
            n_runs=len(bins),
            n_pairs=int(first_pair[-1]),
        )

    def to(self, device: torch.device) -> StepRuns:
        """The same on `device`."""
        tensors = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return StepRuns(**{**vars(self), **tensors})

    def add_into(
        self, sums: Float[Tensor, "head query_step key_bin"], folded: Float[Tensor, "head step run"]
    ) -> None:
        """Write `folded` into the rows and columns of the steps that occur, TEMPLATE into the last column."""
        sums[:, self.steps[:, None], self.steps] = folded[..., self.step_runs]
        sums[:, self.steps, -1] = folded[..., self.template_runs].sum(-1)
