"""`StepKnockout`: what cutting each step from each earlier one does, with what is needed to read and redo it.

Stored once: the effect of every pair that was measured, summed over the predictions it was measured on, which
pairs those are, the trace and the provenance. Rows and columns are the trace's steps in order, as in
`StepSaliency`; means per token pair are derived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from stepflow_tl.results.files import Schema
from stepflow_tl.results.provenance import Provenance
from stepflow_tl.results.result import TracedResult
from stepflow_tl.saliency.pooling import Pooling, normalise
from stepflow_tl.trace import ReasoningTrace


@dataclass(frozen=True)
class StepKnockout(TracedResult):
    """Effect of cutting each query step from each key step (docs/method.md section 8).

    Attributes:
        effects: Effect of a pair, summed over the predictions measured, in nats for "nll" and "kl"; positive
            where the cut hurts. 0 where nothing was measured.
        measured: Which pairs were measured.
        trace: The trace whose steps label both axes.
        layers: Model layers in which attention was cut.
        n_layers: Number of layers of the whole model.
        heads: Heads that were cut, the same in each layer; None for all.
        measure: "nll", "kl", or a callable's name.
        onto: None where the query step's own predictions were measured, else whose: "summary", a step's
            label.
        provenance: Model, measure, method ("cached" or "full"), versions.
    """

    schema: ClassVar = Schema("stepflow_tl.StepKnockout", 1, "a step-knockout result")

    effects: Float[Tensor, "query_step key_step"]
    measured: Bool[Tensor, "query_step key_step"]
    trace: ReasoningTrace
    layers: tuple[int, ...]
    n_layers: int
    heads: tuple[int, ...] | None
    measure: str
    onto: str | None
    provenance: Provenance

    def __post_init__(self) -> None:
        """Refuse what cannot be a knockout map."""
        super().__post_init__()
        if self.measured.triu(1).any():
            raise ValueError("measured names a pair whose key step comes after its query step")
        if self.effects[~self.measured].any():
            raise ValueError("effects must be 0 where nothing was measured")
        if not self.layers:
            raise ValueError("layers () must be distinct and at least one")

    def pooled(self, pooling: Pooling = "sum") -> Float[Tensor, "query_step key_step"]:
        """The effects as sums, or divided by token pairs as a saliency map is.

        Args:
            pooling: `"sum"`: `effects`; `"mean"`: per pair of a query and a key token; `"causal_mean"`: per
                pair with key <= query.

        Raises:
            ValueError: If `pooling` is unknown.
        """
        return normalise(self.effects, self.step_lengths, pooling)

    def _table(self, n: int) -> tuple[str, list[str], list[list[str]], list[str]]:
        """Measured pairs by the size of the effect."""
        rows = self._pair_rows(self.effects, self.measured, n)
        where = "its own predictions" if self.onto is None else self.onto
        footer = [f"{len(rows)} of {int(self.measured.sum())} pairs; positive: the cut hurts; on {where}"]
        header = ["step", "cut from", f"effect ({self.measure})", "step's text", "other's text"]
        return f"Step knockout: {self.provenance.model_name}", header, rows, footer

    def __repr__(self) -> str:
        """One line: what, how large, from which model."""
        p = self.provenance
        onto = "" if self.onto is None else f", onto={self.onto!r}"
        return (
            f"StepKnockout({int(self.measured.sum())} pairs of {len(self.trace.steps)} steps, "
            f"{len(self.layers)} of {self.n_layers} layers, measure={self.measure!r}{onto}, "
            f"method={p.backend!r}, model={p.model_name!r})"
        )
