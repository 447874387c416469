"""Letting a model answer many questions, the same way under every condition.

1. The chat template opens each question; prompts are sorted by length, so that a batch needs little padding.
   Batches are the same under every condition.
2. Each batch starts from a random state of its own, made of the seed and the batch's number, so sampled
   answers under two conditions share their random numbers: position by position, the same draw.
3. The finished tokens are cut into question, thinking and summary by the format's markers, as any trace is.

Padding is on the left. HookedTransformer counts positions from the padding on in some configurations, so
there prompts of one length go together and there is none.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepflow_tl.errors import FormatError, ModelError
from stepflow_tl.models.facts import is_bridge
from stepflow_tl.models.passes import model_device
from stepflow_tl.stepflow.flow import StepFlow
from stepflow_tl.trace.assembly import build_from_tokens, resolve_format
from stepflow_tl.trace.formats.prompt import question_prompt
from stepflow_tl.trace.steps import Segment


@dataclass(frozen=True)
class Decoding:
    """How answers are written.

    Args:
        max_new_tokens: Most tokens of thinking and answer together.
        temperature: 0 for greedy decoding.
        top_p: Nucleus of the sampling.
        n_samples: Answers per question.
        batch_size: Answers written at once.
        seed: Seed of the sampling.

    Raises:
        ValueError: If a number is out of range, or several samples are asked of greedy decoding.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    n_samples: int = 1
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every number."""
        for name in ("max_new_tokens", "n_samples", "batch_size"):
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
    entry = resolve_format(tokenizer, format)
    prompts = [_prompt(tokenizer, entry, text) for text in questions]
    rows = [(index, prompt) for index, prompt in enumerate(prompts) for _ in range(decoding.n_samples)]
    answers: list[list[Answer]] = [[] for _ in questions]
    seconds = 0.0
    on = (
        (lambda: nullcontext()) if flow is None else (lambda: flow.generating(model, tokenizer, format=entry))
    )
    for number, batch in enumerate(_batches(rows, decoding.batch_size, is_bridge(model))):
        start = time.perf_counter()
        with on(), torch.random.fork_rng(devices=_cuda_devices(model)), torch.no_grad():
            torch.manual_seed(decoding.seed * 1_000_003 + number)
            written = _generate(model, [prompt for _, prompt in batch], decoding)
        seconds += time.perf_counter() - start
        for (index, prompt), new in zip(batch, written, strict=True):
            answers[index].append(_answer(tokenizer, entry, prompt, new))
    return answers, seconds


def _prompt(tokenizer: Any, entry: Any, text: str) -> list[int]:
    prompt = question_prompt(tokenizer, entry, text)
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def _batches(
    rows: list[tuple[int, list[int]]], size: int, may_pad: bool
) -> Iterator[list[tuple[int, list[int]]]]:
    rows = sorted(rows, key=lambda row: len(row[1]))
    groups = [rows] if may_pad else [list(g) for _, g in itertools.groupby(rows, key=lambda row: len(row[1]))]
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _generate(model: Any, prompts: list[list[int]], decoding: Decoding) -> list[list[int]]:
    """New tokens of each prompt, up to and with the end marker."""
    end, longest = model.tokenizer.eos_token_id, max(map(len, prompts))
    pad = model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else end
    device = model_device(model)
    batch = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    sampled = decoding.temperature > 0
    options: dict[str, Any] = dict(max_new_tokens=decoding.max_new_tokens, do_sample=sampled)
    if sampled:
        options.update(temperature=decoding.temperature, top_p=decoding.top_p)
    if is_bridge(model):
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        options.update({"top_k": 0} if sampled else {})
        out = model.original_model.generate(batch, attention_mask=mask, pad_token_id=pad, **options)
    else:
        out = model.generate(batch, eos_token_id=end, return_type="tokens", verbose=False, **options)
    return [_until_end(row[longest:], end) for row in out]


def _until_end(row: Tensor, end: int) -> list[int]:
    tokens = row.tolist()
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _answer(tokenizer: Any, entry: Any, prompt: list[int], new: list[int]) -> Answer:
    tokens = [*prompt, *new]
    thinking = summary = ""
    try:
        trace = build_from_tokens(tokenizer, tokens, entry, (None, None, None))
        thinking, summary = (
            "".join(step.text for step in trace.steps if step.segment == segment)
            for segment in (Segment.THINKING, Segment.SUMMARY)
        )
    except FormatError:  # a model may write anything; an answer that cannot be read is a wrong one
        pass
    finished = bool(new) and new[-1] == tokenizer.eos_token_id
    return Answer(tuple(tokens), thinking, summary, len(new), finished)


def _cuda_devices(model: Any) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
