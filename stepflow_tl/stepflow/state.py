"""Which tokens the rows and columns of the current forward pass are: the one owner of positions.

A hook sees a tensor and must know which tokens its queries and keys are. `FlowState` says so for the current
pass; nobody else counts.

1. A pass covers the columns `[start, start + n_queries)` of a `LabelTable`: all of them over a whole trace,
   the new ones while decoding with a cache.
2. A layer whose scores have `n_keys` columns holds the last `n_keys` of the columns so far. That is so for a
   full cache and for the cache of a sliding-window layer, which keeps only the window. A preallocated cache
   has more columns than tokens and is refused.
3. Queries that see the same groups of keys form a `QuerySpan`; groups are vectors over keys, computed once
   per pass and shared by all layers. Whether a query really sees a key (causality, window, padding) is read
   off its score.
4. `injections` are the first tokens of new steps in this pass, with the columns of the step before.

Groups (docs/method.md section 6; paper equation 5), with labels as known when the query arrived:

* `granularity="segment"`: S is the query's own segment; B is the question while thinking, thinking while
  summarising.
* `granularity="step"`: S is the query's own step; B is every earlier step and the question.
* O is the rest: TEMPLATE, other segments, padding. Queries in the question or in TEMPLATE belong to no span.

Cost: O(tokens) of small numpy work per pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.stepflow.columns import NEVER, LabelTable, ValueStore
from stepflow_tl.stepflow.placebo import random_region
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace.steps import Segment

Granularity = Literal["segment", "step"]
Boundaries = Literal["response", "all", "within", "thinking", "summary"]


class QuerySpan(NamedTuple):
    """Queries of one pass that see the same groups of keys.

    Attributes:
        rows: Range of batch rows.
        queries: Range of query indices within the pass.
        n_keys: Number of leading key columns that these queries may see.
        n_rows_acted_on: Rows of the batch in which both S and B have keys.
        groups: Keys of S and B.
        rest_and_bridge: Keys that are in neither group, and of B.
        counted: Keys that set tau; `groups` itself, placebos excepted.
        around_rest: Range of keys that holds all of B, and all that are in neither group.
        around_own: Range of keys that holds all of B and S.
        bridge_alone: Range of keys that holds all of B.
        own_alone: Range of keys that holds all of S.
    """

    rows: slice
    queries: slice
    n_keys: int
    n_rows_acted_on: int
    groups: Bool[Tensor, "2 row 1 1 key"]
    rest_and_bridge: Bool[Tensor, "2 row 1 1 key"]
    counted: Bool[Tensor, "2 row 1 1 key"]
    around_rest: range
    around_own: range
    bridge_alone: range
    own_alone: range


class Injection(NamedTuple):
    """The first token of a new step.

    Attributes:
        row: Batch row.
        query: Query index within the pass.
        position: The token's index in its row, padding not counted.
        columns: Columns of the step before.
    """

    row: int
    query: int
    position: int
    columns: np.ndarray


@dataclass(frozen=True)
class Pass:
    """The columns that one forward pass computes."""

    start: int
    n_queries: int

    @property
    def end(self) -> int:
        """The column after the last."""
        return self.start + self.n_queries


class FlowState:
    """Segments and steps of every query and key of the current forward pass.

    Build one with `from_trace` or `from_traces` for passes over whole traces; `StepFlow.generating` fills one
    while a model runs. A state may serve any number of passes and hooks; hooks only read it.

    Attributes:
        labels: What is known of each token.
        current: The columns that the current pass computes.
        padding: Padding columns at the left of each row.
        values: Values of the tokens so far, in the layers that capture them.
        row_ids: What the controls draw each row's random numbers from: its number in the batch, or what it
            was named, so that the draws do not depend on the batch.
    """

    def __init__(self, labels: LabelTable, current: Pass, padding: Sequence[int] | None = None) -> None:
        """State of a pass over the columns `current` of `labels`."""
        self.labels = labels
        self.current = current
        self.padding = list(padding) if padding is not None else [0] * labels.n_rows
        self.values = ValueStore()
        self.row_ids = list(range(labels.n_rows))
        self._plans: dict[tuple, object] = {}

    @classmethod
    def from_trace(cls, trace: ReasoningTrace) -> FlowState:
        """For passes over all tokens of one `trace`, a batch of one."""
        return cls.from_traces([trace])

    @classmethod
    def from_traces(
        cls, traces: Sequence[ReasoningTrace], padding_side: Literal["left", "right"] = "left"
    ) -> FlowState:
        """For passes over a batch of `traces`, padded on `padding_side` to the longest.

        Raises:
            ValueError: If there is no trace.
        """
        if not traces:
            raise ValueError("no trace: a state needs at least one")
        labels = LabelTable.from_traces(traces, padding_side)
        padding = [labels.n_columns - len(trace) if padding_side == "left" else 0 for trace in traces]
        return cls(labels, Pass(0, labels.n_columns), padding)

    def begin(self, labels: LabelTable, current: Pass, padding: Sequence[int]) -> None:
        """Move to another pass: `current`, with the `labels` of its tokens and each row's `padding`."""
        self.labels, self.current, self.padding = labels, current, list(padding)
        self._plans.clear()

    def check_shape(self, n_rows: int, n_queries: int, where: str) -> None:
        """Refuse `n_rows` by `n_queries` that are not this pass, with a ModelError that says `where`."""
        if (n_rows, n_queries) != (self.labels.n_rows, self.current.n_queries):
            raise ModelError(
                f"{where}: the model runs {n_rows} rows of {n_queries} tokens, but the state describes "
                f"{self.labels.n_rows} rows of {self.current.n_queries}. Run the model on exactly the "
                "tokens the hooks were made for; for cached passes use `with flow.generating(model):`."
            )

    def spans(
        self,
        n_keys: int,
        granularity: Granularity,
        *,
        placebo_seed: int | None = None,
        device: torch.device | str = "cpu",
    ) -> tuple[QuerySpan, ...]:
        """Queries and groups of keys for layers whose scores have `n_keys` columns.

        Args:
            n_keys: Key columns of the layer's scores.
            granularity: What S and B are.
            placebo_seed: If given, B is a random region of S and B together, of B's size.
            device: Where the groups are needed.

        Raises:
            ModelError: If the layer has more key columns than there are tokens: a preallocated cache.
        """
        if n_keys > self.current.end:
            raise ModelError(
                f"the attention scores have {n_keys} key columns, but only {self.current.end} tokens have "
                "entered: a preallocated (static) cache. StepFlow needs a cache that grows: leave "
                "`cache_implementation` at its default, or pass use_past_kv_cache=False."
            )
        key = (n_keys, granularity, placebo_seed, str(device))
        if key not in self._plans:
            lowest = self.current.end - n_keys
            make = self._decoding_span if self.current.n_queries == 1 else self._trace_spans
            self._plans[key] = tuple(
                _span(*parts, device) for parts in make(lowest, granularity, placebo_seed)
            )
        return self._plans[key]  # pyright: ignore[reportReturnType]

    def injections(self, boundaries: Boundaries, window: int | None) -> tuple[Injection, ...]:
        """First tokens of steps at `boundaries`, with the last `window` tokens (None: all) before each."""
        key = (boundaries, window)
        if key not in self._plans:
            self._plans[key] = tuple(self._find_injections(_BOUNDARY_TESTS[boundaries], window))
        return self._plans[key]  # pyright: ignore[reportReturnType]

    def _decoding_span(self, lowest: int, granularity: Granularity, seed: int | None):
        """One query per row: all rows in one span."""
        groups = self._groups(slice(0, self.labels.n_rows), self.current.start, granularity, seed)
        if groups is not None:
            yield slice(0, self.labels.n_rows), slice(0, 1), lowest, groups

    def _trace_spans(self, lowest: int, granularity: Granularity, seed: int | None):
        """Runs of queries between which neither their label nor that of any key changes."""
        start, end = self.current.start, self.current.end
        for row in range(self.labels.n_rows):
            late = self.labels.template_from[row]
            is_template = late[start:end] <= np.arange(start, end)
            label = self.labels.segment if granularity == "segment" else self.labels.step
            label = np.where(is_template, -1, label[row, start:end])
            cuts = (np.flatnonzero(np.diff(label)) + 1 + start).tolist()
            cuts += late[(late > np.arange(len(late))) & (late != NEVER)].tolist()
            if seed is not None:  # the region is drawn anew for each query
                cuts = range(start, end)
            edges = sorted({start, end} | {cut for cut in cuts if start < cut < end})
            for first, after in zip(edges, edges[1:], strict=False):
                groups = self._groups(slice(row, row + 1), after - 1, granularity, seed)
                if groups is not None:
                    yield slice(row, row + 1), slice(first - start, after - start), lowest, groups

    def _groups(self, rows: slice, column: int, granularity: Granularity, seed: int | None) -> _Groups | None:
        """S and B of the queries at `column`, over the columns up to it; None if no row has both."""
        labels, keys = self.labels, slice(0, column + 1)
        segment, step = (label[rows, None] for label in labels.label_at(column))
        known = (segment == _THINKING) | (segment == _SUMMARY)
        if not known.any():
            return None
        known = known & (labels.template_from[rows, keys] > column)
        if granularity == "segment":
            bridge_segment = np.where(segment == _THINKING, int(Segment.QUESTION), _THINKING)
            own = known & (labels.segment[rows, keys] == segment)
            bridge = known & (labels.segment[rows, keys] == bridge_segment)
        else:
            own = known & (labels.step[rows, keys] == step)
            bridge = known & (labels.step[rows, keys] < step)
        if not (own.any(-1) & bridge.any(-1)).any():
            return None
        if seed is None:
            return _Groups(own, bridge, own, bridge)
        region = np.zeros_like(bridge)
        for i, row in enumerate(range(rows.start, rows.stop)):
            region[i] = random_region(own[i], bridge[i], seed, self.row_ids[row], column - self.padding[row])
        return _Groups((own | bridge) & ~region, region, own, bridge)

    def _find_injections(self, wanted: Callable[[int, int], bool], window: int | None):
        labels, start = self.labels, self.current.start
        for row in range(labels.n_rows):
            steps, late = labels.step[row], labels.template_from[row]
            # A step begins where its number is first met. A provisional token repeats the number before it.
            so_far = np.maximum.accumulate(np.append(steps[:start].max(initial=-1), steps[start:]))
            for query in np.flatnonzero(np.diff(so_far)).tolist():
                column = start + query
                before = np.flatnonzero((steps[:column] == steps[column] - 1) & (late[:column] > column))
                if len(before) and wanted(
                    int(labels.segment[row, before[-1]]), int(labels.segment[row, column])
                ):
                    columns = before if window is None else before[-window:]
                    yield Injection(row, query, column - self.padding[row], columns)


