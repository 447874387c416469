"""What an intervention did, per layer: counted while it runs, read afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stepflow_tl.models.passes import NamedHook
from stepflow_tl.results.tables import text_table

_COLUMNS = ("layer", "rows", "adjusted", "capped", "mean_shift", "injections", "mean_norm")


@dataclass
class LayerReport:
    """Counts of one layer, over all passes of a run.

    A row is one query in one head of one sequence.

    Attributes:
        layer: Layer index.
        rows: Rows that had both an own group and a bridge.
        adjusted: Rows whose bridge mass was raised.
        capped: Rows, adjusted or not, whose tau was infeasible or nearly so, and was capped.
        total_shift: Sum over adjusted rows of `tau - p(B)`.
        injections: New steps that got a momentum vector, counted per sequence.
        total_norm: Sum over injections of the norm of what was added to z (all heads together).
    """

    layer: int
    rows: int = 0
    adjusted: int = 0
    capped: int = 0
    total_shift: float = 0.0
    injections: int = 0
    total_norm: float = 0.0

    def add_bridge(
        self,
        active: Bool[Tensor, "row head query 1"],
        capped: Bool[Tensor, "row head query 1"],
        gain: Float[Tensor, "row head query 1"],
        n_rows: int,
    ) -> None:
        """Count `n_rows` rows: which were raised (`active`), by how much (`gain`), which were `capped`."""
        parts = (active.sum(), capped.sum(), gain.sum())
        n_active, n_capped, total = torch.stack([part.detach().double() for part in parts]).tolist()
        self.rows += n_rows
        self.adjusted += int(n_active)
        self.capped += int(n_capped)
        self.total_shift += total

    def add_injections(self, added: Float[Tensor, "injection head d_head"]) -> None:
        """Count what was `added` to z at new steps."""
        self.injections += added.shape[0]
        self.total_norm += float(added.detach().flatten(1).double().norm(dim=-1).sum())

    @property
    def mean_shift(self) -> float:
        """Mean of `tau - p(B)` over adjusted rows; 0 where there are none."""
        return self.total_shift / self.adjusted if self.adjusted else 0.0

    @property
    def mean_norm(self) -> float:
        """Mean norm of an injection; 0 where there are none."""
        return self.total_norm / self.injections if self.injections else 0.0


@dataclass
class FlowReport:
    """What StepFlow did in each layer it acts on.

    Attributes:
        shallow: Layers of the bridge.
        deep: Layers of the momentum.
        layers: Counts by layer.
    """

    shallow: tuple[int, ...] = ()
    deep: tuple[int, ...] = ()
    layers: dict[int, LayerReport] = field(default_factory=dict)

    def of(self, layer: int) -> LayerReport:
        """The counts of one `layer`; zeros if nothing happened there."""
        return self.layers.setdefault(layer, LayerReport(layer))

    @property
    def injections(self) -> int:
        """Injections over all layers."""
        return sum(layer.injections for layer in self.layers.values())

    @property
    def adjusted(self) -> int:
        """Adjusted rows over all layers."""
        return sum(layer.adjusted for layer in self.layers.values())

    def to_json(self) -> list[dict[str, Any]]:
        """One flat record per layer, in layer order."""
        layers = map(self.of, sorted({*self.shallow, *self.deep, *self.layers}))
        return [{name: getattr(layer, name) for name in _COLUMNS} for layer in layers]

    def __str__(self) -> str:
        """A table, one row per layer."""
        header = [name.replace("_", " ") for name in _COLUMNS]
        rows = [
            [f"{value:.4f}" if isinstance(value, float) else str(value) for value in record.values()]
            for record in self.to_json()
        ]
        return text_table("What StepFlow did", header, rows)


class FlowHooks(list[NamedHook]):
    """TransformerLens `fwd_hooks` pairs, with a count of what they did."""

    def __init__(self, pairs: Sequence[NamedHook], report: FlowReport) -> None:
        """The `pairs`, and the `report` they write to."""
        super().__init__(pairs)
        self._report = report

    def report(self) -> FlowReport:
        """What the hooks have done so far."""
        return self._report
