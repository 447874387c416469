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
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import FormatError, ModelError, TraceError
from stepflow_tl.models.attention_interface import without_scores
from stepflow_tl.models.cached_rows import cached_rows, takes_padding
from stepflow_tl.models.facts import is_bridge, tokenizer_of
from stepflow_tl.stepflow.flow import StepFlow
from stepflow_tl.stepflow.placebo import mixed_seed
from stepflow_tl.stepflow.streaming import FlowRun
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace.formats.chat_template import question_prompt, resolve_format
from stepflow_tl.trace.splitting.splitters import resolve_splitter
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


@dataclass(frozen=True)
class Prompting:
    """How a question is put to the model, and how what it writes is cut.

    Args:
        format: The reasoning format: its name, a `ReasoningFormat`, or "auto" for the tokenizer's own.
        splitter: What cuts steps while StepFlow follows the text: a name or a `StepSplitter`.
        system: The system prompt; None leaves that to the chat template.
        prompt: The user's turn, with `{question}` where the question goes. Other braces stand for themselves.

    Raises:
        ValueError: If `prompt` has no place for the question.
    """

    format: Any = "auto"
    splitter: Any = "paragraph"
    system: str | None = None
    prompt: str = "{question}"

    def __post_init__(self) -> None:
        """Refuse a prompt that would ask every question in the same words."""
        if "{question}" not in self.prompt:
            raise ValueError(
                f"prompt is {self.prompt!r}: expected a text with {{question}} in it, where the question goes"
            )

    def turn(self, question: str) -> str:
        """The user's turn that asks `question`."""
        return self.prompt.replace("{question}", question)


class Row(NamedTuple):
    """One answer to be written.

    Attributes:
        question: Whose answer, counted from 0.
        sample: Which of the question's answers, counted from 0.
        prompt: Token ids of what is asked.
        name: What the random draws come from.
    """

    question: int
    sample: int
    prompt: tuple[int, ...]
    name: int


