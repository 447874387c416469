"""Step maps in one or two bytes a cell, with a stated error.

1. A map is causal, so only its lower triangle is kept, row by row.
2. A row's largest value is kept as float32; every other cell as its logarithm relative to it: code 0 is
   nothing, the highest code is the largest value, and the codes between are even steps of the logarithm over
   `decades` decades. What lies below the last decade becomes 0.
3. Hence the relative error of a cell is at most half a step, whatever the level of its row.

Two bytes over 8 decades err by at most 0.014 %, one byte over 4 decades by 1.83 %. Memory: the codes, and a
few copies of one map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

Bits = Literal[8, 16]

_DECADES = {8: 4, 16: 8}


@dataclass(frozen=True)
class QuantisedMaps:
    """Lower triangles of step maps as codes.

    Attributes:
        bits: Bits a code: 8 or 16.
        codes: Unsigned codes, one row a map, its cells in the order (0, 0), (1, 0), (1, 1), (2, 0) ...
        row_max: Largest value of each row, float32.
    """

    bits: Bits
    codes: Shaped[np.ndarray, "map cell"]
    row_max: Shaped[np.ndarray, "map step"]

    @property
    def decades(self) -> int:
        """Decades below a row's largest value that are told from 0."""
        return _DECADES[self.bits]

    @property
    def relative_error(self) -> float:
        """Largest relative error of a cell that is not 0."""
        return 10 ** (self.decades / (_highest_code(self.bits) - 1) / 2) - 1

    def restored(self) -> Float[np.ndarray, "map query_step key_step"]:
        """The maps that the codes stand for, as the page computes them."""
        n_maps, n_steps = self.row_max.shape
        queries, keys = np.tril_indices(n_steps)
        below = (_highest_code(self.bits) - self.codes.astype(np.float64)) / (_highest_code(self.bits) - 1)
        values = self.row_max[:, queries] * 10.0 ** (-self.decades * below)
        maps = np.zeros((n_maps, n_steps, n_steps))
        maps[:, queries, keys] = np.where(self.codes == 0, 0.0, values)
        return maps


def quantise(maps: Float[Tensor, "map query_step key_step"], bits: Bits) -> QuantisedMaps:
    """Quantise the lower triangles of non-negative maps; what lies above the diagonal is not looked at."""
    n_maps, n_steps, _ = maps.shape
    queries, keys = np.tril_indices(n_steps)
    codes = np.zeros((n_maps, len(queries)), dtype=f"<u{bits // 8}")
    row_max = np.zeros((n_maps, n_steps), dtype="<f4")
    highest, decades = _highest_code(bits), _DECADES[bits]
    for index in range(n_maps):  # one map at a time: the logarithms take eight bytes a cell
        values = maps[index].tril().to("cpu", torch.float32).numpy()
        row_max[index] = values.max(axis=-1)
        above = row_max[index, queries].astype(np.float64)
        relative = np.divide(values[queries, keys], above, out=np.zeros_like(above), where=above > 0)
        with np.errstate(divide="ignore"):
            exact = highest + np.log10(relative) * ((highest - 1) / decades)
        # Code 1 is the last decade's end; what rounds below it is 0, as is the logarithm of 0.
        codes[index] = np.where(exact < 0.5, 0, np.rint(np.maximum(exact, 0)))
    return QuantisedMaps(bits, codes, row_max)


def _highest_code(bits: Bits) -> int:
    return 2**bits - 1
