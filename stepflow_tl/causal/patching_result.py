"""`StepPatching`: the effect of every layer and step, measured or predicted, and what it refers to.

Signs: the corrupted run receives activations of the clean one ("denoising"), and an effect is the metric with
the patch minus the metric without. A positive effect means that the patch raises the metric.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.alignment import Alignment, StepMatch
from stepflow_tl.results.files import Schema, TensorSpec, whole_numbers
from stepflow_tl.results.provenance import Provenance
from stepflow_tl.results.result import StoredResult
from stepflow_tl.results.tables import number, shortened
from stepflow_tl.trace.steps import Segment, Step

_STEP_NUMBERS = ("index", "token_start", "token_end", "char_start", "char_end")
# Facts that are stored as they are, and their types.
_PLAIN = {
    "method": str,
    "component": str,
    "alignment": str,
    "receiving_step": (str, type(None)),
    "corrupted_value": (int, float),
    "clean_value": (int, float, type(None)),
}


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
    """

    schema: ClassVar = Schema("stepflow_tl.StepPatching", 1, "a step-patching result", "StepPatching.save")

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
        """Refuse effects without a layer or step, or that are not finite."""
        expected = (len(self.layers), len(self.matches))
        if tuple(self.effects.shape) != expected:
            raise ValueError(f"effects has shape {tuple(self.effects.shape)}, expected {expected}")
        self._check_layers()
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

    def _facts(self) -> dict[str, Any]:
        matches = [[_plain(match.clean), _plain(match.corrupted)] for match in self.matches]
        return {**{name: getattr(self, name) for name in _PLAIN}, "matches": matches}

    @classmethod
    def _specs(cls, document: dict[str, Any]) -> dict[str, TensorSpec]:
        return {"effects": TensorSpec("float", (len(document["layers"]), len(document["matches"])))}

    @classmethod
    def _fields(cls, document: dict[str, Any]) -> dict[str, Any]:
        plain = {name: _value(document, name) for name in _PLAIN}
        if plain["method"] not in ("patching", "attribution") or plain["alignment"] not in get_args(
            Alignment
        ):
            raise ValueError(f"method {plain['method']!r} and alignment {plain['alignment']!r}: unknown")
        matches = (StepMatch(_step(clean), _step(corrupted)) for clean, corrupted in document["matches"])
        return {**plain, "matches": tuple(matches)}

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


def _plain(step: Step) -> dict[str, Any]:
    return {**asdict(step), "segment": int(step.segment)}


def _step(data: dict[str, Any]) -> Step:
    """The step; what a later minor version says beside it is passed over."""
    numbers = dict(zip(_STEP_NUMBERS, whole_numbers([data[name] for name in _STEP_NUMBERS]), strict=True))
    if not isinstance(data["label"], str) or not isinstance(data["text"], str):
        raise TypeError("a step's label and text must be strings")
    return Step(segment=Segment(data["segment"]), label=data["label"], text=data["text"], **numbers)


def _value(document: dict[str, Any], name: str) -> Any:
    value = document[name]
    if not isinstance(value, _PLAIN[name]) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}")
    return value
