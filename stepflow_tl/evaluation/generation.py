"""Letting a model answer many questions, the same way under every condition.

1. The chat template opens each question; prompts are sorted by length, so that a batch needs little padding,
   and fill batches up to a number of tokens and of rows. Batches are the same under every condition.
2. A row leaves its batch when it has ended: its part of the KV cache is dropped (`models.cached_rows`), and
   so is StepFlow's knowledge of it. A batch costs what its rows cost, not the longest times their number.
3. A sampled token is the inverse of the sorted distribution at a number that is drawn from the seed, the
   prompt, the sample's number and the token's position. So a row's sample does not depend on its batch, and
   answers under two conditions share their random numbers: position by position, the same draw.
4. The finished tokens are cut into question, thinking and summary by the format's markers, as any trace is.

Nothing but `Decoding` shapes the answers: a model's own generation settings, such as a repetition penalty,
are left out, except for the tokens that end a turn. A batch changes rounding (matrix products of another
shape), so a greedy answer can differ where two tokens tie within it.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import FormatError, ModelError
from stepflow_tl.models.cached_rows import cached_rows, takes_padding
from stepflow_tl.models.facts import is_bridge
from stepflow_tl.stepflow.flow import FlowRun, StepFlow
from stepflow_tl.stepflow.placebo import mixed_seed
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace.formats.chat_template import question_prompt, resolve_format
from stepflow_tl.trace.steps import Segment


@dataclass(frozen=True)
class Decoding:
    """How answers are written.

    Args:
        max_new_tokens: Most tokens of thinking and answer together.
        temperature: 0 for greedy decoding.
        top_p: Nucleus of the sampling.
        n_samples: Answers per question.
        batch_size: Most answers written at once.
        batch_tokens: Most tokens in a batch, counted as if every answer took all its `max_new_tokens`; an
            answer that is longer by itself is written by itself.
        seed: Seed of the sampling.

    Raises:
        ValueError: If a number is out of range, or several samples are asked of greedy decoding.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    n_samples: int = 1
    batch_size: int = 16
    batch_tokens: int = 1 << 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every number."""
        for name in ("max_new_tokens", "n_samples", "batch_size", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature is {self.temperature} and top_p {self.top_p}: expected 0 or more, and 0 to 1"
            )
        if self.temperature == 0 and self.n_samples > 1:
            raise ValueError(
                f"{self.n_samples} samples of greedy decoding are all the same: set a temperature above 0"
            )


@dataclass(frozen=True)
class Answer:
    """What the model wrote.

    Attributes:
        tokens: Prompt and all that was written, without padding.
        thinking: The thinking's text.
        summary: The visible answer's text.
        n_new: Tokens written, the end marker included.
        finished: Whether the model ended by itself.
    """

    tokens: tuple[int, ...]
    thinking: str
    summary: str
    n_new: int
    finished: bool


class _Row(NamedTuple):
    """One answer to be written: which question's, after which prompt, and what its random draws come from."""

    question: int
    prompt: list[int]
    name: int


