"""Single requests, as an engine sends them, gathered into batches and written by one thread.

1. `submit` puts a request into a queue and returns a future.
2. The thread takes what is there, waiting for more until nothing has come for `WAIT` seconds or a batch is
   full. Requests with equal settings are planned and decoded as `evaluate` does it (`evaluation.decoding`).
3. A row ends at the model's end marker, at one of its stop sequences, or where the model's context is full.

The random draws come from seed, prompt, sample and position, so an answer does not depend on what else was
asked at the time; only rounding does. An error goes to the requests of its batch, and the thread goes on.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepflow_tl.engines.options import EngineFlow
from stepflow_tl.evaluation.decoding import Decoding, Row, decode_batch, end_tokens, plan_batches, row_name
from stepflow_tl.models.cached_rows import takes_padding
from stepflow_tl.models.facts import model_facts

WAIT = 0.2


@dataclass(frozen=True)
class Settings:
    """How a request is answered.

    Attributes:
        decoding: Tokens, temperature, nucleus, seed.
        stops: Texts that end an answer.
        top_logprobs: Of how many of the likeliest tokens the log-probabilities are wanted at each position;
            None for none, not even the written one's.
    """

    decoding: Decoding
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Request:
    """One answer that is asked for.

    Attributes:
        prompt: Token ids.
        settings: How it is answered.
        sample: Which answer to this prompt, from 0.
    """

    prompt: tuple[int, ...]
    settings: Settings
    sample: int = 0


@dataclass
class Written:
    """One answer.

    Attributes:
        tokens: What was written, the end marker included.
        reason: Why it ended: "stop", "max_tokens" or "model_length".
        logprobs: If asked for, per token: its own log-probability, and the likeliest tokens with theirs.
        seconds: Of its batch.
    """

    tokens: list[int] = field(default_factory=list)
    reason: str = "max_tokens"
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    seconds: float = 0.0


class Gatherer:
    """A model that answers requests in batches."""

    def __init__(self, model: Any, flow: EngineFlow, batch_size: int) -> None:
        """Start nothing yet.

        Args:
            model: A TransformerLens model or a transformers causal LM, with its tokenizer.
            flow: What is put on it.
            batch_size: Most answers written at once.
        """
        self._model, self._flow, self._batch_size = model, flow, batch_size
        self.ends = end_tokens(model)
        self._n_ctx = model_facts(model).n_ctx
        self._queue: queue.Queue[tuple[Request, Future[Written]] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def submit(self, request: Request) -> Future[Written]:
        """Ask for an answer."""
        future: Future[Written] = Future()
        self._queue.put((request, future))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="stepflow-tl writer")
            self._thread.start()
        return future

    def close(self) -> None:
        """End the thread when it has answered what was asked."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        is_open = True
        while is_open:
            waiting: list[tuple[Request, Future[Written]]] = []
            while len(waiting) < self._batch_size:
                try:
                    entry = self._queue.get(timeout=WAIT if waiting else None)
                except queue.Empty:
                    break
                if entry is None:
                    is_open = False
                    break
                if entry[1].set_running_or_notify_cancel():
                    waiting.append(entry)
            for settings in dict.fromkeys(request.settings for request, _ in waiting):
                self._answer(settings, [entry for entry in waiting if entry[0].settings == settings])

    def _answer(self, settings: Settings, asked: Sequence[tuple[Request, Future[Written]]]) -> None:
        rows = [
            Row(index, request.sample, request.prompt, row_name(request.prompt, request.sample))
            for index, (request, _) in enumerate(asked)
        ]
        for batch in plan_batches(rows, settings.decoding, takes_padding(self._model)):
            futures = [asked[row.question][1] for row in batch]
            try:
                answers = self._write(settings, batch)
            except BaseException as error:  # the thread must live on, and whoever waits must hear of it
                for future in futures:
                    future.set_exception(error)
            else:
                for future, answer in zip(futures, answers, strict=True):
                    future.set_result(answer)

    def _write(self, settings: Settings, batch: Sequence[Row]) -> list[Written]:
        start, tokenizer = time.perf_counter(), self._model.tokenizer
        answers = [Written() for _ in batch]
        # Of a text of n characters a tokenizer makes 4n tokens at most, one for each byte.
        tail = max((4 * len(stop) for stop in settings.stops), default=0) + 4

        def watch(i: int, token: int, logits: Tensor) -> bool:
            answer = answers[i]
            answer.tokens.append(token)
            if settings.top_logprobs is not None:
                shares = logits.float().log_softmax(-1)
                top = shares.topk(settings.top_logprobs)
                pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
                answer.logprobs.append((float(shares[token]), list(pairs)))
            if token in self.ends:
                answer.reason = "stop"
            elif settings.stops and _contains(tokenizer.decode(answer.tokens[-tail:]), settings.stops):
                answer.reason = "stop"
            elif len(batch[i].prompt) + len(answer.tokens) >= self._n_ctx:
                answer.reason = "model_length"
            return answer.reason != "max_tokens"

        with torch.no_grad(), self._flow.on([r.prompt for r in batch], [r.sample for r in batch]) as run:
            decode_batch(self._model, batch, settings.decoding, self.ends, run, watch)
        for answer in answers:
            answer.seconds = time.perf_counter() - start
        return answers


def _contains(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)
