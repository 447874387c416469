"""The per-layer metrics of a step map, in one table: `LAYER_METRICS`.

1. `lock_in`, `context_reach`, `question_share` average over thinking steps from the second on.
2. `thinking_share`, `self_share`, `recency` average over summary steps.
3. `template_share` says how much mass the attention sink takes, which the shares leave out.
4. `final_block`, `analysis_block`, `block_ratio` are the authors' own numbers, on the map before its rows are
   normalised.
5. `decay_slope`, one number per map, fits `thinking_share` against the layer index over the deep half.

A new metric is one function and one entry of the table: `Diagnosis`, its tables and JSON, `compare`,
manifests and reports read it there, and a file written before the metric existed reads as NaN. Where a
definition does not apply to a trace the value is NaN, and `LayerMetric.missing` says why.

Functions of `MapShares` give one number per layer, or per layer and head. Scaling a layer's map by a constant
changes nothing but the two block intensities. Definitions: docs/method.md section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stepflow_tl.diagnosis.shares import MapShares, masked_mean
from stepflow_tl.models.bands import deep_half
from stepflow_tl.trace import Segment

Band = Literal["shallow", "deep"]

Need = Callable[[MapShares], str]
"""What a metric asks of a trace: "" where it has that, else the reason why the metric does not exist."""


@dataclass(frozen=True)
class LayerMetric:
    """One number per layer of a step map.

    Attributes:
        name: Its name everywhere: attribute, column, key.
        values: The metric, NaN where it does not exist.
        needs: What the trace must have, the most telling first.
        label: A few words for a figure's legend.
        definition: For docs/method.md, in its notation.
        band: Where the paper's two failures predict a difference, so that the band's mean is a headline
            number; None for the others.
        direction: Which way the failure moves it: 1 up, -1 down, 0 without a prediction.
    """

    name: str
    values: Callable[[MapShares], Float[Tensor, "layer ..."]]
    needs: tuple[Need, ...]
    label: str
    definition: str
    band: Band | None = None
    direction: Literal[-1, 0, 1] = 0

    def __post_init__(self) -> None:
        """Refuse a prediction without a band or a band without a prediction."""
        if (self.band is None) != (self.direction == 0):
            raise ValueError(
                f"metric {self.name!r} has band {self.band!r} and direction {self.direction}: expected both, "
                "or None and 0"
            )

    def missing(self, rows: MapShares) -> str:
        """Why the trace of `rows` cannot have the metric in any layer; "" if it can."""
        return next(filter(None, (need(rows) for need in self.needs)), "")


def lock_in(rows: MapShares) -> Float[Tensor, "layer ..."]:
    """Shallow Lock-in: how much a thinking step draws on itself.

    Mean over thinking steps i, from the second on, of `P[i, i]` plus the shares of the `window` thinking
    steps before i. The question never counts as part of the window, however near it is.
    """
    return rows.mean_on(rows.near, rows.later_thinking)


def context_reach(rows: MapShares) -> Float[Tensor, "layer ..."]:
    """What `lock_in` leaves: the share on the question and on thinking steps before the window.

    `lock_in + context_reach = 1` for every window.
    """
    return rows.mean_on(~rows.near, rows.later_thinking)


def question_share(rows: MapShares) -> Float[Tensor, "layer ..."]:
    """The part of `context_reach` that falls on the question, over the same rows."""
    question = rows.among(Segment.QUESTION)
    return rows.mean_on(question, rows.later_thinking & question.any())


def thinking_share(rows: MapShares) -> Float[Tensor, "layer ..."]:
    """Deep Decay: how much a summary step draws on the thinking, mean over summary steps."""
    thinking = rows.among(Segment.THINKING)
    return rows.mean_on(thinking, rows.among(Segment.SUMMARY) & thinking.any())


def self_share(rows: MapShares) -> Float[Tensor, "layer ..."]:
    """How much a summary step draws on the summary (itself and earlier ones), mean over summary steps."""
    summary = rows.among(Segment.SUMMARY)
    return rows.mean_on(summary, summary)


def recency(rows: MapShares) -> Float[Tensor, "layer ..."]:
    """The part of the summary's thinking mass that falls on the last `recent` thinking steps.

    A ratio of two means over summary steps, so `recency * thinking_share` is the share on those steps; a
    summary step that hardly draws on the thinking then hardly counts. NaN also with no more than `recent`
    thinking steps, where it would be 1 whatever the model does.
    """
    thinking, n_thinking = rows.among(Segment.THINKING), rows.count(Segment.THINKING)
    last = thinking & (thinking.cumsum(0) > n_thinking - rows.recent)
    on_last = rows.mean_on(last, rows.among(Segment.SUMMARY) & (n_thinking > rows.recent))
    return on_last / thinking_share(rows)


def template_share(rows: MapShares) -> Float[Tensor, "layer ..."]:
    """The attention sink: mass on TEMPLATE keys relative to all mass of the row.

    Taken from sums, whatever the pooling elsewhere: TEMPLATE tokens are not a step with a length to divide
    by. Mean over thinking and summary steps; NaN where none has mass.
    """
    template = rows.saliency.template_sums.to(torch.float64)
    total = template + rows.saliency.sums.to(torch.float64).sum(-1)
    if not rows.per_head:
        template, total = template.sum(1), total.sum(1)
    chosen = rows.among(Segment.THINKING) | rows.among(Segment.SUMMARY)
    return masked_mean(template / total.clamp(min=torch.finfo(torch.float64).tiny), (total > 0) & chosen)


def final_block(rows: MapShares) -> Float[Tensor, "layer ..."]:
    """The authors' final-block intensity: mean of the map over summary x summary, in nats per token pair.

    As in the authors' `analyze_step_saliency.py`: the mean-pooled map before rows are normalised, the whole
    square, its zeros above the diagonal counted. They return 0 without a summary; here it is NaN.
    """
    return _block_mean(rows, rows.among(Segment.SUMMARY))


def analysis_block(rows: MapShares) -> Float[Tensor, "layer ..."]:
    """The authors' analysis-block intensity: mean of the map over thinking x thinking.

    In nats per token pair. Same source and conventions as `final_block`.
    """
    return _block_mean(rows, rows.among(Segment.THINKING))


def block_ratio(rows: MapShares) -> Float[Tensor, "layer ..."]:
    """The authors' "final heat anomaly": final-block over analysis-block intensity.

    Both squares hold zeros above the diagonal, half of a large square and none of a single step, so the ratio
    depends on the numbers of steps as well as on the flow. NaN where either block is missing or the analysis
    block has no mass (the authors return 0 there).
    """
    analysis = analysis_block(rows)
    ratio = final_block(rows) / analysis
    return torch.where(analysis > 0, ratio, torch.full_like(ratio, torch.nan))


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


def _block_mean(rows: MapShares, chosen: Bool[Tensor, " step"]) -> Float[Tensor, "layer ..."]:
    return rows.mean_map[..., chosen, :][..., chosen].mean(dim=(-2, -1))


def _some(segment: Segment) -> Need:
    reason = f"the trace has no {segment.name.lower()} step"
    return lambda rows: "" if rows.count(segment) else reason


def _two_thinking_steps(rows: MapShares) -> str:
    n_thinking = rows.count(Segment.THINKING)
    return "" if n_thinking >= 2 else f"needs 2 thinking steps, the trace has {n_thinking}"


def _more_than_the_recent(rows: MapShares) -> str:
    n_thinking = rows.count(Segment.THINKING)
    if n_thinking > rows.recent:
        return ""
    return f"needs more than recent={rows.recent} thinking steps, the trace has {n_thinking}"


_QUESTION, _THINKING, _SUMMARY = map(_some, (Segment.QUESTION, Segment.THINKING, Segment.SUMMARY))

#: By name, in the order of every table and file. A metric is added here and nowhere else.
LAYER_METRICS: dict[str, LayerMetric] = {
    metric.name: metric
    for metric in (
        LayerMetric(
            "lock_in",
            lock_in,
            needs=(_two_thinking_steps,),
            label="on the step itself (lock-in)",
            definition=r"mean over $i \in \mathcal{T}'$ of $P_{ii}$, plus $P_{ij}$ of the `window` thinking "
            r"steps before $i$",
            band="shallow",
            direction=1,
        ),
        LayerMetric(
            "context_reach",
            context_reach,
            needs=(_two_thinking_steps,),
            label="on earlier steps and the question",
            definition=r"$1 -$ `lock_in`",
            band="shallow",
            direction=-1,
        ),
        LayerMetric(
            "question_share",
            question_share,
            needs=(_QUESTION, _two_thinking_steps),
            label="on the question",
            definition=r"mean over $i \in \mathcal{T}'$ of $\sum_{j \in Q} P_{ij}$",
        ),
        LayerMetric(
            "thinking_share",
            thinking_share,
            needs=(_SUMMARY, _THINKING),
            label="on the thinking",
            definition=r"mean over $i \in \mathcal{S}$ of $\sum_{j \in \mathcal{T}} P_{ij}$",
            band="deep",
            direction=-1,
        ),
        LayerMetric(
            "self_share",
            self_share,
            needs=(_SUMMARY,),
            label="on the summary itself",
            definition=r"mean over $i \in \mathcal{S}$ of $\sum_{j \in \mathcal{S}} P_{ij}$",
            band="deep",
            direction=1,
        ),
        LayerMetric(
            "recency",
            recency,
            needs=(_SUMMARY, _THINKING, _more_than_the_recent),
            label="of the thinking's share, on its last steps",
            definition=r"mean over $i \in \mathcal{S}$ of the share on the last `recent` thinking steps, "
            r"over `thinking_share`",
            band="deep",
            direction=1,
        ),
        LayerMetric(
            "template_share",
            template_share,
            needs=(),
            label="on the template (attention sink)",
            definition=r"mean over thinking and summary steps of TEMPLATE mass over all mass, from sums",
        ),
        LayerMetric(
            "final_block",
            final_block,
            needs=(_SUMMARY,),
            label="summary on summary, nats per token pair",
            definition=r"mean of $M^l$ over $\mathcal{S} \times \mathcal{S}$, zeros counted: the authors' "
            r"number",
        ),
        LayerMetric(
            "analysis_block",
            analysis_block,
            needs=(_THINKING,),
            label="thinking on thinking, nats per token pair",
            definition=r"mean of $M^l$ over $\mathcal{T} \times \mathcal{T}$, zeros counted: the authors' "
            r"number",
        ),
        LayerMetric(
            "block_ratio",
            block_ratio,
            needs=(_SUMMARY, _THINKING),
            label="summary block over thinking block",
            definition=r"`final_block` / `analysis_block`",
        ),
    )
}

#: What the paper's two failures predict, each in the band where it predicts it; None: over the deep half.
HEADLINE: tuple[tuple[str, Band | None], ...] = (
    *((metric.name, metric.band) for metric in LAYER_METRICS.values() if metric.band),
    ("decay_slope", None),
)


def headline_name(metric: str, band: Band | None) -> str:
    """Name of a headline number: "lock_in shallow", "decay_slope"."""
    return metric if band is None else f"{metric} {band}"
