"""Step maps and diagnoses with chosen numbers, built by hand: the diagnostics need no model."""

from collections.abc import Sequence
from typing import Any

import torch

from stepflow_tl.diagnosis import LAYER_METRICS, Diagnosis
from stepflow_tl.results.provenance import Provenance
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.trace import ReasoningTrace, Segment, Step

LETTERS = {"Q": "QUESTION", "T": "THINKING", "S": "SUMMARY"}


def make_trace(segments: str, lengths: Sequence[int] | None = None) -> Any:
    """A trace with one step a letter of `segments` ("QTTS") after one TEMPLATE token; a character a token."""
    lengths = [1] * len(segments) if lengths is None else lengths
    steps, end = [], 1
    for index, (letter, length) in enumerate(zip(segments, lengths, strict=True)):
        label = (
            letter
            if segments.count(letter) == 1 and letter == "Q"
            else f"{letter}{segments[: index + 1].count(letter)}"
        )
        start, end = end, end + length
        steps.append(Step(index, Segment[LETTERS[letter]], label, start, end, start, end, "x" * length))
    segment_ids, step_ids = torch.zeros(end, dtype=torch.int64), torch.full((end,), -1, dtype=torch.int64)
    for step in steps:
        segment_ids[step.token_start : step.token_end] = int(step.segment)
        step_ids[step.token_start : step.token_end] = step.index
    starts = torch.arange(end)
    return ReasoningTrace(
        tokens=torch.arange(end),
        text="^" + "x" * (end - 1),
        token_char_spans=torch.stack([starts, starts + 1], dim=1),
        segment_ids=segment_ids,
        step_ids=step_ids,
        steps=tuple(steps),
        format="plain",
    )


def make_saliency(
    segments: str,
    mean_map: torch.Tensor,
    *,
    lengths: Sequence[int] | None = None,
    template_sums: torch.Tensor | None = None,
    head_gains: Sequence[float] = (1.0,),
    layers: Sequence[int] | None = None,
    n_layers: int | None = None,
    model_name: str = "tiny",
    objective: str = "per_token",
) -> Any:
    """A StepSaliency whose mean-pooled map is the given `[layer, step, step]` times each head's gain."""
    trace = make_trace(segments, lengths)
    length = trace.step_lengths.to(torch.float64)
    sums = mean_map.to(torch.float64)[:, None] * torch.tensor(head_gains, dtype=torch.float64)[:, None, None]
    sums = sums * length[:, None] * length
    if template_sums is None:
        template_sums = sums.sum(-1)
    layers = tuple(range(len(mean_map))) if layers is None else tuple(layers)
    return StepSaliency(
        sums=sums,
        template_sums=template_sums,
        trace=trace,
        layers=layers,
        n_layers=len(mean_map) if n_layers is None else n_layers,
        provenance=Provenance(model_name, objective, "hooks", "torch.float64", "cpu"),
    )


def random_saliency(
    segments: str, seed: int, *, n_layers: int = 4, diagonal: float = 0.0, **options: Any
) -> Any:
    """Uniform entries below the diagonal; `diagonal` adds lock-in."""
    generator = torch.Generator().manual_seed(seed)
    n = len(segments)
    maps = torch.rand(n_layers, n, n, generator=generator, dtype=torch.float64).tril() + diagonal * torch.eye(
        n
    )
    return make_saliency(segments, maps, **options)


def make_diagnosis(metrics: dict[str, Sequence[float]], **options: Any) -> Any:
    """A Diagnosis with the given columns; the other metrics are 0.5 everywhere."""
    n_layers = len(next(iter(metrics.values())))
    columns = {
        name: torch.tensor(metrics.get(name, [0.5] * n_layers), dtype=torch.float64) for name in LAYER_METRICS
    }
    settings: dict[str, Any] = dict(
        layers=tuple(range(n_layers)),
        n_layers=n_layers,
        decay_slope=0.0,
        window=0,
        recent=1,
        pooling="mean",
        model_name="tiny",
        objective="per_token",
        n_question=1,
        n_thinking=4,
        n_summary=1,
        reasons={},
    )
    empty = torch.zeros(n_layers, dtype=torch.int64)
    return Diagnosis(**columns, rows_without_mass=empty, **{**settings, **options})
