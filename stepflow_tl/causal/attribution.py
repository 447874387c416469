"""Attribution patching: the first-order prediction of `step_patching`, from one backward pass.

1. Run the clean trace once and keep the component of every chosen layer.
2. Run the corrupted trace once with a leaf of zeros added to that component in every layer, and differentiate
   the metric with respect to the leaves: g = dm / d(activation), at the corrupted run.
3. `effects[layer, step]` is the sum over the step's tokens of g times the difference that patching would
   make. (Syed et al. 2023, Nanda 2023; the sign is that of patching: towards the clean activation.)

With `receiving_step` the metric's gradient at z of layer l, restricted to the receiving step's rows, is taken
back to the leaf of the same layer, which it reaches through that layer's attention alone.

Exact where the metric is linear in the activation, good where the two runs are close. `effect_agreement` says
how good on the traces at hand; do not trust the prediction for early residuals without it.

Cost: two forward passes and one backward pass whatever the number of layers and steps; `receiving_step` adds
the backward pass of each layer's attention. Memory: that of the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.alignment import Alignment, patched_step
from stepflow_tl.causal.patching import PatchingPlan, check_fired, plan_patching, record_clean
from stepflow_tl.causal.patching_result import StepPatching
from stepflow_tl.errors import ComparisonError, GradientError
from stepflow_tl.models.hook_names import component_hook
from stepflow_tl.models.passes import frozen
from stepflow_tl.saliency.objectives import ObjectiveLike
from stepflow_tl.stepflow.flow import FwdHooks, StepFlow
from stepflow_tl.trace import ReasoningTrace


def attribution_patching(
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
    """First-order prediction of `step_patching`: the same arguments, result and errors.

    Raises:
        GradientError: If the metric does not depend on a layer's component.
        ObjectiveError: Also if a callable metric has no gradient.

    Cost: two forward passes and one backward pass.
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
    with frozen(model), torch.inference_mode(False):
        with torch.no_grad():
            clean, clean_value = record_clean(plan)
        with torch.enable_grad():
            activations, gradients, corrupted_value = _gradients(plan)
    effects = torch.zeros(len(plan.layers), len(plan.matches), dtype=torch.float64)
    for row, layer in enumerate(plan.layers):
        for column, match in enumerate(plan.matches):
            here, step = activations[layer], slice(*match.corrupted.token_span)
            there = patched_step(
                here, clean[layer], match, plan.alignment, placebo_seed=plan.placebo_seed, layer=layer
            )
            effects[row, column] = (gradients[layer][step] * (there - here[step])).double().sum().cpu()
    return plan.result("attribution", effects, corrupted_value, clean_value)


@dataclass(frozen=True)
class EffectAgreement:
    """How well two maps of effects agree, entry by entry.

    Attributes:
        pearson: Correlation of the effects.
        spearman: Correlation of their ranks.
        sign_agreement: Part of the entries in which both have the same sign.
        n_entries: Entries compared: those in which either map is not exactly 0. An entry that is 0 in both is
            0 by construction (a step that cannot reach the metric) and would only flatter the agreement.
    """

    pearson: float
    spearman: float
    sign_agreement: float
    n_entries: int


