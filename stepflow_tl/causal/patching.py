"""`step_patching`: activation patching between two traces of one problem, a step at a time.

1. Run the clean trace once and keep the component (residual, attention output, keys, values or z) of every
   chosen layer; run the corrupted trace once for the metric without a patch.
2. For each layer and step: run the corrupted trace with that step's activations replaced in that layer, token
   by token or in their mean (`alignment`), and measure again.
3. `effects[layer, step]` is the metric with the patch minus the metric without.

`receiving_step=i` restricts the path: what was patched in layer l is seen only by step i's queries in that
layer. Keys and values cannot be patched for some queries alone, so the edit is made one step further on: a
first pass with the patch gives z of layer l at step i's positions, and a second pass, of the corrupted trace
without the patch, has these rows of z written over its own. Then everything else, step j's own residual
included, is what it was, and what reached the metric came through the edge (i <- j) of layer l. With "v" this
is exactly `z[t] += sum over k in j of A[t,k] (v_clean[k] - v[k])` for t in step i; with "k" the attention
weights move; with "resid_pre" both, and for j = i the step's queries too. A step that comes after i cannot
reach it: its effect is 0, without a pass.

Cost: `2 + L S` forward passes for L layers and S steps, `2 + 2 L S` at most with `receiving_step`. Memory:
the component of one run, `O(L T d_model)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.alignment import Alignment
from stepflow_tl.causal.patching_plan import FwdHooks, PatchingPlan, check_fired, plan_patching, record_clean
from stepflow_tl.causal.patching_result import StepPatching
from stepflow_tl.causal.step_edits import step_patch_setter
from stepflow_tl.models.hook_names import component_hook
from stepflow_tl.models.passes import frozen
from stepflow_tl.saliency.objectives import ObjectiveLike
from stepflow_tl.trace import ReasoningTrace


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
        fwd_hooks: Hooks in force in every pass, or a function that makes them for a trace, such as
            `lambda trace: StepFlow().hooks(model, trace)`. Hooks already on the model stay in force too.

    Raises:
        AlignmentError: If steps do not match, in their labels or (under "tokens") in their lengths.
        ModelError: If a trace does not fit the model, or a hook point is missing or does not fire once.
        ObjectiveError: If the metric is unknown, no scalar, or touches no token.
        ValueError: If a name is unknown, or `receiving_step` goes with another component.

    Cost: `2 + L S` forward passes, at most `2 + 2 L S` with `receiving_step`.
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
        fwd_hooks=fwd_hooks,
    )
    effects = torch.zeros(len(plan.layers), len(plan.matches), dtype=torch.float64)
    with frozen(model), torch.no_grad():
        clean, clean_value = record_clean(plan)
        corrupted_value = _measure(plan, plan.logits(corrupted_trace))
        for row, layer in enumerate(plan.layers):
            for column, match in enumerate(plan.matches):
                if not plan.unreachable(match):
                    logits = _patched_logits(plan, layer, column, clean[layer])
                    effects[row, column] = _measure(plan, logits) - corrupted_value
    return plan.result("patching", effects, corrupted_value, clean_value)


def _measure(plan: PatchingPlan, logits: Float[Tensor, "1 token vocabulary"]) -> float:
    return float(plan.metric.measure(logits, plan.batch(plan.corrupted_trace)))


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
    plan.logits(plan.corrupted_trace, [(name, patch), (z_name, partial(_read, rows=rows, into=read))])
    check_fired(name, len(fired))
    check_fired(z_name, len(read))
    logits = plan.logits(
        plan.corrupted_trace, [(z_name, partial(_write, rows=rows, new=read[0], done=written))]
    )
    check_fired(z_name, len(written))
    return logits


def _read(z: Tensor, hook: Any, *, rows: slice, into: list[Tensor]) -> None:
    into.append(z[:, rows].clone())


def _write(z: Tensor, hook: Any, *, rows: slice, new: Tensor, done: list[str]) -> Tensor:
    z = z.clone()
    z[:, rows] = new
    done.append(hook.name)
    return z
