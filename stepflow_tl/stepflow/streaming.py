"""Following a model while it generates: token ids in, positions out.

1. The `forward` of the module that really runs (a HookedTransformer itself, or what a bridge wraps) is
   replaced by one that first reads the token ids and, off the KV cache, how many tokens came before them. The
   cache's length alone decides:
   * 0, and the ids do not continue what is known: a new sequence;
   * 0, and they do: the same sequence again, without a cache; known labels are kept;
   * as long as what is known: the next tokens, one or a chunk;
   * shorter: the cache was cut back; the rest is forgotten and labels go on from there.
2. HookedTransformer.generate embeds tokens first and runs the model on the residual. A pre-hook on the
   embedding remembers those ids until the pass that uses them.
3. Each row has a `TokenTracker` of its own. Padding, read off the attention mask, does not enter it.

Nothing is counted in calls, so an exception, a second sequence or a warm-up pass cannot put positions out of
step. Beam search moves rows between beams inside the cache; it is refused when it first tries.

Cost: microseconds per token; copies of the trackers every 64 tokens, so that cutting back replays at most
that many.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.models.facts import is_transformerlens, wrapped_model
from stepflow_tl.models.passes import replaced_forward
from stepflow_tl.stepflow.columns import NEVER, LabelTable
from stepflow_tl.stepflow.report import FlowReport
from stepflow_tl.stepflow.state import FlowState, Pass
from stepflow_tl.trace.splitting import TokenTracker
from stepflow_tl.trace.steps import Segment

_CHECKPOINT_EVERY = 64


class _Row:
    """One sequence of the batch: its tracker, and copies of it to go back to."""

    def __init__(self, tracker: TokenTracker) -> None:
        self.tracker = tracker
        self.columns: list[int] = []  # of each token
        self.checkpoints = [(0, tracker.clone())]

    def push(self, token_id: int, column: int, labels: LabelTable, row: int) -> None:
        """Take one token and write down what is known of it and what it settles."""
        label = self.tracker.push(token_id)
        self.columns.append(column)
        labels.segment[row, column] = int(label.segment)
        labels.step[row, column] = label.step
        labels.template_from[row, column] = column if label.segment == Segment.TEMPLATE else NEVER
        for token in range(*label.relabelled):
            relabelled = self.columns[token]
            labels.template_from[row, relabelled] = min(labels.template_from[row, relabelled], column)
        if len(self.columns) % _CHECKPOINT_EVERY == 0:
            self.checkpoints.append((len(self.columns), self.tracker.clone()))

    def crop(self, n_columns: int, token_ids: np.ndarray) -> None:
        """Go back to where only the first `n_columns` columns had come."""
        self.columns = [column for column in self.columns if column < n_columns]
        while self.checkpoints[-1][0] > len(self.columns):
            self.checkpoints.pop()
        n_tokens, tracker = self.checkpoints[-1]
        self.tracker = tracker.clone()
        for column in self.columns[n_tokens:]:
            self.tracker.push(int(token_ids[column]))


class TokenStream:
    """Labels of the tokens that enter a model, and the `FlowState` that hooks read.

    Attributes:
        state: Which tokens the current pass computes.
    """

    def __init__(self, new_tracker: Callable[[], TokenTracker]) -> None:
        """A stream that has seen nothing; `new_tracker` makes the tracker of one sequence."""
        self._new_tracker, self._names = new_tracker, []
        self.state = FlowState(LabelTable(0), Pass(0, 0))
        self._start(0)

    @property
    def tokens(self) -> np.ndarray:
        """Ids of the sequences so far, `[row, column]`, padding included."""
        return self._ids[:, : self._labels.n_columns]

    @property
    def segments(self) -> np.ndarray:
        """The segment of each of `tokens`, as it is known now."""
        return self._labels.segment[:, : self._labels.n_columns]

    def advance(self, ids: np.ndarray, n_past: int, is_padding: np.ndarray) -> None:
        """Move the state to the next pass: `ids` `[row, query]` and their padding, after `n_past` tokens.

        Raises:
            ModelError: If the cache holds tokens that this stream never saw.
        """
        n_rows, n_new = ids.shape
        n_known = self._labels.n_columns
        start = n_past
        if n_past == 0:
            start = min(n_known, n_new)
            if not self._repeats(ids[:, :start], is_padding[:, :start]):
                self._start(n_rows)
                start = n_known = 0
        elif n_past > n_known or n_rows != self._labels.n_rows:
            raise ModelError(
                f"the KV cache holds {n_past} tokens of {n_rows} rows, but {n_known} tokens of "
                f"{self._labels.n_rows} rows were followed. Run the prefix inside the same "
                "`with flow.generating(...)` as its continuation."
            )
        if start < n_known:
            self._crop(start)
        self._push(ids[:, start - n_past :], is_padding[:, start - n_past :])
        padding = np.cumprod(self._is_padding[:, : self._labels.n_columns], axis=1).sum(1).tolist()
        self.state.begin(self._labels, Pass(n_past, n_new), padding)

    def name_rows(self, names: Sequence[int]) -> None:
        """What the rows of the sequences to come are called, for the controls' random draws."""
        self._names = list(names)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order: the others have left the batch, and the cache."""
        if self._rows:
            self._labels.keep_rows(rows)
            self.state.values.keep_rows(rows)
            self.state.row_ids = [self.state.row_ids[row] for row in rows]
            self._rows = [self._rows[row] for row in rows]
            self._ids, self._is_padding = self._ids[list(rows)], self._is_padding[list(rows)]

    def _start(self, n_rows: int) -> None:
        self.state.row_ids = self._names if len(self._names) == n_rows else list(range(n_rows))
        self._labels = LabelTable(n_rows)
        self._rows = [_Row(self._new_tracker()) for _ in range(n_rows)]
        self._ids = np.empty((n_rows, 0), dtype=np.int64)
        self._is_padding = np.empty((n_rows, 0), dtype=bool)

    def _repeats(self, ids: np.ndarray, is_padding: np.ndarray) -> bool:
        known = slice(0, ids.shape[1])
        pairs = ((ids, self._ids[:, known]), (is_padding, self._is_padding[:, known]))
        return ids.shape[0] == self._labels.n_rows and all(np.array_equal(*pair) for pair in pairs)

    def _crop(self, n_columns: int) -> None:
        self._labels.crop(n_columns)
        for row, ids in zip(self._rows, self._ids, strict=True):
            row.crop(n_columns, ids)
        self._ids, self._is_padding = self._ids[:, :n_columns], self._is_padding[:, :n_columns]

    def _push(self, ids: np.ndarray, is_padding: np.ndarray) -> None:
        self._ids = np.concatenate([self._ids, ids], axis=1)
        self._is_padding = np.concatenate([self._is_padding, is_padding], axis=1)
        first = self._labels.extend(ids.shape[1]).start
        for row, tracked in enumerate(self._rows):
            for query, token_id in enumerate(ids[row].tolist()):
                if not is_padding[row, query]:
                    tracked.push(token_id, first + query, self._labels, row)


class FlowRun:
    """A model under StepFlow, while it generates and afterwards.

    Attributes:
        stream: The tokens followed so far.
    """

    def __init__(self, stream: TokenStream, report: FlowReport) -> None:
        """A run that reads `stream` and writes to `report`."""
        self.stream, self._report = stream, report

    def name_rows(self, names: Sequence[int]) -> None:
        """Give the rows of the batches to come their `names`, so that controls draw the same in any batch."""
        self.stream.name_rows(names)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these `rows` alone: to be called when the others are dropped from the KV cache."""
        self.stream.keep_rows(rows)

    def report(self) -> FlowReport:
        """What has been done so far."""
        return self._report


