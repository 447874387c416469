"""`StepPatching`: the effect of every layer and step, measured or predicted, and what it refers to.

Signs: the corrupted run receives activations of the clean one ("denoising"), and an effect is the metric with
the patch minus the metric without. A positive effect means that the patch raises the metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stepflow_tl.causal.alignment import Alignment, StepMatch
from stepflow_tl.results.files import Schema
from stepflow_tl.results.provenance import Provenance
from stepflow_tl.results.result import StoredResult
from stepflow_tl.results.tables import number, shortened

_SIDES = ("clean", "corrupted")  # of a `StepMatch`, which a file holds as a list of the two


@dataclass(frozen=True)
class StepPatching(StoredResult):
    """Effects of exchanging one step's activations in one layer.

    Attributes:
        effects: Change of the metric; nats for NLL metrics, logits for a logit difference. Float64, CPU.
        method: "patching" (one pass per entry) or "attribution" (first order).
        component: What was exchanged, one of `hook_names.COMPONENTS`.
        alignment: How tokens met, see `causal.alignment`.
        matches: The steps of the second axis: where activations came from and where they went.
        layers: Model layers of the first axis.
        n_layers: Number of layers of the whole model.
        receiving_step: Label of the only step whose queries saw the patch; None if all did.
        corrupted_value: The metric of the corrupted run.
        clean_value: The metric of the clean run, or None where it does not carry over to that trace.
        provenance: Model, metric (as `objective`), method (as `backend`), versions.
        unreached: Labels of patched steps that come after the receiving step: their effect is 0, without a
            pass. Empty in older files.
        tokens_run: Tokens that all forward passes of "patching" were fed, rows times length; None for
            "attribution" and in older files.
    """

    schema: ClassVar[Schema] = Schema("stepflow_tl.StepPatching", 1, "a step-patching result", minor=1)
    axes: ClassVar[Mapping[str, str]] = {"layer": "layers", "step": "matches"}

    effects: Float[Tensor, "layer step"]
    method: Literal["patching", "attribution"]
    component: str
    alignment: Alignment
    matches: tuple[StepMatch, ...]
    layers: tuple[int, ...]
    n_layers: int
    receiving_step: str | None
    corrupted_value: float
    clean_value: float | None
    provenance: Provenance
    unreached: tuple[str, ...] = ()
    tokens_run: int | None = None

    @property
    def measured(self) -> Bool[Tensor, "layer step"]:
        """Which effects come from a pass of their own: neither predicted nor 0 by construction."""
        reached = [self.method == "patching" and label not in self.unreached for label in self.labels]
        return torch.tensor(reached).expand(len(self.layers), -1)

    @property
    def labels(self) -> list[str]:
        """Labels of the patched steps, in the order of the second axis."""
        return [match.corrupted.label for match in self.matches]

    @property
    def recovered(self) -> Float[Tensor, "layer step"]:
        """Effects as a part of the distance between the two runs: 0 did nothing, 1 gives the clean metric.

        Raises:
            ValueError: If the clean run's metric is not known, or equals the corrupted run's.
        """
        if self.clean_value is None:
            raise ValueError(
                "the metric names positions of the corrupted trace, so the clean run's value is not known: "
                "pass clean_metric=... (`answer_logit_difference` returns both)"
            )
        distance = self.clean_value - self.corrupted_value
        if distance == 0:
            raise ValueError(
                f"both runs have the metric {self.clean_value}: there is no distance to recover a part of"
            )
        return self.effects / distance

    def _document(self) -> dict[str, Any]:
        document = super()._document()
        return {**document, "matches": [[match[side] for side in _SIDES] for match in document["matches"]]}

    @classmethod
    def _build(cls, document: dict[str, Any], tensors: dict[str, Tensor]) -> StepPatching:
        matches = [dict(zip(_SIDES, match, strict=True)) for match in document["matches"]]
        return super()._build({**document, "matches": matches}, tensors)

    def _table(self, n: int) -> tuple[str, list[str], list[list[str]], list[str]]:
        """Layers and steps by the size of the effect."""
        order = self.effects.abs().flatten().argsort(descending=True, stable=True)[:n].tolist()
        rows = []
        for place in order:
            row, column = divmod(place, len(self.matches))
            step, effect = self.matches[column].corrupted, number(float(self.effects[row, column]))
            rows.append([str(self.layers[row]), step.label, effect, shortened(step.text)])
        header = ["layer", "patched step", "effect on metric", "step's text"]
        footer = [
            f"{len(rows)} of {self.effects.numel()} entries; positive: the patch raises the metric; "
            f"without a patch {number(self.corrupted_value)}"
        ]
        title = f"{self.method.capitalize()} of {self.component}: {self.provenance.model_name}"
        return title, header, rows, footer

    def __repr__(self) -> str:
        """One line: what, how large, from which model."""
        path = f" read by {self.receiving_step}" if self.receiving_step else ""
        return (
            f"StepPatching({self.method} of {self.component}{path}: {len(self.layers)} of {self.n_layers} "
            f"layers x {len(self.matches)} steps, alignment={self.alignment!r}, "
            f"metric={self.provenance.objective!r}, model={self.provenance.model_name!r})"
        )
