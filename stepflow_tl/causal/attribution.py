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

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.alignment import patched_step
from stepflow_tl.causal.patching_plan import PatchingPlan, check_fired, record_clean
from stepflow_tl.causal.patching_result import StepPatching
from stepflow_tl.errors import ComparisonError, GradientError
from stepflow_tl.models.hook_names import component_hook
from stepflow_tl.models.passes import frozen


def predicted_effects(
    plan: PatchingPlan,
) -> tuple[Float[Tensor, "layer step"], float, float | None]:
    """The effects, and the metric of the corrupted and of the clean run; `step_patching` names the errors."""
    with frozen(plan.model), torch.inference_mode(False):
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
    return effects, corrupted_value, clean_value


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


class _Leaf(NamedTuple):
    """An activation of one layer and the zeros that were added to it."""

    activation: Tensor
    leaf: Tensor


def _gradients(plan: PatchingPlan) -> tuple[dict[int, Tensor], dict[int, Tensor], float]:
    """Activations of the corrupted run, the metric's gradients there by layer, and the metric."""
    at_component: dict[int, list[_Leaf]] = {layer: [] for layer in plan.layers}
    at_z: dict[int, list[_Leaf]] = {layer: [] for layer in plan.layers}
    taps = [(plan.hook(layer), at_component[layer]) for layer in plan.layers]
    if plan.receiving is not None:
        taps += [(component_hook(plan.model, "z", layer), at_z[layer]) for layer in plan.layers]
    logits = plan.logits(plan.corrupted_trace, [(name, partial(_add_leaf, into=tap)) for name, tap in taps])
    for name, tap in taps:
        check_fired(name, len(tap))
    tapped = at_component if plan.receiving is None else at_z
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
        for layer, gradient in found.items():  # at z, of these rows only, taken back to the component
            received = torch.zeros_like(gradient)
            received[:, rows] = gradient[:, rows]
            ends = at_z[layer][0].activation, at_component[layer][0].leaf
            (found[layer],) = torch.autograd.grad(*ends, received, retain_graph=True)
    activations = {layer: at_component[layer][0].activation[0].detach() for layer in plan.layers}
    return activations, {layer: g[0].detach() for layer, g in found.items()}, float(value.detach())


def _add_leaf(
    activation: Float[Tensor, "batch pos *feature"], hook: Any, *, into: list[_Leaf]
) -> Float[Tensor, "batch pos *feature"]:
    leaf = torch.zeros_like(activation).requires_grad_(True)
    into.append(_Leaf(activation, leaf))
    return activation + leaf
