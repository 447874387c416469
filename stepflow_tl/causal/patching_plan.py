"""A checked request of patching, and the passes that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.alignment import Alignment, StepMatch
from stepflow_tl.causal.patching_result import StepPatching
from stepflow_tl.errors import ModelError
from stepflow_tl.models.facts import ModelFacts
from stepflow_tl.models.hook_names import component_hook
from stepflow_tl.models.passes import NamedHook, attached, model_device
from stepflow_tl.saliency.objectives import Objective
from stepflow_tl.stepflow.flow import StepFlow
from stepflow_tl.stepflow.standing import FwdHooks, standing_hooks, standing_notes
from stepflow_tl.trace import ReasoningTrace, Step

Method = Literal["patching", "attribution"]


@dataclass(frozen=True)
class PatchingPlan:
    """A checked request: the arguments of `step_patching` with steps, layers and metrics resolved."""

    model: Any
    facts: ModelFacts
    clean_trace: ReasoningTrace
    corrupted_trace: ReasoningTrace
    matches: tuple[StepMatch, ...]
    layers: tuple[int, ...]
    component: str
    alignment: Alignment
    receiving: Step | None
    metric: Objective
    clean_metric: Objective | None
    placebo_seed: int | None
    batch_tokens: int
    stepflow: StepFlow | None
    fwd_hooks: FwdHooks = field(repr=False)

    def hook(self, layer: int) -> str:
        """Name of the hook point patched in a layer."""
        return component_hook(self.model, self.component, layer)

    def logits(
        self, trace: ReasoningTrace, last: Sequence[NamedHook] = (), n_rows: int = 1
    ) -> Float[Tensor, "row token vocabulary"]:
        """One pass over equal rows of a trace, under the hooks of the request and `last`."""
        standing = standing_hooks(self.model, trace, stepflow=self.stepflow, fwd_hooks=self.fwd_hooks)
        with attached(self.model, last=[*standing, *last]):
            return self.model(self.batch(trace, n_rows), return_type="logits")

    def batch(self, trace: ReasoningTrace, n_rows: int = 1) -> Tensor:
        """The trace's tokens in equal rows, where the model takes them."""
        return trace.tokens.to(model_device(self.model)).expand(n_rows, -1)

    def reaches(self, match: StepMatch) -> bool:
        """Whether the receiving step sees the patched one: not if it comes before it."""
        return self.receiving is None or self.receiving.index >= match.corrupted.index

    def measure(self, logits: Float[Tensor, "1 token vocabulary"]) -> float:
        """The metric of a pass over the corrupted trace."""
        return float(self.metric.measure(logits, self.batch(self.corrupted_trace)))

    def result(
        self,
        method: Method | str,
        effects: Float[Tensor, "layer step"],
        corrupted_value: float,
        clean_value: float | None,
        tokens_run: int | None = None,
    ) -> StepPatching:
        """The labelled result."""
        notes = standing_notes(self.stepflow, self.fwd_hooks)
        if self.placebo_seed is not None:
            notes["placebo"] = f"norm-matched, seed {self.placebo_seed}"
        return StepPatching(
            effects=effects,
            method=method,  # pyright: ignore[reportArgumentType]  # checked in `step_patching`
            component=self.component,
            alignment=self.alignment,
            matches=self.matches,
            layers=self.layers,
            n_layers=self.facts.n_layers,
            receiving_step=None if self.receiving is None else self.receiving.label,
            corrupted_value=corrupted_value,
            clean_value=clean_value,
            provenance=self.facts.provenance(self.metric.name, method, notes),
            unreached=tuple(match.corrupted.label for match in self.matches if not self.reaches(match)),
            tokens_run=tokens_run,
        )


def record_clean(plan: PatchingPlan) -> tuple[dict[int, Float[Tensor, " pos *feature"]], float | None]:
    """The component in each chosen layer of the clean run, and the clean run's metric."""
    kept: dict[int, list[Tensor]] = {layer: [] for layer in plan.layers}

    def keep(activation: Tensor, hook: Any, *, layer: int) -> None:
        kept[layer].append(activation[0].detach().clone())

    last = [(plan.hook(layer), partial(keep, layer=layer)) for layer in plan.layers]
    logits = plan.logits(plan.clean_trace, last)
    for layer in plan.layers:
        check_fired(plan.hook(layer), len(kept[layer]))
    own = plan.clean_metric
    value = None if own is None else float(own.measure(logits, plan.batch(plan.clean_trace)))
    return {layer: tensors[0] for layer, tensors in kept.items()}, value


def check_fired(name: str, n_calls: int) -> None:
    """Refuse a hook point that did not fire exactly once in a pass."""
    if n_calls != 1:
        raise ModelError(
            f"`{name}` fired {n_calls} times in one forward pass, expected once: this model does not compute "
            "that activation there. Choose another component"
        )
