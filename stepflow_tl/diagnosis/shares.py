"""Rows of a step map as shares: `P[l, i, j]`, the part of step i's saliency on step j, TEMPLATE left out.

Every step counts once, whatever its length. A row without mass has no shares: it stays zero, is left out of
every mean, and `MapShares.rows_without_mass` counts it. A mean without any row is NaN. Definitions:
docs/method.md section 5. Memory: a few copies of the map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepflow_tl.saliency.pooling import Pooling, row_parts
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.trace import Segment


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
        ScoreError: If the map's score is signed, so that parts of a row are no shares.
    """
    saliency.require_unsigned("a share of a row")
    step_map = saliency.pooled(pooling).to(torch.float64)
    return row_parts((step_map if per_head else step_map.mean(dim=1)).tril())


@dataclass(frozen=True)
class MapShares:
    """One step map as the layer metrics read it.

    Attributes:
        saliency: The step map.
        shares: Its `row_shares`, of the mean over heads or per head.
        segments: Segment of each step.
        window: Thinking steps before a step that count as lock-in.
        recent: Last thinking steps that count as recent.
    """

    saliency: StepSaliency
    shares: Float[Tensor, "layer *head step step"]
    segments: Int[Tensor, " step"]
    window: int = 0
    recent: int = 1

    @classmethod
    def of(
        cls,
        saliency: StepSaliency,
        pooling: Pooling = "mean",
        *,
        per_head: bool = False,
        window: int = 0,
        recent: int = 1,
    ) -> MapShares:
        """Take the shares of a map: `pooling` and `per_head` as in `row_shares`.

        Raises:
            ValueError: If `pooling` is unknown.
            ScoreError: If the map's score is signed.
        """
        shares = row_shares(saliency, pooling, per_head=per_head)
        segments = torch.tensor([int(step.segment) for step in saliency.trace.steps], dtype=torch.int64)
        return cls(saliency, shares, segments, window, recent)

    @property
    def per_head(self) -> bool:
        """Whether the shares have an axis of heads."""
        return self.shares.ndim > 3

    @property
    def mean_map(self) -> Float[Tensor, "layer *head step step"]:
        """The mean-pooled map before its rows are normalised, in float64."""
        saliency = self.saliency
        step_map = saliency.pooled("mean") if self.per_head else saliency.head_mean("mean")
        return step_map.to(torch.float64)

    @property
    def later_thinking(self) -> Bool[Tensor, " step"]:
        """Thinking steps from the second on: nothing but the question precedes the first."""
        thinking = self.among(Segment.THINKING)
        return thinking & (thinking.cumsum(0) > 1)

    @property
    def near(self) -> Bool[Tensor, "step step"]:
        """Pairs of thinking steps at most `window` thinking steps apart, key not after query."""
        thinking = self.among(Segment.THINKING)
        rank = thinking.cumsum(0)
        distance = rank[:, None] - rank[None, :]
        return thinking[:, None] & thinking[None, :] & (distance >= 0) & (distance <= self.window)

    @property
    def rows_without_mass(self) -> Int[Tensor, "layer ..."]:
        """How many rows that the metrics average (later thinking, summary) had no mass and were left out."""
        rows = self.later_thinking | self.among(Segment.SUMMARY)
        return ((self.shares.sum(-1) == 0) & rows).sum(-1)

    def among(self, segment: Segment) -> Bool[Tensor, " step"]:
        """Which steps belong to a segment."""
        return self.segments == segment

    def count(self, segment: Segment) -> int:
        """Number of steps of a segment."""
        return int(self.among(segment).sum())

    def mean_on(
        self, keys: Bool[Tensor, "*query step"], rows: Bool[Tensor, " step"]
    ) -> Float[Tensor, "layer ..."]:
        """The share on some key steps, mean over the chosen rows that have mass."""
        return masked_mean((self.shares * keys).sum(-1), (self.shares.sum(-1) > 0) & rows)


def masked_mean(
    values: Float[Tensor, "*lead step"], kept: Bool[Tensor, "*lead step"]
) -> Float[Tensor, "*lead"]:
    """Mean over the steps kept; NaN if there is none."""
    return (values * kept).sum(-1) / kept.sum(-1)