class _Groups(NamedTuple):
    """Keys of S and B that are acted on, and those that set tau, `[row, column]`."""

    own: np.ndarray
    bridge: np.ndarray
    counted_own: np.ndarray
    counted_bridge: np.ndarray


_THINKING, _SUMMARY = int(Segment.THINKING), int(Segment.SUMMARY)
_BOUNDARY_TESTS: dict[str, Callable[[int, int], bool]] = {
    "response": lambda before, after: after in (_THINKING, _SUMMARY),
    "all": lambda before, after: True,
    "within": lambda before, after: before == after,
    "thinking": lambda before, after: before == after == _THINKING,
    "summary": lambda before, after: after == _SUMMARY,
}


def _span(rows: slice, queries: slice, lowest: int, groups: _Groups, device: Any) -> QuerySpan:
    own, bridge, counted_own, counted_bridge = (group[:, lowest:] for group in groups)
    acted_on = _key_masks(own, bridge, device)
    sets_tau = (
        acted_on if groups.own is groups.counted_own else _key_masks(counted_own, counted_bridge, device)
    )
    n_rows = int((own.any(-1) & bridge.any(-1)).sum())
    rest = ~(own | bridge)
    around = map(_around, (bridge | rest, own | bridge, bridge, own))
    beside = _key_masks(rest, bridge, device)
    return QuerySpan(rows, queries, own.shape[-1], n_rows, acted_on, beside, sets_tau, *around)


def _around(keys: np.ndarray) -> range:
    """From the first to the last key that is in this set in any row."""
    found = np.flatnonzero(keys.any(0))
    return range(int(found[0]), int(found[-1]) + 1) if len(found) else range(0)


def _key_masks(own: np.ndarray, bridge: np.ndarray, device: Any) -> Tensor:
    return torch.from_numpy(np.stack([own, bridge]))[:, :, None, None].to(device)
