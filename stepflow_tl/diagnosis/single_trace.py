"""`diagnose`: from one step map to its `Diagnosis`.

1. Compute the measures of `measures` on the map's mean over heads, in float64.
2. Where a definition does not apply to this trace (no summary, one thinking step ...) the value is NaN and
   the reason is kept. That is a fact about the trace, not an error.
3. Refuse only what leaves nothing to state: no thinking and no summary, or a map without any mass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from stepflow_tl.diagnosis import measures
from stepflow_tl.diagnosis.diagnosis import Diagnosis
from stepflow_tl.errors import GradientError, TraceError
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.trace import Segment


def diagnose(
    saliency: StepSaliency, *, window: int = 0, recent: int = 1, pooling: Pooling = "mean"
) -> Diagnosis:
    """Shallow Lock-in, Deep Decay and the authors' block metrics of one step map (docs/method.md section 5).

    Args:
        saliency: The step map; its mean over heads is read.
        window: Thinking steps before the current one that count as lock-in.
        recent: Last thinking steps whose part of the thinking mass is `recency`. Must stay below the number
            of thinking steps for recency to exist; for long traces try 3 or more.
        pooling: Map behind the shares. The block metrics always use "mean", template_share always sums.

    Raises:
        TraceError: If the trace has neither thinking nor summary steps, so that nothing applies.
        GradientError: If the map holds no mass at all.
        ValueError: If `window` is negative, `recent` below 1 or `pooling` unknown.
    """
    if window < 0 or recent < 1:
        raise ValueError(f"window is {window} and recent is {recent}: expected window >= 0 and recent >= 1")
    segments = measures.step_segments(saliency.trace)
    counts = {segment: int((segments == segment).sum()) for segment in Segment}
    if not counts[Segment.THINKING] + counts[Segment.SUMMARY]:
        raise TraceError(
            f"the trace has {counts[Segment.QUESTION]} question steps and no thinking or summary step: "
            "nothing to diagnose. Build the trace with thinking, or check its format (ReasoningTrace.format)."
        )
    if not saliency.sums.any():
        raise GradientError("the step map is zero everywhere: no share can be stated. Check the objective.")
    shares = measures.row_shares(saliency, pooling)
    mean_map = saliency.head_mean("mean").to(torch.float64)
    thinking_share = measures.thinking_share(shares, segments)
    values = {
        "lock_in": measures.lock_in(shares, segments, window),
        "context_reach": measures.context_reach(shares, segments, window),
        "question_share": measures.question_share(shares, segments),
        "thinking_share": thinking_share,
        "self_share": measures.self_share(shares, segments),
        "recency": measures.recency(shares, segments, recent),
        "template_share": measures.template_share(saliency),
        "final_block": measures.final_block(mean_map, segments),
        "analysis_block": measures.analysis_block(mean_map, segments),
        "block_ratio": measures.block_ratio(mean_map, segments),
    }
    decay_slope = float(measures.decay_slope(thinking_share, saliency.layers, saliency.n_layers))
    return Diagnosis(
        layers=saliency.layers,
        n_layers=saliency.n_layers,
        **values,
        rows_without_mass=measures.rows_without_mass(shares, segments),
        decay_slope=decay_slope,
        window=window,
        recent=recent,
        pooling=pooling,
        model_name=saliency.provenance.model_name,
        objective=saliency.provenance.objective,
        n_question=counts[Segment.QUESTION],
        n_thinking=counts[Segment.THINKING],
        n_summary=counts[Segment.SUMMARY],
        reasons=_reasons(values, decay_slope, saliency.layers, counts, recent),
    )


def _reasons(
    values: Mapping[str, Tensor],
    decay_slope: float,
    layers: tuple[int, ...],
    counts: Mapping[Segment, int],
    recent: int,
) -> dict[str, str]:
    """Why each metric that has a NaN has one: the trace's make-up first, then layers without mass."""
    thinking, summary = counts[Segment.THINKING], counts[Segment.SUMMARY]
    few_thinking = f"needs 2 thinking steps, the trace has {thinking}" if thinking < 2 else ""
    no_thinking = "" if thinking else "the trace has no thinking step"
    no_summary = "" if summary else "the trace has no summary step"
    no_question = "" if counts[Segment.QUESTION] else "the trace has no question step"
    few_recent = (
        ""
        if thinking > recent
        else f"needs more than recent={recent} thinking steps, the trace has {thinking}"
    )
    structural = {
        "lock_in": few_thinking,
        "context_reach": few_thinking,
        "question_share": no_question or few_thinking,
        "thinking_share": no_summary or no_thinking,
        "self_share": no_summary,
        "recency": no_summary or no_thinking or few_recent,
        "final_block": no_summary,
        "analysis_block": no_thinking,
        "block_ratio": no_summary or no_thinking,
    }
    reasons = {}
    for name, column in values.items():
        empty = [layer for layer, value in zip(layers, column.tolist(), strict=True) if math.isnan(value)]
        if empty:
            reasons[name] = structural.get(name) or f"no mass to take a share of in layers {empty}"
    if math.isnan(decay_slope):
        why = structural["thinking_share"] or "needs 2 stored layers of the deep half with a thinking_share"
        reasons["decay_slope"] = why
    return reasons
