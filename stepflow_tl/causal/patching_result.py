"""`StepPatching`: the effect of every layer and step, measured or predicted, and what it refers to.

Signs: the corrupted run receives activations of the clean one ("denoising"), and an effect is the metric with
the patch minus the metric without. A positive effect means that the patch raises the metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.alignment import Alignment, StepMatch
from stepflow_tl.results.provenance import Provenance


@dataclass(frozen=True)
class StepPatching:
    """Effects of exchanging one step's activations in one layer.

    Attributes:
        effects: Change of the metric; nats for NLL metrics, logits for a logit difference. Float64, CPU.
        method: "patching" (one pass an entry) or "attribution" (first order).
        component: What was exchanged, one of `hook_names.COMPONENTS`.
        alignment: How tokens met, see `causal.alignment`.
        matches: The steps of the second axis: where activations came from and where they went.
        layers: Model layers of the first axis.
        n_layers: Number of layers of the whole model.
        receiving_step: Label of the only step whose queries saw the patch; None if all did.
        corrupted_value: The metric of the corrupted run.
        clean_value: The metric of the clean run, or None where it does not carry over to that trace.
        provenance: Model, metric (as `objective`), method (as `backend`), versions.
    """

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

    def __post_init__(self) -> None:
        """Refuse effects without a layer or step, or that are no numbers."""
        expected = (len(self.layers), len(self.matches))
        if tuple(self.effects.shape) != expected:
            raise ValueError(f"effects has shape {tuple(self.effects.shape)}, expected {expected}")
        if len(set(self.layers)) != len(self.layers) or any(
            not 0 <= layer < self.n_layers for layer in self.layers
        ):
            raise ValueError(f"layers {self.layers} must be distinct and within 0..{self.n_layers - 1}")
        if not torch.isfinite(self.effects).all():
            layer, step = (~torch.isfinite(self.effects)).nonzero()[0].tolist()
            raise ValueError(
                f"the effect of layer {self.layers[layer]}, step {self.labels[step]} is not finite: run the "
                "model in float32, and check the metric and any attached hook for NaN"
            )

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

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file to `path` (atomic: a reader sees the old file or the whole new one)."""
        from stepflow_tl.causal.patching_files import save_patching

        return save_patching(self, path)

    @classmethod
    def load(cls, path: str | Path) -> StepPatching:
        """Read the file at `path`, written by `save`.

        Raises:
            ResultFileError: If the file is missing, truncated, foreign or of an unknown version.
        """
        from stepflow_tl.causal.patching_files import load_patching

        return load_patching(path)

    def show(self, **options: Any) -> Any:
        """The effects as a figure, layers over steps; options as in `rendering.patching_figure`."""
        from stepflow_tl.rendering import patching_figure

        return patching_figure(self, **options)

    def __repr__(self) -> str:
        """One line: what, how large, from which model."""
        path = f" read by {self.receiving_step}" if self.receiving_step else ""
        return (
            f"StepPatching({self.method} of {self.component}{path}: {len(self.layers)} of {self.n_layers} "
            f"layers x {len(self.matches)} steps, alignment={self.alignment!r}, "
            f"metric={self.provenance.objective!r}, model={self.provenance.model_name!r})"
        )
