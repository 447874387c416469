"""Letting a model answer many questions, the same way under every condition.

1. The chat template opens each question; batches are planned ahead (`decoding`), the same under every
   condition.
2. Each batch is decoded with StepFlow on the model or without, through the same attention.
3. The finished tokens are cut into question, thinking and summary by the format's markers, as any trace is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from stepflow_tl.errors import FormatError, ModelError, TraceError
from stepflow_tl.evaluation.decoding import Decoding, Row, decode_batch, end_tokens, plan_batches, row_name
from stepflow_tl.models.attention_interface import without_scores
from stepflow_tl.models.cached_rows import takes_padding
from stepflow_tl.models.facts import tokenizer_of
from stepflow_tl.stepflow.flow import StepFlow
from stepflow_tl.stepflow.streaming import FlowRun
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace.formats import ReasoningFormat
from stepflow_tl.trace.formats.chat_template import question_prompt, resolve_format
from stepflow_tl.trace.splitting.splitters import resolve_splitter
from stepflow_tl.trace.steps import Segment


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
            Row(index, sample, prompt, row_name(prompt, sample))
            for index, prompt in enumerate(map(self._prompt, questions))
            for sample in range(decoding.n_samples)
        ]
        self.batches: tuple[tuple[Row, ...], ...] = tuple(plan_batches(rows, decoding, takes_padding(model)))

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
        with (
            torch.no_grad(),
            flow_on(self._model, tokenizer, flow, format=self.format, splitter=splitter) as run,
        ):
            written = decode_batch(self._model, rows, decoding, self._ends, run)
        seconds = time.perf_counter() - start
        answers = [
            answer_of(tokenizer, self.format, row.prompt, new, self._ends)
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


@contextmanager
def flow_on(
    model: Any, tokenizer: Any, flow: StepFlow | None, *, format: ReasoningFormat, splitter: Any
) -> Iterator[FlowRun | None]:
    """Put what a condition asks for on the model; the same attention under every condition.

    Args:
        model: A TransformerLens model or a transformers causal LM.
        tokenizer: Its own.
        flow: StepFlow; None, or one without a layer to act in, for nothing.
        format: The reasoning format.
        splitter: What cuts steps.

    Yields:
        StepFlow's run; None where nothing is on.
    """
    if flow is None or not flow.layers(model):
        with without_scores(model):
            yield None
    else:
        with flow.generating(model, tokenizer, format=format, splitter=splitter) as run:
            yield run


def answer_of(
    tokenizer: Any, entry: ReasoningFormat, prompt: Sequence[int], new: Sequence[int], ends: frozenset[int]
) -> Answer:
    """What a model wrote, cut by the format's markers; empty texts where it cannot be cut.

    Args:
        tokenizer: The model's.
        entry: The reasoning format.
        prompt: Token ids of what was asked.
        new: Those of what was written.
        ends: Tokens that end an answer.
    """
    tokens = [*prompt, *new]
    thinking = summary = ""
    try:
        trace = ReasoningTrace.from_tokens(tokenizer, tokens, format=entry)
        thinking, summary = (
            "".join(s.text for s in trace.steps if s.segment == segment and s.token_start >= len(prompt))
            for segment in (Segment.THINKING, Segment.SUMMARY)
        )
    except (
        FormatError,
        TraceError,
    ):  # a model may write anything; an answer that cannot be read is a wrong one
        pass
    return Answer(tuple(tokens), thinking, summary, len(new), bool(new) and new[-1] in ends)