class AnswerWriter:
    """A model that answers given questions, batch by batch.

    Attributes:
        format: The reasoning format.
        batches: All answers that are asked for, as they are written together. They follow from the questions,
            the decoding and the kind of model alone, so a batch can be written at any time, or again.
    """

    def __init__(
        self, model: Any, questions: Sequence[str], decoding: Decoding, prompting: Prompting | None = None
    ) -> None:
        """Plan the batches; nothing is written yet.

        Args:
            model: A TransformerLens model, or a transformers causal LM, with a tokenizer (`model.tokenizer`).
            questions: The users' texts.
            decoding: How to decode.
            prompting: How to ask; by default the question alone, in the tokenizer's own format.

        Raises:
            ModelError: If the tokenizer has no chat template.
            FormatError: If the format is unknown, or the template refuses a message.
            TraceError: If the splitter is unknown.
        """
        tokenizer = tokenizer_of(model)
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError("the model's tokenizer has no chat template, which must open each question")
        self._model, self._decoding, self._prompting = model, decoding, prompting or Prompting()
        resolve_splitter(self._prompting.splitter)
        self._ends = end_tokens(model)
        self.format = resolve_format(tokenizer, self._prompting.format)
        rows = [
            Row(index, sample, prompt, _name(prompt, sample))
            for index, prompt in enumerate(map(self._prompt, questions))
            for sample in range(decoding.n_samples)
        ]
        self.batches: tuple[tuple[Row, ...], ...] = tuple(_batches(rows, decoding, takes_padding(model)))

    def write(self, rows: Sequence[Row], flow: StepFlow | None) -> tuple[list[Answer], float]:
        """The answers of one batch, in its order, and the seconds it took to write them.

        Args:
            rows: A batch, or part of one.
            flow: What is on the model meanwhile; None for nothing.

        Raises:
            ModelError: If the flow does not fit the model.
        """
        tokenizer, decoding = self._model.tokenizer, self._decoding
        splitter = self._prompting.splitter
        start = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            run = None
            if flow is None or not any(flow.bands(self._model)):
                stack.enter_context(without_scores(self._model))  # the same attention under every condition
            else:
                run = stack.enter_context(
                    flow.generating(self._model, tokenizer, format=self.format, splitter=splitter)
                )
            written = _write(self._model, rows, decoding, self._ends, run)
        seconds = time.perf_counter() - start
        answers = [
            _answer(tokenizer, self.format, row.prompt, new, self._ends)
            for row, new in zip(rows, written, strict=True)
        ]
        return answers, seconds

    def _prompt(self, question: str) -> tuple[int, ...]:
        tokenizer, prompting = self._model.tokenizer, self._prompting
        text = question_prompt(tokenizer, self.format, prompting.turn(question), prompting.system)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def write_answers(
    model: Any,
    questions: Sequence[str],
    flow: StepFlow | None,
    decoding: Decoding,
    *,
    prompting: Prompting | None = None,
) -> tuple[list[list[Answer]], float]:
    """Answers to each question, and the seconds it took to write them.

    Args:
        model: A TransformerLens model, or a transformers causal LM, with a tokenizer (`model.tokenizer`).
        questions: The users' texts.
        flow: What is on the model meanwhile; None for nothing.
        decoding: How to decode.
        prompting: How to ask, as in `AnswerWriter`.

    Returns:
        `answers[question][sample]`; seconds of generation, without the cutting into segments.

    Raises:
        ModelError: If the tokenizer has no chat template.
        FormatError: If the format is unknown.
        TraceError: If the splitter is unknown.
    """
    writer = AnswerWriter(model, questions, decoding, prompting)
    answers: dict[tuple[int, int], Answer] = {}
    seconds = 0.0
    for batch in writer.batches:
        written, spent = writer.write(batch, flow)
        seconds += spent
        answers |= {(row.question, row.sample): answer for row, answer in zip(batch, written, strict=True)}
    samples = range(decoding.n_samples)
    return [[answers[index, sample] for sample in samples] for index in range(len(questions))], seconds


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end a model's turn: its tokenizer's, and those of its own generation settings."""
    config = getattr(model.original_model if is_bridge(model) else model, "generation_config", None)
    found: set[int] = set()
    for ends in (model.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        found.update([ends] if isinstance(ends, int) else ends or ())
    return frozenset(found)


def _name(prompt: Sequence[int], sample: int) -> int:
    """A number for this answer's random draws: of what is asked and the sample's number, nothing else."""
    digest = hashlib.sha256(",".join(map(str, prompt)).encode()).digest()
    return mixed_seed(int.from_bytes(digest[:8], "big"), sample)


def _batches(rows: Sequence[Row], decoding: Decoding, may_pad: bool) -> Iterator[tuple[Row, ...]]:
    rows = sorted(rows, key=lambda row: len(row.prompt))
    groups = [rows] if may_pad else [list(g) for _, g in itertools.groupby(rows, key=lambda r: len(r.prompt))]
    for group in groups:
        batch: list[Row] = []
        for row in group:
            tokens = (len(batch) + 1) * (len(row.prompt) + decoding.max_new_tokens)  # the longest comes last
            if batch and (len(batch) == decoding.batch_size or tokens > decoding.batch_tokens):
                yield tuple(batch)
                batch = []
            batch.append(row)
        yield tuple(batch)


def _write(
    model: Any, batch: Sequence[Row], decoding: Decoding, ends: frozenset[int], run: FlowRun | None
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


def _answer(
    tokenizer: Any, entry: Any, prompt: Sequence[int], new: list[int], ends: frozenset[int]
) -> Answer:
    tokens = [*prompt, *new]
    thinking = summary = ""
    try:
        trace = ReasoningTrace.from_tokens(tokenizer, tokens, format=entry)
        thinking, summary = (
            "".join(step.text for step in trace.steps if step.segment == segment)
            for segment in (Segment.THINKING, Segment.SUMMARY)
        )
    except (
        FormatError,
        TraceError,
    ):  # a model may write anything; an answer that cannot be read is a wrong one
        pass
    return Answer(tuple(tokens), thinking, summary, len(new), bool(new) and new[-1] in ends)
