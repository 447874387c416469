"""Decoding one batch of rows, token by token, and planning which rows share one.

1. Rows are sorted by the length of their prompts, so that a batch needs little padding, and fill batches up
   to a number of tokens and of rows.
2. A row leaves its batch when it has ended: its part of the KV cache is dropped (`models.cached_rows`), and
   so is StepFlow's knowledge of it. A batch costs what its rows cost, not the longest times their number.
3. A sampled token is the inverse of the sorted distribution at a number that is drawn from the seed, the
   prompt, the sample's number and the token's position. So a row's sample does not depend on its batch, and
   answers under two conditions share their random numbers: position by position, the same draw.

Nothing but `Decoding` shapes what is written: a model's own generation settings, such as a repetition
penalty, are left out, except for the tokens that end a turn. A batch changes rounding (matrix products of
another shape), so a greedy answer can differ where two tokens tie within it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepflow_tl.models.cached_rows import cached_rows
from stepflow_tl.models.facts import is_bridge
from stepflow_tl.stepflow.placebo import mixed_seed
from stepflow_tl.stepflow.streaming import FlowRun

_LIKELIEST = 256
"""Among how many tokens a draw is sought first: sorting a vocabulary can take longer than a pass."""


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


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end a model's turn: its tokenizer's, and those of its own generation settings."""
    config = getattr(model.original_model if is_bridge(model) else model, "generation_config", None)
    found: set[int] = set()
    for ends in (model.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        found.update([ends] if isinstance(ends, int) else ends or ())
    return frozenset(found)


def row_name(prompt: Sequence[int], sample: int) -> int:
    """A number for this answer's random draws: of what is asked and the sample's number, nothing else."""
    digest = hashlib.sha256(",".join(map(str, prompt)).encode()).digest()
    return mixed_seed(int.from_bytes(digest[:8], "big"), sample)


def plan_batches(rows: Sequence[Row], decoding: Decoding, may_pad: bool) -> Iterator[tuple[Row, ...]]:
    """The rows as they are decoded together: by length; of one length each unless `may_pad`."""
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


def decode_batch(
    model: Any,
    batch: Sequence[Row],
    decoding: Decoding,
    ends: frozenset[int],
    run: FlowRun | None,
    watch: Callable[[int, int, Tensor], bool] | None = None,
) -> list[list[int]]:
    """New tokens of each row, up to and with the end marker.

    Args:
        model: A TransformerLens model or a transformers causal LM.
        batch: What is answered.
        decoding: How.
        ends: Tokens that end an answer.
        run: StepFlow on the model, which is told of rows that leave; None for nothing.
        watch: Called with each row's number in the batch, its new token, and the logits `[vocabulary]` that
            it was chosen from; true ends the row.
    """
    if run is not None:
        run.name_rows([row.name for row in batch])
    pad = model.tokenizer.pad_token_id
    pad = next(iter(ends), 0) if pad is None else pad
    rows, logits = cached_rows(model, [row.prompt for row in batch], pad)
    written: list[list[int]] = [[] for _ in batch]
    held = list(range(len(batch)))  # the row of the batch that each row of the cache is
    ended: set[int] = set()
    for position in range(decoding.max_new_tokens):
        chosen = _choose(logits, [batch[i].name for i in held], position, decoding)
        for place, (i, token) in enumerate(zip(held, chosen.tolist(), strict=True)):
            if i not in ended:
                written[i].append(token)
                if (watch is not None and watch(i, token, logits[place])) or token in ends:
                    ended.add(i)
        going = [place for place, i in enumerate(held) if i not in ended]
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
    shares = (logits.to(precise) / decoding.temperature).softmax(-1)
    draws = [mixed_seed(decoding.seed, name, position) / 2**63 for name in names]
    at = torch.tensor(draws, dtype=precise, device=logits.device)[:, None]
    chosen, is_sure = _at_draws(shares, at, decoding.top_p, _LIKELIEST)
    if not is_sure.all():
        rest = ~is_sure
        chosen[rest], _ = _at_draws(shares[rest], at[rest], decoding.top_p, shares.shape[-1])
    return chosen


def _at_draws(
    shares: Float[Tensor, "row vocabulary"], draws: Float[Tensor, "row 1"], top_p: float, most: int
) -> tuple[Int[Tensor, " row"], Bool[Tensor, " row"]]:
    """The inverse of the sorted distribution at the draws, from the `most` likeliest tokens alone.

    Returns:
        The tokens, equals in the order of their ids; and whether all tokens together would give the same.
    """
    is_all = most >= shares.shape[-1]
    order = shares.topk(min(most, shares.shape[-1])).indices.sort().values  # of equals topk promises no order
    part, by = shares.gather(-1, order).sort(descending=True, stable=True)
    sums = part.cumsum(-1)
    # What equals the last one may have been cut off; what is above it is as if all were there.
    covered = (sums * (part > part[:, -1:])).amax(-1, keepdim=True)
    sums = part.masked_fill(sums - part >= top_p, 0).cumsum(-1)
    ends_inside = is_all | (covered >= top_p)
    at = draws * torch.where(ends_inside, sums[:, -1:], 1.0)
    place = torch.searchsorted(sums, at, right=True).clamp(max=(sums < sums[:, -1:]).sum(-1, keepdim=True))
    is_sure = ends_inside | ((at < covered) & (top_p == 1))
    return order.gather(-1, by.gather(-1, place))[:, 0], is_sure[:, 0]
