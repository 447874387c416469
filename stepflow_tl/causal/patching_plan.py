"""What patching and attribution patching have in common: the checked request, and the clean run.

1. Model and traces fit, layers exist, steps match, the metric resolves: all of it before any forward pass.
2. `record_clean` runs the clean trace once and keeps the component of the chosen layers.
3. `PatchingPlan.result` labels the effects.

Hooks: those already on the model stay in force, and `fwd_hooks` come after them; the plan's own come last, so
what is recorded and what is replaced is the activation with all of them applied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.alignment import Alignment, StepMatch, checked_alignment, match_steps, step_of
from stepflow_tl.causal.patching_result import StepPatching
from stepflow_tl.errors import ModelError, ObjectiveError
from stepflow_tl.models.facts import ModelFacts, check_fit, check_layers, model_facts
from stepflow_tl.models.hook_names import component_hook
from stepflow_tl.models.passes import NamedHook, attached, model_device
from stepflow_tl.results.provenance import Provenance, package_versions
from stepflow_tl.saliency.objectives import Objective, resolve_objective
from stepflow_tl.trace import ReasoningTrace, Step

#: Hooks in force in every pass: pairs, or a function that makes them for a trace, for those that know tokens.
FwdHooks = Sequence[NamedHook] | Callable[[ReasoningTrace], Sequence[NamedHook]]

#: What attention reads in the layer in which it is patched.
READ_BY_ATTENTION = ("resid_pre", "k", "v")


@dataclass(frozen=True)
class PatchingPlan:
    """A checked request.

    Attributes:
        model: A TransformerLens model.
        facts: What was read off it.
        clean_trace: Where activations come from.
        corrupted_trace: Where they go.
        matches: The steps that meet.
        layers: Layers to patch.
        component: What is exchanged.
        alignment: How tokens meet.
        receiving: The only step whose queries see the patch, or None.
        metric: Measured on the corrupted trace.
        clean_metric: The same on the clean trace, or None.
        placebo_seed: Seed of norm-matched random directions, or None.
        fwd_hooks: Hooks in force in every pass.
    """

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
    fwd_hooks: FwdHooks = field(repr=False)

    def hook(self, layer: int) -> str:
        """Name of the hook point patched in a layer."""
        return component_hook(self.model, self.component, layer)

    def logits(
        self, trace: ReasoningTrace, last: Sequence[NamedHook] = ()
    ) -> Float[Tensor, "1 token vocabulary"]:
        """Logits of one pass over a trace, under the hooks of the request and `last`."""
        outer = self.fwd_hooks(trace) if callable(self.fwd_hooks) else self.fwd_hooks
        with attached(self.model, last=[*outer, *last]):
            return self.model(self.batch(trace), return_type="logits")

    def batch(self, trace: ReasoningTrace) -> Tensor:
        """The trace's tokens as a batch of one, where the model takes them."""
        return trace.tokens[None].to(model_device(self.model))

    def unreachable(self, match: StepMatch) -> bool:
        """Whether the receiving step comes before the patched one, so that nothing can get there."""
        return self.receiving is not None and self.receiving.index < match.corrupted.index

    def result(
        self,
        method: Literal["patching", "attribution"],
        effects: Float[Tensor, "layer step"],
        corrupted_value: float,
        clean_value: float | None,
    ) -> StepPatching:
        """The labelled result."""
        notes = {} if self.placebo_seed is None else {"placebo": f"norm-matched, seed {self.placebo_seed}"}
        return StepPatching(
            effects=effects,
            method=method,
            component=self.component,
            alignment=self.alignment,
            matches=self.matches,
            layers=self.layers,
            n_layers=self.facts.n_layers,
            receiving_step=None if self.receiving is None else self.receiving.label,
            corrupted_value=corrupted_value,
            clean_value=clean_value,
            provenance=Provenance(
                model_name=self.facts.name,
                objective=self.metric.name,
                backend=method,
                dtype=str(self.facts.dtype),
                device=str(self.facts.device),
                versions=package_versions(),
                notes=notes,
            ),
        )