def effect_agreement(measured: StepPatching, predicted: StepPatching) -> EffectAgreement:
    """Agreement of measured and predicted effects (`step_patching` and `attribution_patching`).

    Args:
        measured: Effects by patching.
        predicted: Effects of the same request, by attribution.

    Raises:
        ComparisonError: If the two answer different questions, or fewer than three entries, or entries that
            are all alike, leave nothing to correlate.
    """
    from scipy.stats import pearsonr, spearmanr

    for name in ("component", "alignment", "layers", "matches", "receiving_step"):
        if getattr(measured, name) != getattr(predicted, name):
            raise ComparisonError(
                f"the two maps differ in `{name}` ({getattr(measured, name)!r} and "
                f"{getattr(predicted, name)!r}): run both with the same arguments"
            )
    if measured.provenance.objective != predicted.provenance.objective:
        raise ComparisonError(
            f"the two maps measure {measured.provenance.objective!r} and {predicted.provenance.objective!r}: "
            "run both with the same metric"
        )
    live = (measured.effects != 0) | (predicted.effects != 0)
    first, second = measured.effects[live], predicted.effects[live]
    if len(first) < 3 or bool((first == first[0]).all()) or bool((second == second[0]).all()):
        raise ComparisonError(
            f"{len(first)} entries are not 0 in both maps, and a correlation needs three that differ: patch "
            "more layers or steps, or traces that differ more"
        )
    return EffectAgreement(
        pearson=float(pearsonr(first, second).statistic),  # pyright: ignore[reportAttributeAccessIssue]
        spearman=float(spearmanr(first, second).statistic),  # pyright: ignore[reportAttributeAccessIssue]
        sign_agreement=float((first.sign() == second.sign()).double().mean()),
        n_entries=len(first),
    )


@dataclass
class _Leaf:
    """An activation of one layer and the zeros that were added to it."""

    activation: Tensor
    leaf: Tensor


def _gradients(plan: PatchingPlan) -> tuple[dict[int, Tensor], dict[int, Tensor], float]:
    """Activations of the corrupted run, the metric's gradients there by layer, and the metric."""
    at_component: dict[int, list[_Leaf]] = {layer: [] for layer in plan.layers}
    at_z: dict[int, list[_Leaf]] = {layer: [] for layer in plan.layers}
    last = [(plan.hook(layer), partial(_add_leaf, into=at_component[layer])) for layer in plan.layers]
    if plan.receiving is not None:
        z_names = [component_hook(plan.model, "z", layer) for layer in plan.layers]
        last += [
            (name, partial(_add_leaf, into=at_z[layer]))
            for name, layer in zip(z_names, plan.layers, strict=True)
        ]
    logits = plan.logits(plan.corrupted_trace, last)
    tapped = at_component if plan.receiving is None else at_z
    for layer in plan.layers:
        check_fired(plan.hook(layer), len(at_component[layer]))
        if plan.receiving is not None:
            check_fired(component_hook(plan.model, "z", layer), len(at_z[layer]))
    value = plan.metric.loss(logits, plan.batch(plan.corrupted_trace))
    leaves = [tapped[layer][0].leaf for layer in plan.layers]
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=plan.receiving is not None)
    unreached = [layer for layer, g in zip(plan.layers, gradients, strict=True) if g is None]
    if unreached:
        raise GradientError(
            f"the metric {plan.metric.name!r} does not depend on {plan.component} of layers {unreached}: a "
            "hook cuts the path, or the metric is computed elsewhere. Leave these layers out with "
            "layers=[...]"
        )
    found = dict(zip(plan.layers, gradients, strict=True))
    if plan.receiving is not None:
        rows = slice(*plan.receiving.token_span)
        found = {
            layer: _through_attention(at_z[layer][0], at_component[layer][0], found[layer], rows)
            for layer in plan.layers
        }
    activations = {layer: at_component[layer][0].activation[0].detach() for layer in plan.layers}
    return activations, {layer: g[0].detach() for layer, g in found.items()}, float(value.detach())


def _through_attention(z: _Leaf, component: _Leaf, gradient: Tensor, rows: slice) -> Tensor:
    """The gradient at z, of some rows only, taken back to the component of the same layer."""
    received = torch.zeros_like(gradient)
    received[:, rows] = gradient[:, rows]
    (back,) = torch.autograd.grad(z.activation, component.leaf, received, retain_graph=True)
    return back


def _add_leaf(
    activation: Float[Tensor, "batch pos *feature"], hook: Any, *, into: list[_Leaf]
) -> Float[Tensor, "batch pos *feature"]:
    leaf = torch.zeros_like(activation).requires_grad_(True)
    into.append(_Leaf(activation, leaf))
    return activation + leaf
