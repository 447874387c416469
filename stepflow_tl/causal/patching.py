"""`step_patching`: activation patching between two traces of one problem, a step at a time.

1. Check the request before any forward pass (`plan_patching`): model and traces fit, layers exist, steps
   match, the metric resolves.
2. Run the clean trace once and keep the component (residual, attention output, keys, values or z) of every
   chosen layer (`record_clean`); run the corrupted trace once for the metric without a patch.
3. For each layer and step: run the corrupted trace with that step's activations replaced in that layer, token
   by token or in their mean (`alignment`), and measure again.
4. `effects[layer, step]` is the metric with the patch minus the metric without.

`receiving_step=i` restricts the path: what was patched in layer l is seen only by step i's queries in that
layer. Keys and values cannot be patched for some queries alone, so the edit is made one step further on: a
first pass with the patch gives z of layer l at step i's positions, and a second pass, of the corrupted trace
without the patch, has these rows of z written over its own. Then everything else, step j's own residual
included, is what it was, and what reached the metric came through the edge (i <- j) of layer l. With "v" this
is exactly `z[t] += sum over k in j of A[t,k] (v_clean[k] - v[k])` for t in step i; with "k" the attention
weights move; with "resid_pre" both, and for j = i the step's queries too. A step that comes after i cannot
reach it: its effect is 0, without a pass.

Hooks already on the model stay in force, `fwd_hooks` and those of `stepflow` come after them, our own last:
what is recorded and what is replaced is the activation with all of them applied.

Cost: `2 + L S` forward passes for L layers and S steps, `2 + 2 L S` at most with `receiving_step`. Memory:
the component of one run, `O(L T d_model)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.alignment import (
    Alignment,
    StepMatch,
    checked_alignment,
    match_steps,
    metric_on_clean_trace,
    step_patch_setter,
)
from stepflow_tl.causal.patching_result import StepPatching
from stepflow_tl.errors import ModelError, ObjectiveError
from stepflow_tl.models.facts import ModelFacts, check_fit, check_layers, model_facts
from stepflow_tl.models.hook_names import component_hook
from stepflow_tl.models.passes import NamedHook, attached, frozen, model_device
from stepflow_tl.results.provenance import Provenance, package_versions
from stepflow_tl.saliency.objectives import Objective, ObjectiveLike, resolve_objective
from stepflow_tl.stepflow.flow import FwdHooks, StepFlow, standing_hooks, standing_notes
from stepflow_tl.trace import ReasoningTrace, Step

#: What attention reads in the layer in which it is patched.
READ_BY_ATTENTION = ("resid_pre", "k", "v")


def step_patching(
    model: Any,
    clean_trace: ReasoningTrace,
    corrupted_trace: ReasoningTrace,
    *,
    metric: ObjectiveLike,
    component: str = "resid_pre",
    alignment: Alignment | str = "tokens",
    layers: Sequence[int] | None = None,
    steps: Sequence[str] | None = None,
    receiving_step: str | None = None,
    sources: Mapping[str, str] | None = None,
    clean_metric: ObjectiveLike | None = None,
    placebo_seed: int | None = None,
    stepflow: StepFlow | None = None,
    fwd_hooks: FwdHooks = (),
) -> StepPatching:
    """Effect of giving the corrupted run one step's activations of the clean run, for every layer and step.

    Args:
        model: A TransformerLens model: TransformerBridge (4.x) or HookedTransformer (3.9).
        clean_trace: The trace whose activations are taken, the correct one for instance.
        corrupted_trace: The trace that is run with them; its steps label the result.
        metric: What is measured, on the corrupted trace: a `LogitDifference`, the mean NLL of a step (its
            label), of a token span `(start, end)` or of a segment ("summary", "response"), or any callable
            `(logits, tokens) -> scalar`.
        component: "resid_pre", "resid_post", "attn_out", "mlp_out", "z", "v" or "k" (before rotation, so a
            key takes the position it is moved to).
        alignment: "tokens" or "mean", see `causal.alignment`.
        layers: Layers to patch; all by default.
        steps: Labels of the steps to patch; all by default, which needs the same labels in both traces.
        receiving_step: Label of the only step whose queries see the patch, in the patched layer; see the
            module. Goes with "resid_pre", "k" and "v".
        sources: Clean step's label for some steps, where it is not the same (`causal.controls`).
        clean_metric: The metric's form on the clean trace, where it names token positions and the traces
            differ in length; it is used for `StepPatching.recovered` alone.
        placebo_seed: Norm-matched placebo: each vector moves as far as it would, in a random direction.
        stepflow: Patch under this repair, in the runs of both traces.
        fwd_hooks: Hooks that stay on in every pass, before StepFlow's: (name, hook) pairs, or a function from
            a trace to them.

    Raises:
        TraceError: If a trace lacks a step that was named.
        AlignmentError: If steps do not match, in their labels or (under "tokens") in their lengths.
        ModelError: If a trace does not fit the model, or a hook point is missing or does not fire once.
        ObjectiveError: If the metric is unknown, no scalar, or touches no token.
        ValueError: If a name is unknown, or `receiving_step` goes with another component.
    """
    plan = plan_patching(
        model,
        clean_trace,
        corrupted_trace,
        metric=metric,
        component=component,
        alignment=alignment,
        layers=layers,
        steps=steps,
        receiving_step=receiving_step,
        sources=sources,
        clean_metric=clean_metric,
        placebo_seed=placebo_seed,
        stepflow=stepflow,
        fwd_hooks=fwd_hooks,
    )
    effects = torch.zeros(len(plan.layers), len(plan.matches), dtype=torch.float64)
    with frozen(model), torch.no_grad():
        clean, clean_value = record_clean(plan)
        corrupted_value = plan.measure(plan.logits(corrupted_trace))
        for row, layer in enumerate(plan.layers):
            for column, match in enumerate(plan.matches):
                # A receiving step that comes before the patched one sees nothing of it.
                if plan.receiving is None or plan.receiving.index >= match.corrupted.index:
                    logits = _patched_logits(plan, layer, column, clean[layer])
                    effects[row, column] = plan.measure(logits) - corrupted_value
    return plan.result("patching", effects, corrupted_value, clean_value)


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
        stepflow: A repair that stays on in every pass, or None.
        fwd_hooks: The caller's hooks that stay on.
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
    stepflow: StepFlow | None
    fwd_hooks: FwdHooks = field(repr=False)

    def hook(self, layer: int) -> str:
        """Name of the hook point patched in a layer."""
        return component_hook(self.model, self.component, layer)

    def logits(
        self, trace: ReasoningTrace, last: Sequence[NamedHook] = ()
    ) -> Float[Tensor, "1 token vocabulary"]:
        """Logits of one pass over a trace, under the hooks of the request and `last`."""
        standing = standing_hooks(self.model, trace, stepflow=self.stepflow, fwd_hooks=self.fwd_hooks)
        with attached(self.model, last=[*standing, *last]):
            return self.model(self.batch(trace), return_type="logits")

    def batch(self, trace: ReasoningTrace) -> Tensor:
        """The trace's tokens as a batch of one, where the model takes them."""
        return trace.tokens[None].to(model_device(self.model))

    def measure(self, logits: Float[Tensor, "1 token vocabulary"]) -> float:
        """The metric of a pass over the corrupted trace."""
        return float(self.metric.measure(logits, self.batch(self.corrupted_trace)))

    def result(
        self,
        method: Literal["patching", "attribution"],
        effects: Float[Tensor, "layer step"],
        corrupted_value: float,
        clean_value: float | None,
    ) -> StepPatching:
        """The labelled result."""
        notes = standing_notes(self.stepflow, self.fwd_hooks)
        if self.placebo_seed is not None:
            notes["placebo"] = f"norm-matched, seed {self.placebo_seed}"
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
    stepflow: StepFlow | None,
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
    receiving = None if receiving_step is None else corrupted_trace.step(receiving_step)
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
        clean_metric=metric_on_clean_trace(metric, clean_metric, clean_trace, corrupted_trace),
        placebo_seed=placebo_seed,
        stepflow=stepflow,
        fwd_hooks=fwd_hooks,
    )


