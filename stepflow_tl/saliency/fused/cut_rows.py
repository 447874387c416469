"""`score="cut"` in the sweep: each row's mass and gain by step, tile by tile, closed row block by block.

1. A block of query rows gets two matrices `[row, key bin]`: P, the pattern summed over each bin, and G,
   pattern times gradient (`scores`).
2. Each tile that the sweep visits adds to both, by the key one-hots that the other scores use. Under the
   bridge it adds the bridged probabilities.
3. After the block's last tile all keys have been counted: `cut_effects` makes the effects of P, G and the
   sink's mass, and the rows of each step are added up.

Memory: two or three matrices of the block's rows times all bins. Time: two products of a tile with its
one-hots, in place of the other scores' one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
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
        self._mass = sums.sums.new_zeros(n_heads * (queries[1] - queries[0]), n_bins)
        self._gain = torch.zeros_like(self._mass)

    def add_tile(
        self,
        keys: tuple[int, int],
        pattern: Float[Tensor, "row key"],
        products: Float[Tensor, "row key"],
        factor: Float[Tensor, "row 1"] | None,
    ) -> None:
        """Count the keys of one tile.

        Args:
            keys: Its columns, half-open.
            pattern: p, zero where hidden.
            products: `q c`, q what the bridge makes of p.
            factor: `q / p` of each row, where `pattern` is not q already.
        """
        columns, steps = self._sums.tiles.columns(*keys, pattern)
        mass = pattern @ columns
        if factor is not None:
            mass *= factor
        for total, part in ((self._mass, mass), (self._gain, products @ columns)):
            total[:, steps] += part[:, :-1]
            total[:, -1] += part[:, -1]

    def close(self) -> None:
        """Add the effects to the sums; every tile of the block has been counted."""
        n_heads = self._sums.sums.shape[0]
        sink_mass = None if self._sink_mass is None else self._sink_mass.reshape(-1)
        effects = cut_effects(self._mass, self._gain, sink_mass)
        self._sums.add_rows(self._queries, effects.view(n_heads, -1, effects.shape[-1]))
