"""The values that momentum averages: kept per layer as the passes deliver them, never copied.

A pass that starts at or before columns already held replaces them, so one store serves whole passes, cached
decoding, prefill in chunks and a cache that was cut back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.errors import ModelError


class ValueStore:
    """Values of the columns seen so far, by layer, as the passes delivered them."""

    def __init__(self) -> None:
        """An empty store."""
        self._chunks: dict[int, list[tuple[int, Tensor]]] = {}

    def add(self, layer: int, start: int, values: Float[Tensor, "batch pos kv_head d_head"]) -> None:
        """Keep the values of the columns from `start` on, in place of any that were there."""
        chunks = self._chunks.setdefault(layer, [])
        while chunks and chunks[-1][0] >= start:
            chunks.pop()
        if chunks and chunks[-1][0] + chunks[-1][1].shape[1] > start:
            first, chunk = chunks[-1]
            chunks[-1] = (first, chunk[:, : start - first])
        chunks.append((start, values))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; what a layer holds becomes one tensor."""
        for layer, chunks in self._chunks.items():
            held = torch.cat([chunk for _, chunk in chunks], dim=1)
            self._chunks[layer] = [(chunks[0][0], held[list(rows)])]

    def gather(self, layer: int, row: int, columns: Any) -> Float[Tensor, "pos kv_head d_head"]:
        """Values of one row at ascending `columns`.

        Raises:
            ModelError: If some were never captured.
        """
        lowest, highest = int(columns[0]), int(columns[-1])
        chunks = [
            (start, chunk)
            for start, chunk in self._chunks.get(layer, [])
            if start <= highest and start + chunk.shape[1] > lowest
        ]
        n_held = sum(chunk.shape[1] for _, chunk in chunks)
        if not chunks or chunks[0][0] > lowest or chunks[0][0] + n_held <= highest:
            raise ModelError(
                f"layer {layer}: the values of tokens {lowest}..{highest} were not captured: attach "
                "capture_values_hook at hook_v of this layer, and run the whole sequence with it attached."
            )
        held = torch.cat([chunk[row] for _, chunk in chunks])
        return held[torch.as_tensor(columns - chunks[0][0], device=held.device)]