def record_clean(plan: PatchingPlan) -> tuple[dict[int, Float[Tensor, " pos *feature"]], float | None]:
    """The component in each chosen layer of the clean run, and the clean run's metric.

    Raises:
        ModelError: If a hook point does not fire exactly once.
        ObjectiveError: If a callable metric does not return one number.
    """
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
    """Refuse a hook point that did not fire exactly once in a pass.

    Raises:
        ModelError: With its name.
    """
    if n_calls != 1:
        raise ModelError(
            f"`{name}` fired {n_calls} times in one forward pass, expected once: this model does not compute "
            "that activation there. Choose another component"
        )


def _patched_logits(
    plan: PatchingPlan, layer: int, column: int, clean: Float[Tensor, " pos *feature"]
) -> Float[Tensor, "1 token vocabulary"]:
    setter = step_patch_setter(plan.matches, plan.alignment, placebo_seed=plan.placebo_seed)
    fired: list[str] = []

    def patch(activation: Tensor, hook: Any) -> Tensor:
        fired.append(hook.name)
        return setter(activation, [layer, column], clean[None])

    name = plan.hook(layer)
    if plan.receiving is None:
        logits = plan.logits(plan.corrupted_trace, [(name, patch)])
        check_fired(name, len(fired))
        return logits
    z_name, rows = component_hook(plan.model, "z", layer), slice(*plan.receiving.token_span)
    read: list[Tensor] = []
    written: list[str] = []

    def lend(z: Tensor, hook: Any) -> None:
        read.append(z[:, rows].clone())

    def receive(z: Tensor, hook: Any) -> Tensor:
        written.append(hook.name)
        z = z.clone()
        z[:, rows] = read[0]
        return z

    plan.logits(plan.corrupted_trace, [(name, patch), (z_name, lend)])
    check_fired(name, len(fired))
    check_fired(z_name, len(read))
    logits = plan.logits(plan.corrupted_trace, [(z_name, receive)])
    check_fired(z_name, len(written))
    return logits
