"""`StepSaliency`: the step map of one trace, with what is needed to read, check and reproduce it.

Stored once: sums of token saliency per (layer, head, query step, key step), the sums on TEMPLATE keys beside
them, the trace, and the provenance. Means are derived, so no choice of normalisation is baked into a file.
Rows and columns are the trace's steps in order; row i is what step i draws on; entries with key > query are
0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.results.provenance import Provenance
from stepflow_tl.saliency.pooling import Pooling, normalise
from stepflow_tl.trace import ReasoningTrace


@dataclass(frozen=True)
class StepSaliency:
    """Step-to-step saliency of one trace (paper: Step-Saliency).

    Attributes:
        sums: Sum over token pairs of `|A * dL/dA|`, in nats. Per head: the paper's map is the mean over
            heads.
        template_sums: The same mass on TEMPLATE keys (BOS, role markers: the attention sink), per query step.
        trace: The trace whose steps label both axes.
        layers: Model layer of each entry of the first axis.
        n_layers: Number of layers of the whole model, for depth and bands.
        provenance: Model, objective, backend, versions.
    """

    sums: Float[Tensor, "layer head query_step key_step"]
    template_sums: Float[Tensor, "layer head query_step"]
    trace: ReasoningTrace
    layers: tuple[int, ...]
    n_layers: int
    provenance: Provenance

    def __post_init__(self) -> None:
        """Refuse shapes, layers or values that cannot be a step map."""
        n_layers, n_heads, n_query, n_key = self.sums.shape
        n_steps = len(self.trace.steps)
        if (n_query, n_key) != (n_steps, n_steps):
            raise ValueError(f"sums has {n_query} x {n_key} steps, but the trace has {n_steps}")
        if self.template_sums.shape != (n_layers, n_heads, n_steps):
            expected = (n_layers, n_heads, n_steps)
            raise ValueError(
                f"template_sums has shape {tuple(self.template_sums.shape)}, expected {expected}"
            )
        if len(self.layers) != n_layers or len(set(self.layers)) != n_layers:
            raise ValueError(f"layers {self.layers} must name each of the {n_layers} stored layers once")
        if any(not 0 <= layer < self.n_layers for layer in self.layers):
            raise ValueError(f"layers {self.layers} lie outside the model's 0..{self.n_layers - 1}")
        if not (torch.isfinite(self.sums).all() and torch.isfinite(self.template_sums).all()):
            raise ValueError("sums and template_sums must be finite")

    @property
    def step_lengths(self) -> Int[Tensor, " step"]:
        """Tokens per step."""
        return self.trace.step_lengths

    @property
    def labels(self) -> list[str]:
        """Short step names in order: Q, T1, T2, ..., S1, ..."""
        return [step.label for step in self.trace.steps]

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

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file to `path`; see `files`.

        It is atomic: a reader sees the old file or the whole new one.
        """
        from stepflow_tl.saliency.files import save_saliency

        return save_saliency(self, path)

    @classmethod
    def load(cls, path: str | Path) -> StepSaliency:
        """Read the file at `path` that `save` wrote.

        Raises:
            ResultFileError: If the file is missing, truncated, foreign or of an unknown version.
        """
        from stepflow_tl.saliency.files import load_saliency

        return load_saliency(path)

    def show(self, layer: int | None = None, *, step: str | int | None = None, **options: Any) -> Any:
        """An interactive circuitsvis view for a notebook, which needs no network.

        Args:
            layer: One layer's heads (or its text view); all layers by default.
            step: Show the trace's text instead, coloured by what this step ("T3", or an index) draws on, or
                with `direction="readers"` by what draws on it.
            **options: Of `rendering.show_step_maps` (`scale`, `pooling`), or with a step of
                `rendering.show_text` (`direction`, `pooling`).
        """
        from stepflow_tl.rendering import show_step_maps, show_text

        if step is None:
            return show_step_maps(self, layer=layer, **options)
        return show_text(self, step, layer=layer, **options)

    def report(self, path: str | Path, **options: Any) -> Path:
        """Write maps, text and profiles to `path` as one HTML page; see `rendering.write_report`."""
        from stepflow_tl.rendering import write_report

        return write_report(self, path, **options)

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
            f"{len(self.trace.steps)} steps, objective={p.objective!r}, backend={p.backend!r}, "
            f"model={p.model_name!r})"
        )