def write_answers(
    model: Any, questions: Sequence[str], flow: StepFlow | None, decoding: Decoding, *, format: Any = "auto"
) -> tuple[list[list[Answer]], float]:
    """Answers to each question, and the seconds it took to write them.

    Args:
        model: A TransformerLens model with a tokenizer.
        questions: The users' texts.
        flow: What is on the model meanwhile; None for nothing.
        decoding: How to decode.
        format: The reasoning format.

    Returns:
        `answers[question][sample]`; seconds of generation, without the cutting into segments.

    Raises:
        ModelError: If the tokenizer has no chat template.
        FormatError: If the format is unknown.
    """
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("the model's tokenizer has no chat template, which must open each question")
    entry, ends = resolve_format(tokenizer, format), end_tokens(model)
    prompts = [_prompt(tokenizer, entry, text) for text in questions]
    rows = [
        _Row(index, prompt, _name(prompt, sample))
        for index, prompt in enumerate(prompts)
        for sample in range(decoding.n_samples)
    ]
    answers: list[list[Answer]] = [[] for _ in questions]
    seconds = 0.0
    for batch in _batches(rows, decoding, takes_padding(model)):
        start = time.perf_counter()
        on = nullcontext() if flow is None else flow.generating(model, tokenizer, format=entry)
        with on as run, torch.no_grad():
            written = _write(model, batch, decoding, ends, run)
        seconds += time.perf_counter() - start
        for row, new in zip(batch, written, strict=True):
            answers[row.question].append(_answer(tokenizer, entry, row.prompt, new, ends))
    return answers, seconds


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end a model's turn: its tokenizer's, and those of its own generation settings."""
    config = getattr(model.original_model if is_bridge(model) else model, "generation_config", None)
    found: set[int] = set()
    for ends in (model.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        found.update([ends] if isinstance(ends, int) else ends or ())
    return frozenset(found)


def _prompt(tokenizer: Any, entry: Any, text: str) -> list[int]:
    prompt = question_prompt(tokenizer, entry, text)
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def _name(prompt: list[int], sample: int) -> int:
    """A number for this answer's random draws: of what is asked and the sample's number, nothing else."""
    digest = hashlib.sha256(",".join(map(str, prompt)).encode()).digest()
    return mixed_seed(int.from_bytes(digest[:8], "big"), sample)


def _batches(rows: list[_Row], decoding: Decoding, may_pad: bool) -> Iterator[list[_Row]]:
    rows = sorted(rows, key=lambda row: len(row.prompt))
    groups = [rows] if may_pad else [list(g) for _, g in itertools.groupby(rows, key=lambda r: len(r.prompt))]
    for group in groups:
        batch: list[_Row] = []
        for row in group:
            tokens = (len(batch) + 1) * (len(row.prompt) + decoding.max_new_tokens)  # the longest comes last
            if batch and (len(batch) == decoding.batch_size or tokens > decoding.batch_tokens):
                yield batch
                batch = []
            batch.append(row)
        yield batch


def _write(
    model: Any, batch: list[_Row], decoding: Decoding, ends: frozenset[int], run: FlowRun | None
) -> list[list[int]]:
    """New tokens of each row, up to and with the end marker."""
    if run is not None:
        run.name_rows([row.name for row in batch])
    pad = model.tokenizer.pad_token_id
    pad = next(iter(ends), 0) if pad is None else pad
    rows, logits = cached_rows(model, [row.prompt for row in batch], pad)
    written: list[list[int]] = [[] for _ in batch]
    held = list(range(len(batch)))  # the row of the batch that each row of the cache is
    for position in range(decoding.max_new_tokens):
        chosen = _choose(logits, [batch[i].name for i in held], position, decoding)
        for i, token in zip(held, chosen.tolist(), strict=True):
            if not written[i] or written[i][-1] not in ends:
                written[i].append(token)
        going = [place for place, i in enumerate(held) if written[i][-1] not in ends]
        if not going or position == decoding.max_new_tokens - 1:
            break
        if len(going) < len(held) and rows.can_drop:
            rows.keep(going)
            if run is not None:
                run.keep_rows(going)
            held, chosen = [held[place] for place in going], chosen[going]
        logits = rows.read(chosen[:, None])
    return written


def _choose(
    logits: Float[Tensor, "row vocabulary"], names: Sequence[int], position: int, decoding: Decoding
) -> Int[Tensor, " row"]:
    """The next token of every row: the likeliest, or one drawn from the nucleus."""
    if decoding.temperature == 0:
        return logits.argmax(-1)
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    shares, order = (logits.to(precise) / decoding.temperature).softmax(-1).sort(descending=True, stable=True)
    below = shares.cumsum(-1) - shares
    sums = shares.masked_fill(below >= decoding.top_p, 0).cumsum(-1)
    draws = [mixed_seed(decoding.seed, name, position) / 2**63 for name in names]
    at = torch.tensor(draws, dtype=precise, device=logits.device)[:, None] * sums[:, -1:]
    place = torch.searchsorted(sums, at, right=True).clamp(max=(sums < sums[:, -1:]).sum(-1, keepdim=True))
    return order.gather(-1, place)[:, 0]


def _answer(tokenizer: Any, entry: Any, prompt: list[int], new: list[int], ends: frozenset[int]) -> Answer:
    tokens = [*prompt, *new]
    thinking = summary = ""
    try:
        trace = ReasoningTrace.from_tokens(tokenizer, tokens, format=entry)
        thinking, summary = (
            "".join(step.text for step in trace.steps if step.segment == segment)
            for segment in (Segment.THINKING, Segment.SUMMARY)
        )
    except FormatError:  # a model may write anything; an answer that cannot be read is a wrong one
        pass
    return Answer(tuple(tokens), thinking, summary, len(new), bool(new) and new[-1] in ends)
