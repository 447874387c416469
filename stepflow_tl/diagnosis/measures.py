"""Measures of a step map: pure functions from shares and segments to one number a layer.

Definitions: docs/method.md section 5.

1. `row_shares` turns a map into `P[l, i, j]`: the part of step i's saliency that falls on step j, TEMPLATE
   left out.
2. `lock_in`, `context_reach`, `question_share` average over thinking steps from the second on. The first is
   left out because nothing but the question precedes it.
3. `thinking_share`, `self_share`, `recency` average over summary steps.
4. `decay_slope` fits `thinking_share` against the layer index over the deep half.
5. `template_share` says how much mass the attention sink takes before step 1 drops it.
6. `final_block`, `analysis_block`, `block_ratio` are the authors' own numbers, on the map before
   normalisation.

Every step counts once, whatever its length. A row without mass has no shares: it stays zero, is left out of
every mean, and `rows_without_mass` counts it. Where a definition has no row to average, the value is NaN.

All functions of `shares` take any leading axes, so `row_shares(saliency, per_head=True)` gives each measure
per head. Scaling a layer's map by a constant changes nothing but the two block intensities. Memory: a few
copies of the map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepflow_tl.models.bands import deep_half
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.trace import ReasoningTrace, Segment


def step_segments(trace: ReasoningTrace) -> Int[Tensor, " step"]:
    """Segment of each step, in step order.

    Args:
        trace: The trace.
    """
    return torch.tensor([int(step.segment) for step in trace.steps], dtype=torch.int64)


def row_shares(
    saliency: StepSaliency, pooling: Pooling = "mean", *, per_head: bool = False
) -> Float[Tensor, "layer *head query_step key_step"]:
    """Rows of the step map, each divided by its sum over steps j <= i: `P[l, i, j]`.

    Args:
        saliency: The step map.
        pooling: Which map. `"mean"` (the paper's) compares steps by their mean intensity, so a long step
            weighs no more than a short one; `"sum"` compares them by mass.
        per_head: Normalise each head's own map instead of the mean over heads.

    Returns:
        float64 shares; each row sums to 1, or is all zero where the map has no mass.

    Raises:
        ValueError: If `pooling` is unknown.
    """
    step_map = saliency.pooled(pooling).to(torch.float64)
    step_map = (step_map if per_head else step_map.mean(dim=1)).tril()
    # Dividing by the largest entry first keeps a row of denormal numbers from losing its sum to rounding.
    largest = step_map.amax(dim=-1, keepdim=True)
    scaled = torch.where(largest > 0, step_map / largest, torch.zeros_like(step_map))
    return scaled / scaled.sum(dim=-1, keepdim=True).clamp(min=1)


def lock_in(
    shares: Float[Tensor, "*lead step step"], segments: Int[Tensor, " step"], window: int = 0
) -> Float[Tensor, "*lead"]:
    """Shallow Lock-in: how much a thinking step draws on itself.

    Mean over thinking steps i, from the second on, of `P[i, i]` plus the shares of the `window` thinking
    steps before i. The question never counts as part of the window, however near it is.
    NaN with fewer than two thinking steps.
    """
    return _row_mean((shares * _near(segments, window)).sum(-1), shares, _later_thinking(segments))


def context_reach(
    shares: Float[Tensor, "*lead step step"], segments: Int[Tensor, " step"], window: int = 0
) -> Float[Tensor, "*lead"]:
    """What `lock_in` leaves: the share on the question and on thinking steps before the window.

    `lock_in + context_reach = 1` for every window. NaN with fewer than two thinking steps.
    """
    return _row_mean((shares * ~_near(segments, window)).sum(-1), shares, _later_thinking(segments))


def question_share(
    shares: Float[Tensor, "*lead step step"], segments: Int[Tensor, " step"]
) -> Float[Tensor, "*lead"]:
    """The part of `context_reach` that falls on the question, over the same rows.

    NaN without a question or with fewer than two thinking steps.
    """
    question = segments == Segment.QUESTION
    return _row_mean((shares * question).sum(-1), shares, _later_thinking(segments) & question.any())


def thinking_share(
    shares: Float[Tensor, "*lead step step"], segments: Int[Tensor, " step"]
) -> Float[Tensor, "*lead"]:
    """Deep Decay: how much a summary step draws on the thinking, mean over summary steps.

    NaN without a summary or without thinking.
    """
    thinking = segments == Segment.THINKING
    return _row_mean((shares * thinking).sum(-1), shares, (segments == Segment.SUMMARY) & thinking.any())


def self_share(
    shares: Float[Tensor, "*lead step step"], segments: Int[Tensor, " step"]
) -> Float[Tensor, "*lead"]:
    """How much a summary step draws on the summary (itself and earlier ones), mean over summary steps.

    NaN without a summary.
    """
    summary = segments == Segment.SUMMARY
    return _row_mean((shares * summary).sum(-1), shares, summary)


def recency(
    shares: Float[Tensor, "*lead step step"], segments: Int[Tensor, " step"], recent: int = 1
) -> Float[Tensor, "*lead"]:
    """The part of the summary's thinking mass that falls on the last `recent` thinking steps.

    A ratio of two means over summary steps, so `recency * thinking_share` is the share on those steps; a
    summary step that hardly draws on the thinking then hardly counts. NaN without a summary, and with no more
    than `recent` thinking steps, where it would be 1 whatever the model does.
    """
    thinking = segments == Segment.THINKING
    n_thinking = int(thinking.sum())
    last = thinking & (thinking.cumsum(0) > n_thinking - recent)
    rows = (segments == Segment.SUMMARY) & (n_thinking > recent)
    return _row_mean((shares * last).sum(-1), shares, rows) / thinking_share(shares, segments)


def decay_slope(
    thinking_share: Float[Tensor, "layer ..."], layers: Sequence[int], n_layers: int
) -> Float[Tensor, ...]:
    """Least-squares slope of `thinking_share` over the deep half of the layers, in share per layer.

    The abscissa is the model's layer index, so a map of selected layers has the same unit as a full one.
    Below 0, the summary turns away from the thinking with depth. NaN if fewer than two stored layers of the
    deep half have a value; layers without one are left out. Multiply by `n_layers` to compare models of
    different depth.
    """
    index = torch.tensor(layers, dtype=torch.float64)
    index = index.reshape(-1, *[1] * (thinking_share.ndim - 1)).expand_as(thinking_share)
    usable = (index >= deep_half(n_layers).start) & thinking_share.isfinite()
    count = usable.sum(0)
    y = torch.where(usable, thinking_share, torch.zeros_like(thinking_share))
    x = torch.where(usable, index - (index * usable).sum(0) / count, torch.zeros_like(index))
    slope = (x * y).sum(0) / (x * x).sum(0)
    return torch.where(count >= 2, slope, torch.full_like(slope, torch.nan))


def template_share(saliency: StepSaliency, *, per_head: bool = False) -> Float[Tensor, "layer ..."]:
    """The attention sink: mass on TEMPLATE keys relative to all mass of the row.

    Taken from sums, whatever the pooling elsewhere: TEMPLATE tokens are not a step with a length to divide
    by. Mean over thinking and summary steps; NaN where none has mass.
    """
    template = saliency.template_sums.to(torch.float64)
    total = template + saliency.sums.to(torch.float64).sum(-1)
    if not per_head:
        template, total = template.sum(1), total.sum(1)
    segments = step_segments(saliency.trace)
    rows = (segments == Segment.THINKING) | (segments == Segment.SUMMARY)
    return _row_mean(template / total.clamp(min=torch.finfo(torch.float64).tiny), total[..., None], rows)


def final_block(
    step_map: Float[Tensor, "*lead step step"], segments: Int[Tensor, " step"]
) -> Float[Tensor, "*lead"]:
    """The authors' final-block intensity: mean of the map over summary x summary, in nats per token pair.

    As in the authors' `analyze_step_saliency.py`: the mean-pooled map before rows are normalised, the whole
    square, its zeros above the diagonal counted. They return 0 without a summary; here it is NaN.
    """
    return _block_mean(step_map, segments == Segment.SUMMARY)


def analysis_block(
    step_map: Float[Tensor, "*lead step step"], segments: Int[Tensor, " step"]
) -> Float[Tensor, "*lead"]:
    """The authors' analysis-block intensity: mean of the map over thinking x thinking.

    In nats per token pair. Same source and conventions as `final_block`. NaN without thinking.
    """
    return _block_mean(step_map, segments == Segment.THINKING)


def block_ratio(
    step_map: Float[Tensor, "*lead step step"], segments: Int[Tensor, " step"]
) -> Float[Tensor, "*lead"]:
    """The authors' "final heat anomaly": final-block over analysis-block intensity.

    Both squares hold zeros above the diagonal, half of a large square and none of a single step, so the ratio
    depends on the numbers of steps as well as on the flow. NaN where either block is missing or the analysis
    block has no mass (the authors return 0 there).
    """
    analysis = analysis_block(step_map, segments)
    ratio = final_block(step_map, segments) / analysis
    return torch.where(analysis > 0, ratio, torch.full_like(ratio, torch.nan))


def rows_without_mass(
    shares: Float[Tensor, "*lead step step"], segments: Int[Tensor, " step"]
) -> Int[Tensor, "*lead"]:
    """How many rows that the measures average (later thinking, summary) had no mass and were left out."""
    rows = _later_thinking(segments) | (segments == Segment.SUMMARY)
    return ((shares.sum(-1) == 0) & rows).sum(-1)


def _later_thinking(segments: Int[Tensor, " step"]) -> Bool[Tensor, " step"]:
    thinking = segments == Segment.THINKING
    return thinking & (thinking.cumsum(0) > 1)


def _near(segments: Int[Tensor, " step"], window: int) -> Bool[Tensor, "step step"]:
    """Pairs of thinking steps at most `window` thinking steps apart, key not after query."""
    thinking = segments == Segment.THINKING
    rank = thinking.cumsum(0)
    distance = rank[:, None] - rank[None, :]
    return thinking[:, None] & thinking[None, :] & (distance >= 0) & (distance <= window)


def _row_mean(
    values: Float[Tensor, "*lead step"], shares: Float[Tensor, "*lead step key"], rows: Bool[Tensor, " step"]
) -> Float[Tensor, "*lead"]:
    """Mean over the chosen rows that have mass; NaN if there is none."""
    kept = (shares.sum(-1) > 0) & rows
    return (values * kept).sum(-1) / kept.sum(-1)


def _block_mean(
    step_map: Float[Tensor, "*lead step step"], chosen: Bool[Tensor, " step"]
) -> Float[Tensor, "*lead"]:
    return step_map[..., chosen, :][..., chosen].mean(dim=(-2, -1))
