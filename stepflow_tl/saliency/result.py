"""`StepSaliency`: the step map of one trace, with what is needed to read, check and reproduce it.

Stored once: sums of a score (the paper's: token saliency) per (layer, head, query step, key step), the sums
on TEMPLATE keys beside them, the trace, and the provenance. Means are derived, so no choice of normalisation
is baked into a file. Rows and columns are the trace's steps in order; row i is what step i draws on; entries
with key > query are 0.

A file of the paper's score does not name it, as before there were others, so every version reads it. A file
of another score has schema version 2: a version that would take it for the paper's refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.errors import ModelError, ScoreError
from stepflow_tl.results.files import Schema
from stepflow_tl.results.provenance import Provenance
from stepflow_tl.results.result import TracedResult
from stepflow_tl.saliency.pooling import Pooling, normalise
from stepflow_tl.saliency.scores import TITLES, Score, check_score
from stepflow_tl.trace import ReasoningTrace


@dataclass(frozen=True)
class StepSaliency(TracedResult):
    """Step-to-step saliency of one trace (paper: Step-Saliency).

    Attributes:
        sums: Sum of the score over the tokens of two steps, in nats. Per head: the paper's map is the mean
            over heads.
        template_sums: The same on TEMPLATE keys (BOS, role markers: the attention sink), per query step.
        trace: The trace whose steps label both axes.
        layers: Model layer of each entry of the first axis.
        n_layers: Number of layers of the whole model, for depth and bands.
        provenance: Model, objective, backend, versions.
        score: What was made of pattern and gradient: "saliency", `|A * dL/dA|`; "signed", `A * dL/dA`; "cut",
            the first-order effect of removing the key step from each row's softmax, positive where that
            hurts.
    """

    schema: ClassVar[Schema] = Schema("stepflow_tl.StepSaliency", 2, "a step-saliency result")

    sums: Float[Tensor, "layer head query_step key_step"]
    template_sums: Float[Tensor, "layer head query_step"]
    trace: ReasoningTrace
    layers: tuple[int, ...]
    n_layers: int
    provenance: Provenance
    score: Score = "saliency"

    def __post_init__(self) -> None:
        """Refuse a score that is none, and what every result refuses."""
        check_score(self.score)
        super().__post_init__()

    @property
    def signed(self) -> bool:
        """Whether entries may be negative, so that shares of a row mean nothing."""
        return self.score != "saliency"

    @property
    def title(self) -> str:
        """What the map is, in words: "Step-Saliency", "Cut score", "Signed saliency"."""
        return TITLES[self.score]

    def require_unsigned(self, what: str) -> None:
        """Refuse a signed map where only one without negative entries makes sense.

        Args:
            what: What needs it, for the message.

        Raises:
            ScoreError: If the score is signed; the message says what to do.
        """
        if self.signed:
            raise ScoreError(
                f"{what} needs a map without negative entries, and this one has score={self.score!r}: take "
                "it from step_saliency(..., score='saliency')"
            )

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.sums.shape[1]

    def select(self, layers: Iterable[int]) -> StepSaliency:
        """Keep some model `layers`, in the order given.

        Raises:
            ModelError: If a layer is not among the stored ones.
        """
        wanted = tuple(layers)
        index = self._layer_index(wanted)
        return replace(self, sums=self.sums[index], template_sums=self.template_sums[index], layers=wanted)

    def pooled(
        self, pooling: Pooling = "mean", *, layers: Iterable[int] | None = None
    ) -> Float[Tensor, "layer head query_step key_step"]:
        """Step maps per head.

        Args:
            pooling: `"mean"` over all token pairs (the paper's), `"causal_mean"` over pairs with key <=
                query, or `"sum"`.
            layers: Model layers to return; all stored ones by default.

        Raises:
            ValueError: If `pooling` is unknown.
            ModelError: If a layer is not among the stored ones.
        """
        sums = self.sums if layers is None else self.sums[self._layer_index(tuple(layers))]
        return normalise(sums, self.step_lengths, pooling)

    def head_mean(
        self, pooling: Pooling = "mean", *, layers: Iterable[int] | None = None
    ) -> Float[Tensor, "layer query_step key_step"]:
        """Mean over heads of `pooled`: the paper's map. Arguments as in `pooled`."""
        return self.pooled(pooling, layers=layers).mean(dim=1)

    def _table(self, n: int) -> tuple[str, list[str], list[list[str]], list[str]]:
        """Pairs of two different steps: by the paper's map, mean over stored layers; or by signed totals."""
        if self.signed:  # effects of single rows and layers add up, as knockout's would to first order
            values, quantity, how = self.sums.double().sum((0, 1)), "nats", "nats, sum over heads and"
        else:
            values, quantity = self.head_mean().double().mean(0), "mean saliency"
            how = "nats per token pair, mean of heads and"
        earlier = torch.ones_like(values, dtype=torch.bool).tril(-1)
        rows = self._pair_rows(values, earlier, n)
        covered = f"{len(self.layers)} of {self.n_layers} layers"
        footer = [f"{len(rows)} of {int(earlier.sum())} pairs; {how} {covered}"]
        header = ["step", "draws on", quantity, "step's text", "other's text"]
        return f"{self.title}: {self.provenance.model_name}", header, rows, footer

    def _document(self) -> dict[str, Any]:
        document = super()._document()
        if not self.signed:
            del document["score"]
            document["version"] = 1
        return document

    def _layer_index(self, layers: tuple[int, ...]) -> list[int]:
        position = {layer: i for i, layer in enumerate(self.layers)}
        missing = [layer for layer in layers if layer not in position]
        if missing:
            raise ModelError(
                f"layers {missing} are not in this map: it holds {list(self.layers)}. Run step_saliency with "
                "those layers, or with layers=None for all."
            )
        return [position[layer] for layer in layers]

    def __repr__(self) -> str:
        """One line: what, how large, from which model."""
        p = self.provenance
        return (
            f"StepSaliency({len(self.layers)} of {self.n_layers} layers x {self.n_heads} heads x "
            f"{len(self.trace.steps)} steps, objective={p.objective!r}, score={self.score!r}, "
            f"backend={p.backend!r}, "
            f"model={p.model_name!r})"
        )
