"""`StepKnockout`: what cutting each step from each earlier one does, with what is needed to read and redo it.

Stored once: the effect of every pair that was measured, summed over the predictions it was measured on, which
pairs those are, the trace and the provenance. Rows and columns are the trace's steps in order, as in
`StepSaliency`; means per token pair are derived.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepflow_tl.results.provenance import Provenance
from stepflow_tl.results.tables import number, text_table
from stepflow_tl.saliency.pooling import Pooling, normalise
from stepflow_tl.trace import ReasoningTrace

_TEXT_WIDTH = 32


@dataclass(frozen=True)
class StepKnockout:
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
        """Refuse shapes, layers or values that cannot be a knockout map."""
        n_steps = len(self.trace.steps)
        for name in ("effects", "measured"):
            shape = tuple(getattr(self, name).shape)
            if shape != (n_steps, n_steps):
                raise ValueError(f"{name} has shape {shape}, but the trace has {n_steps} steps")
        if self.measured.dtype != torch.bool or not self.effects.is_floating_point():
            raise ValueError(f"effects is {self.effects.dtype} and measured {self.measured.dtype}")
        if not torch.isfinite(self.effects).all():
            raise ValueError("effects must be finite")
        if self.measured.triu(1).any():
            raise ValueError("measured names a pair whose key step comes after its query step")
        if self.effects[~self.measured].any():
            raise ValueError("effects must be 0 where nothing was measured")
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers {self.layers} must be distinct and at least one")
        if any(not 0 <= layer < self.n_layers for layer in self.layers):
            raise ValueError(f"layers {self.layers} lie outside the model's 0..{self.n_layers - 1}")

    @property
    def step_lengths(self) -> Int[Tensor, " step"]:
        """Tokens per step."""
        return self.trace.step_lengths

    @property
    def labels(self) -> list[str]:
        """Short step names in order: Q, T1, T2, ..., S1, ..."""
        return [step.label for step in self.trace.steps]

    def pooled(self, pooling: Pooling = "sum") -> Float[Tensor, "query_step key_step"]:
        """The effects as sums, or divided by token pairs as a saliency map is.

        Args:
            pooling: `"sum"`: `effects`; `"mean"`: per pair of a query and a key token; `"causal_mean"`: per
                pair with key <= query.

        Raises:
            ValueError: If `pooling` is unknown.
        """
        return normalise(self.effects, self.step_lengths, pooling)

    def table(self, n: int = 10) -> str:
        """The `n` strongest pairs, by the size of the effect, as text."""
        queries, keys = self.measured.nonzero(as_tuple=True)
        order = self.effects[queries, keys].abs().argsort(descending=True, stable=True)[:n].tolist()
        rows = []
        for place in order:
            query, key = self.trace.steps[int(queries[place])], self.trace.steps[int(keys[place])]
            rows.append(
                [query.label, key.label, number(float(self.effects[query.index, key.index]))]
                + [_shorten(step.text) for step in (query, key)]
            )
        where = "its own predictions" if self.onto is None else self.onto
        footer = [f"{len(rows)} of {int(self.measured.sum())} pairs; positive: the cut hurts; on {where}"]
        header = ["step", "cut from", f"effect ({self.measure})", "step's text", "other's text"]
        return text_table(f"Step knockout: {self.provenance.model_name}", header, rows, footer)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file to `path`.

        It is atomic: a reader sees the old file or the whole new one.
        """
        from stepflow_tl.causal.knockout_files import save_knockout

        return save_knockout(self, path)

    @classmethod
    def load(cls, path: str | Path) -> StepKnockout:
        """Read the file at `path` that `save` wrote.

        Raises:
            ResultFileError: If the file is missing, truncated, foreign or of an unknown version.
        """
        from stepflow_tl.causal.knockout_files import load_knockout

        return load_knockout(path)

    def show(self, **options: Any) -> Any:
        """The map as an interactive circuitsvis view; options as in `rendering.show_knockout`."""
        from stepflow_tl.rendering import show_knockout

        return show_knockout(self, **options)

    def __repr__(self) -> str:
        """One line: what, how large, from which model."""
        p = self.provenance
        onto = "" if self.onto is None else f", onto={self.onto!r}"
        return (
            f"StepKnockout({int(self.measured.sum())} pairs of {len(self.trace.steps)} steps, "
            f"{len(self.layers)} of {self.n_layers} layers, measure={self.measure!r}{onto}, "
            f"method={p.backend!r}, model={p.model_name!r})"
        )


def _shorten(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _TEXT_WIDTH else words[: _TEXT_WIDTH - 1] + "…"
