"""Results with known numbers, built by hand: rendering needs no model."""

from collections.abc import Sequence

import torch

from stepflow_tl.causal import StepKnockout, StepPatching
from stepflow_tl.causal.alignment import StepMatch
from stepflow_tl.results.provenance import Provenance
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.trace import ReasoningTrace, Segment, Step


def labels_of(n_thinking: int, n_summary: int) -> list[str]:
    return ["Q", *(f"T{i + 1}" for i in range(n_thinking)), *(f"S{i + 1}" for i in range(n_summary))]


def make_trace(n_thinking: int, n_summary: int, text: str | Sequence[str] = "abcd "):
    """One template token, then steps of one token per character; `text` is every step's, or one per step."""
    segments = [Segment.QUESTION] + [Segment.THINKING] * n_thinking + [Segment.SUMMARY] * n_summary
    texts = [text] * len(segments) if isinstance(text, str) else list(text)
    ends = [1 + sum(len(text) for text in texts[: i + 1]) for i in range(len(texts))]
    steps = tuple(
        Step(
            index=i,
            segment=segment,
            label=label,
            token_start=end - len(text),
            token_end=end,
            char_start=end - len(text),
            char_end=end,
            text=text,
        )
        for i, (segment, label, text, end) in enumerate(
            zip(segments, labels_of(n_thinking, n_summary), texts, ends, strict=True)
        )
    )
    n_tokens = ends[-1]
    starts = torch.arange(n_tokens)
    return ReasoningTrace(
        tokens=torch.arange(n_tokens),
        text="^" + "".join(texts),
        token_char_spans=torch.stack([starts, starts + 1], dim=1),
        segment_ids=torch.tensor([0] + [int(step.segment) for step in steps for _ in step.text]),
        step_ids=torch.tensor([-1] + [step.index for step in steps for _ in step.text]),
        steps=steps,
        format="plain",
    )


def make_saliency(
    n_thinking: int,
    n_summary: int,
    *,
    n_layers: int = 8,
    n_heads: int = 2,
    text: str | Sequence[str] = "abcd ",
    model_name: str = "tiny",
    sums=None,
):
    """Causal sums over about five decades; no two entries of the lower triangle are equal."""
    n = 1 + n_thinking + n_summary
    if sums is None:
        generator = torch.Generator().manual_seed(n)
        decades = torch.rand(n_layers, n_heads, n, n, generator=generator, dtype=torch.float64)
        sums = torch.tril(10 ** (-5 * decades))
    n_layers = len(sums)
    return StepSaliency(
        sums=sums,
        template_sums=sums.sum(dim=-1),
        trace=make_trace(n_thinking, n_summary, text),
        layers=tuple(range(n_layers)),
        n_layers=n_layers,
        provenance=Provenance(model_name, "per_token", "hooks", "torch.float64", "cpu"),
    )


def make_knockout(saliency, effects=None, measured=None):
    """Effects of every pair by default, of both signs and alike in size to the saliency."""
    n = len(saliency.labels)
    measured = torch.ones(n, n, dtype=torch.bool).tril(-1) if measured is None else measured
    if effects is None:
        noise = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        effects = saliency.sums.mean((0, 1)) * noise.exp() * torch.where(noise > 1, -1, 1)
    return StepKnockout(
        effects=torch.where(measured, effects, 0),
        measured=measured,
        trace=saliency.trace,
        layers=saliency.layers,
        n_layers=saliency.n_layers,
        heads=None,
        measure="nll",
        onto=None,
        provenance=saliency.provenance,
    )


def make_patching(saliency, steps: Sequence[str] | None = None):
    """Effects of both signs on these steps (all by default), layers from the last to the first."""
    chosen = [step for step in saliency.trace.steps if steps is None or step.label in steps]
    generator = torch.Generator().manual_seed(len(chosen))
    return StepPatching(
        effects=torch.randn(len(saliency.layers), len(chosen), generator=generator, dtype=torch.float64),
        method="patching",
        component="resid_pre",
        alignment="tokens",
        matches=tuple(StepMatch(step, step) for step in chosen),
        layers=saliency.layers[::-1],
        n_layers=saliency.n_layers,
        receiving_step=None,
        corrupted_value=1.25,
        clean_value=None,
        provenance=saliency.provenance,
    )
