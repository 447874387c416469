"""`score="cut"` in the sweep: each row's mass and gain by step, tile by tile, closed row block by block.

1. A block of query rows gets two matrices `[key bin, row]`: P, the pattern summed over each bin, and G,
   pattern times gradient (`scores`).
2. Each tile that the sweep visits adds to both. A product of a whole tile with the one-hots of all steps in
   it would cost as much as one of the sweep's own. So its keys are cut into strips, each is multiplied by the
   one-hots of the few steps it meets, all in one batch, and the lines are added to their bins. Under the
   bridge that sums the bridged probabilities.
3. After the block's last tile all keys have been counted: `cut_effects` makes the effects of P, G and the
   sink's mass, and the rows of each step are added up.

Memory: a few matrices of the block's rows times all bins. Time: about that of passing over a tile a few
times; with steps of one or two tokens that of one or two of the sweep's products. On a GPU lines are added in
no fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.saliency.fused.steps import StepSums
from stepflow_tl.saliency.scores import cut_effects


class CutRows:
    """Mass and gain by key bin of one block of query rows, heads and queries as rows."""

    def __init__(
        self, sums: StepSums, queries: tuple[int, int], sink_mass: Float[Tensor, "head query"] | None
    ) -> None:
        """Nothing is counted yet; `sink_mass` is that of the block's rows."""
        n_heads, _, n_bins = sums.sums.shape
        self._sums, self._queries, self._sink_mass = sums, queries, sink_mass
        self._mass = sums.sums.new_zeros(n_bins, n_heads * (queries[1] - queries[0]))
        self._gain = torch.zeros_like(self._mass)

    def add_tile(
        self,
        first_key: int,
        pattern: Float[Tensor, "row key"],
        products: Float[Tensor, "row key"],
        factor: Float[Tensor, "row 1"] | None,
    ) -> None:
        """Count the keys of one tile.

        Args:
            first_key: Key of its first column.
            pattern: p, zero where hidden.
            products: `q c`, q what the bridge makes of p.
            factor: `q / p` of each row, where `pattern` is not q already.
        """
        for total, tile, weights in ((self._mass, pattern, factor), (self._gain, products, None)):
            for lines, bins in self._by_strips(tile, first_key):
                total.index_add_(0, bins, lines if weights is None else lines * weights.T)

    def _by_strips(
        self, tile: Float[Tensor, "row key"], first: int
    ) -> Iterator[tuple[Float[Tensor, "line row"], Int[Tensor, " line"]]]:
        """Sums over the keys of each strip and bin, and those bins: whole strips at once, then the ends."""
        one_hots, bins = self._sums.tiles.strips(tile)
        width, last = one_hots.shape[-1], first + tile.shape[1]
        start = min(-(-first // width) * width, last)
        end = max(last // width * width, start)
        if start < end:
            whole = slice(start // width, end // width)
            strips = tile[:, start - first : end - first].unflatten(1, (-1, width)).permute(1, 2, 0)
            yield torch.bmm(one_hots[whole], strips).flatten(0, 1), bins[whole].flatten()
        for part_start, part_end in ((first, start), (end, last)):
            if part_start < part_end:
                strip = part_start // width
                columns = one_hots[strip, :, part_start - strip * width : part_end - strip * width]
                yield columns @ tile[:, part_start - first : part_end - first].T, bins[strip]

    def close(self) -> None:
        """Add the effects to the sums; every tile of the block has been counted."""
        n_heads = self._sums.sums.shape[0]
        sink_mass = None if self._sink_mass is None else self._sink_mass.reshape(-1)
        effects = cut_effects(self._mass.T.contiguous(), self._gain.T.contiguous(), sink_mass)
        self._sums.add_rows(self._queries, effects.view(n_heads, -1, effects.shape[-1]))
