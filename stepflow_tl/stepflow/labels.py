"""What was known of each token when it arrived, and when a later token changed it.

One table for a batch: `segment`, `step` as known when the token arrived, and `template_from`, the column
whose arrival turned the token into TEMPLATE (a marker spread over several plain tokens is only known once it
is complete). A query at column t may know of a key at column c: TEMPLATE if `template_from[c] <= t`, else
`segment[c]` and `step[c]`. So one pass over a finished trace and token-by-token decoding ask the same
question and get the same answer.

Columns are positions in the KV cache, padding included; padding is TEMPLATE.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