@contextmanager
def following(model: Any, stream: TokenStream) -> Iterator[None]:
    """Feed `stream` with everything that enters `model`, for the time of the context."""
    runner = wrapped_model(model)
    follower, original = _Follower(stream, runner.forward), runner.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            follower.before_pass(args, kwargs)
            return original(*args, **kwargs)
        finally:
            follower.after_pass()

    embedding = model.embed if is_transformerlens(model) else model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(follower.before_embedding, with_kwargs=True)
    try:
        # Not a module hook: HookedTransformer.generate calls `self.forward`, which runs none.
        with replaced_forward(runner, forward):
            yield
    finally:
        handle.remove()
        follower.release()


class _Follower:
    """Finds token ids, cache length and padding of each pass."""

    def __init__(self, stream: TokenStream, forward: Callable[..., Any]) -> None:
        self.stream, self._signature = stream, inspect.signature(forward)
        self._embedded: np.ndarray | None = None  # ids embedded outside a pass and not used yet
        self._is_inside = False
        self._awaited: dict[str, Any] | None = None  # a pass whose ids come only with its embedding
        self._guarded: list[Any] = []

    def before_pass(self, args: tuple, kwargs: dict[str, Any]) -> None:
        given = kwargs
        if args:
            given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
            given.update(given.pop("kwargs", {}))
        self._is_inside, self._awaited = True, None
        tokens = next((given[k] for k in ("input_ids", "input") if given.get(k) is not None), None)
        embeddings = given.get("inputs_embeds")
        if isinstance(tokens, Tensor) and tokens.is_floating_point():
            tokens, embeddings = None, tokens
        if isinstance(tokens, Tensor):
            self._advance(np.atleast_2d(tokens.detach().cpu().numpy()), given)
        elif embeddings is not None:
            self._advance(self._ids_of(embeddings, self._past(given)), given)
        else:
            self._awaited = given

    def after_pass(self) -> None:
        self._is_inside, self._awaited = False, None

    def before_embedding(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else next(iter(kwargs.values()))
        ids = np.atleast_2d(tokens.detach().cpu().numpy())
        if not self._is_inside:
            self._embedded = ids
        elif self._awaited is not None:
            given, self._awaited = self._awaited, None
            self._advance(ids, given)

    def release(self) -> None:
        for cache in self._guarded:
            cache.__dict__.pop("reorder_cache", None)

    def _advance(self, ids: np.ndarray, given: dict[str, Any]) -> None:
        mask = given.get("attention_mask")
        is_padding = np.zeros(ids.shape, dtype=bool)
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= ids.shape[1]:
            is_padding = mask[:, -ids.shape[1] :].cpu().numpy() == 0
        self._embedded = None
        self.stream.advance(ids, self._past(given), is_padding)

    def _ids_of(self, embeddings: Tensor, n_past: int) -> np.ndarray:
        """The ids behind embeddings: those embedded last, or, without a cache, all so far."""
        if self._embedded is not None and self._embedded.shape[0] == embeddings.shape[0]:
            n_queries = embeddings.shape[1]
            if self._embedded.shape[1] == n_queries:
                return self._embedded
            if n_past == 0 and self.stream.tokens.shape[0] == embeddings.shape[0]:
                ids = np.concatenate([self.stream.tokens, self._embedded], axis=1)
                if ids.shape[1] == n_queries:
                    return ids
        raise ModelError(
            "the model runs on embeddings whose token ids are not known. Pass token ids or text, or embed "
            "them with `model.embed` inside the context, just before the pass."
        )

    def _past(self, given: dict[str, Any]) -> int:
        cache = next((given[k] for k in _CACHE_NAMES if given.get(k) is not None), None)
        if cache is None:
            return 0
        if hasattr(cache, "get_seq_length"):
            self._refuse_beams(cache)
            return int(cache.get_seq_length())
        first = cache[0]
        return int(first.past_keys.shape[1] if hasattr(first, "past_keys") else first[0].shape[-2])

    def _refuse_beams(self, cache: Any) -> None:
        if hasattr(cache, "reorder_cache") and not any(cache is guarded for guarded in self._guarded):
            cache.reorder_cache = _refuse_to_reorder
            self._guarded.append(cache)


_CACHE_NAMES = ("past_key_values", "past_kv_cache", "layer_past")


def _refuse_to_reorder(*args: Any, **kwargs: Any) -> None:
    raise ModelError(
        "beam search moves sequences between rows of the KV cache, which StepFlow does not follow. "
        "Use num_beams=1: greedy decoding or sampling, with num_return_sequences for several samples."
    )
