"""What is kept per column: the labels of each token, and the values that momentum averages.

Columns are positions in the KV cache, padding included; padding is TEMPLATE.

1. `LabelTable`, one for a batch, holds `segment` and `step` as known when the token arrived, and
   `template_from`, the column whose arrival turned the token into TEMPLATE (a marker spread over several
   plain tokens is only known once it is complete). A query at column t may know of a key at column c:
   TEMPLATE if `template_from[c] <= t`, else `segment[c]` and `step[c]`. So one pass over a finished trace and
   token-by-token decoding ask the same question and get the same answer.
2. `ValueStore` holds the values of each layer as the passes deliver them, by reference. A pass that starts at
   or before columns already held replaces them, so one store serves whole passes, cached decoding, prefill in
   chunks and a cache that was cut back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace.steps import Segment

#: `template_from` of a token that never became TEMPLATE.
NEVER = np.iinfo(np.int64).max


class LabelTable:
    """Labels of a batch of token rows, `[row, column]`; grows to the right.

    Attributes:
        n_rows: Number of rows.
        n_columns: Number of columns filled.
    """

    def __init__(self, n_rows: int) -> None:
        """An empty table."""
        self.n_rows, self.n_columns = n_rows, 0
        self._data = np.empty((3, n_rows, 64), dtype=np.int64)

    @classmethod
    def from_traces(cls, traces: Sequence[ReasoningTrace], padding_side: str = "left") -> LabelTable:
        """Labels of whole traces, padded to the longest."""
        longest = max(len(trace) for trace in traces)
        table = cls(len(traces))
        table.extend(longest)
        for row, trace in enumerate(traces):
            start = longest - len(trace) if padding_side == "left" else 0
            columns = slice(start, start + len(trace))
            final, causal = trace.segment_ids.numpy(), trace.causal
            table.segment[row, columns] = causal.segment_ids.numpy()
            table.step[row, columns] = causal.step_ids.numpy()
            became_template = np.where(final == Segment.TEMPLATE, causal.resolved_at.numpy() + start, NEVER)
            table.template_from[row, columns] = became_template
        return table

    @property
    def segment(self) -> np.ndarray:
        """Segment as known when the token arrived."""
        return self._data[0, :, : self.n_columns]

    @property
    def step(self) -> np.ndarray:
        """Step as known when the token arrived; -1 on TEMPLATE."""
        return self._data[1, :, : self.n_columns]

    @property
    def template_from(self) -> np.ndarray:
        """Column whose arrival made the token TEMPLATE, or `NEVER`."""
        return self._data[2, :, : self.n_columns]

    def extend(self, n_new: int) -> slice:
        """Append columns of padding; return their range."""
        start, end = self.n_columns, self.n_columns + n_new
        if end > self._data.shape[2]:
            grown = np.empty((3, self.n_rows, max(end, 2 * self._data.shape[2])), dtype=np.int64)
            grown[:, :, :start] = self._data[:, :, :start]
            self._data = grown
        self.n_columns = end
        self.segment[:, start:] = int(Segment.TEMPLATE)
        self.step[:, start:] = -1
        self.template_from[:, start:] = np.arange(start, end)
        return slice(start, end)

    def crop(self, n_columns: int) -> None:
        """Forget all columns from `n_columns` on, and what they changed about earlier ones."""
        self.n_columns = n_columns
        self.template_from[self.template_from >= n_columns] = NEVER

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        self._data, self.n_rows = self._data[:, list(rows)], len(rows)

    def label_at(self, column: int) -> tuple[np.ndarray, np.ndarray]:
        """Segment and step of every row's query at `column`, as known then."""
        is_template = self.template_from[:, column] <= column
        segment = np.where(is_template, int(Segment.TEMPLATE), self.segment[:, column])
        return segment, np.where(is_template, -1, self.step[:, column])


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

    def gather(
        self, layer: int, row: int, columns: Int[np.ndarray, " pos"]
    ) -> Float[Tensor, "pos kv_head d_head"]:
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