def plan_patching(
    model: Any,
    clean_trace: ReasoningTrace,
    corrupted_trace: ReasoningTrace,
    *,
    metric: Any,
    component: str,
    alignment: Alignment | str,
    layers: Sequence[int] | None,
    steps: Sequence[str] | None,
    receiving_step: str | None,
    sources: Mapping[str, str] | None,
    clean_metric: Any,
    placebo_seed: int | None,
    fwd_hooks: FwdHooks,
) -> PatchingPlan:
    """Check a request; arguments and errors as in `step_patching`."""
    alignment = checked_alignment(alignment)
    facts = model_facts(model)
    for trace in (clean_trace, corrupted_trace):
        check_fit(facts, trace)
    chosen = check_layers(facts, layers)
    for layer in chosen:
        component_hook(model, component, layer)
    receiving = None if receiving_step is None else step_of(corrupted_trace, receiving_step)
    if receiving is not None and component not in READ_BY_ATTENTION:
        raise ValueError(
            f"component {component!r} is not read by the attention of its own layer, so receiving_step does "
            f"not go with it: expected one of {', '.join(READ_BY_ATTENTION)}"
        )
    resolved = resolve_objective(metric, corrupted_trace)
    if resolved.per_token:
        raise ObjectiveError(
            "metric='per_token' is a loss for each row, not one number: use 'response', 'summary', a step's "
            "label, a LogitDifference or a callable (logits, tokens) -> scalar"
        )
    return PatchingPlan(
        model=model,
        facts=facts,
        clean_trace=clean_trace,
        corrupted_trace=corrupted_trace,
        matches=match_steps(clean_trace, corrupted_trace, alignment=alignment, steps=steps, sources=sources),
        layers=chosen,
        component=component,
        alignment=alignment,
        receiving=receiving,
        metric=resolved,
        clean_metric=_on_clean_trace(metric, clean_metric, clean_trace, corrupted_trace),
        placebo_seed=placebo_seed,
        fwd_hooks=fwd_hooks,
    )


def record_clean(plan: PatchingPlan) -> tuple[dict[int, Float[Tensor, " pos *feature"]], float | None]:
    """The component in each chosen layer of the clean run, and the clean run's metric.

    Raises:
        ModelError: If a hook point does not fire exactly once.
        ObjectiveError: If a callable metric does not return one number.
    """
    kept: dict[int, list[Tensor]] = {layer: [] for layer in plan.layers}
    last = [(plan.hook(layer), partial(_keep, into=kept[layer])) for layer in plan.layers]
    logits = plan.logits(plan.clean_trace, last)
    for layer in plan.layers:
        check_fired(plan.hook(layer), len(kept[layer]))
    value = None
    if plan.clean_metric is not None:
        value = float(plan.clean_metric.measure(logits, plan.batch(plan.clean_trace)))
    return {layer: tensors[0] for layer, tensors in kept.items()}, value


def check_fired(name: str, n_calls: int) -> None:
    """Refuse a hook point that did not fire exactly once in a pass.

    Raises:
        ModelError: With its name.
    """
    if n_calls != 1:
        raise ModelError(
            f"`{name}` fired {n_calls} times in one forward pass, expected once: this model does not compute "
            "that activation there. Choose another component"
        )


def _keep(activation: Tensor, hook: Any, *, into: list[Tensor]) -> None:
    into.append(activation[0].detach().clone())


def _on_clean_trace(
    metric: Any, clean_metric: Any, clean_trace: ReasoningTrace, corrupted_trace: ReasoningTrace
) -> Objective | None:
    """The metric on the clean trace: as given, by its name, or the same one where all spans coincide."""
    if clean_metric is not None:
        return resolve_objective(clean_metric, clean_trace)
    if isinstance(metric, Step):
        metric = metric.label
    if not isinstance(metric, str):
        spans = [[(s.label, s.token_span) for s in trace.steps] for trace in (clean_trace, corrupted_trace)]
        if len(clean_trace) != len(corrupted_trace) or spans[0] != spans[1]:
            return None
    with suppress(ObjectiveError):  # a segment that only the corrupted trace has
        return resolve_objective(metric, clean_trace)
    return None
