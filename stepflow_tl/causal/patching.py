"""`step_patching`: activation patching between two traces of one problem, a step at a time.

1. Check the request before any forward pass.
2. Run the clean trace once and keep the component (residual, attention output, keys, values or z) of every
   chosen layer (`record_clean`); run the corrupted trace once for the metric without a patch.
3. For each layer and step: run the corrupted trace with that step's activations replaced in that layer, token
   by token or in their mean (`alignment`), and measure again. The steps of one layer run as a batch, one row
   each and one row without a patch.
4. `effects[layer, step]` is the metric with the patch minus the metric without, of the same batch: rounding
   that depends on the shape of a pass cancels.
5. One step at a time, against the first run of the corrupted trace: where hooks are attached from outside or
   stay on by request, which may know a batch of one; where a row without a patch does not measure what it
   does alone, so rows are not independent; and where `batch_tokens` has no room for two rows and more.

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

Cost: `2 + L S` forward passes for L layers and S steps, `2 + 2 L S` at most with `receiving_step`, and one
row more for each batch. Memory: the component of one run, `O(L T d_model)`, and the logits of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.alignment import (
    Alignment,
    checked_alignment,
    match_steps,
    metric_on_clean_trace,
    step_patch_setter,
)
from stepflow_tl.causal.attribution import predicted_effects
from stepflow_tl.causal.patching_plan import Method, PatchingPlan, check_fired, record_clean
from stepflow_tl.causal.patching_result import StepPatching
from stepflow_tl.errors import ObjectiveError
from stepflow_tl.models.facts import check_fit, check_layers, model_facts
from stepflow_tl.models.hook_names import component_hook, hook_counts
from stepflow_tl.models.passes import frozen
from stepflow_tl.saliency.objectives import ObjectiveLike, resolve_objective
from stepflow_tl.stepflow.flow import StepFlow
from stepflow_tl.stepflow.standing import FwdHooks
from stepflow_tl.trace import ReasoningTrace

#: What attention reads in the layer in which it is patched.
READ_BY_ATTENTION = ("resid_pre", "k", "v")

# How far a metric may move with the shape of a pass, as a part of it.
_BATCH_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}


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
    method: Method | str = "patching",
    batch_tokens: int = 4096,
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
        method: "patching" measures; "attribution" predicts to first order (`causal.attribution`), at the cost
            of two forward passes and one backward pass.
        batch_tokens: Bound on rows times tokens in one batch, whose logits are all held; 1 runs one patch at
            a time.

    Raises:
        TraceError: If a trace lacks a step that was named.
        AlignmentError: If steps do not match, in their labels or (under "tokens") in their lengths.
        ModelError: If a trace does not fit the model, or a hook point is missing or does not fire once.
        ObjectiveError: If the metric is unknown, no scalar, or touches no token; or has no gradient, under
            "attribution".
        GradientError: Under "attribution", if the metric does not depend on a layer's component.
        ValueError: If a name is unknown, `receiving_step` goes with another component, or `batch_tokens` is
            below 1.
    """
    effects_by = {"patching": _measured_effects, "attribution": predicted_effects}
    if method not in effects_by:
        raise ValueError(f"method is {method!r}: expected one of {', '.join(effects_by)}")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}: expected at least 1")
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
            f"metric={resolved.name!r} is a loss for each row, not one number: use 'response', 'summary', a "
            "step's label, a LogitDifference or a callable (logits, tokens) -> scalar"
        )
    plan = PatchingPlan(
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
        batch_tokens=batch_tokens,
        stepflow=stepflow,
        fwd_hooks=fwd_hooks,
    )
    return plan.result(method, *effects_by[method](plan))


def attribution_patching(
    model: Any, clean_trace: ReasoningTrace, corrupted_trace: ReasoningTrace, **options: Any
) -> StepPatching:
    """First-order prediction of `step_patching`: that with `method="attribution"`.

    Arguments as in `step_patching`.
    """
    return step_patching(model, clean_trace, corrupted_trace, **options, method="attribution")


def _measured_effects(plan: PatchingPlan) -> tuple[Float[Tensor, "layer step"], float, float | None, int]:
    """The effects, the metric of the corrupted and of the clean run, and the tokens that were run."""
    effects = torch.zeros(len(plan.layers), len(plan.matches), dtype=torch.float64)
    columns = [column for column, match in enumerate(plan.matches) if plan.reaches(match)]
    n_tokens = len(plan.corrupted_trace)
    size = plan.batch_tokens // n_tokens - 1  # one row is not patched
    if plan.stepflow is not None or plan.fwd_hooks or hook_counts(plan.model):
        size = 1
    with frozen(plan.model), torch.no_grad():
        clean, clean_value = record_clean(plan)
        corrupted_value = plan.measure(plan.logits(plan.corrupted_trace))
        n_rows = 0
        for row, layer in enumerate(plan.layers):
            done = 0
            while done < len(columns):
                taken = columns[done : done + max(1, size)]
                is_batch = len(taken) > 1
                logits = _patched_logits(plan, layer, taken, clean[layer], with_control=is_batch)
                n_rows += len(logits) * (1 if plan.receiving is None else 2)
                values = [plan.measure(logits[i : i + 1]) for i in range(len(logits))]
                base = values.pop() if is_batch else corrupted_value
                if is_batch and not _agree(base, corrupted_value, plan.facts.dtype):
                    size = 1  # rows of this model are not independent
                    continue
                effects[row, taken] = torch.tensor(values, dtype=torch.float64) - base
                done += len(taken)
    n_run = len(plan.clean_trace) + (1 + n_rows) * n_tokens
    return effects, corrupted_value, clean_value, n_run


def _agree(found: float, alone: float, dtype: torch.dtype) -> bool:
    """Whether a metric is the same but for rounding."""
    return abs(found - alone) <= _BATCH_TOLERANCE.get(dtype, 0.1) * max(1.0, abs(alone))


def _patched_logits(
    plan: PatchingPlan,
    layer: int,
    columns: Sequence[int],
    clean: Float[Tensor, " pos *feature"],
    *,
    with_control: bool,
) -> Float[Tensor, "row token vocabulary"]:
    """Logits of the corrupted trace, each row with one step patched; last, a row with none."""
    setter = step_patch_setter(plan.matches, plan.alignment, placebo_seed=plan.placebo_seed)
    n_rows = len(columns) + with_control
    fired: list[str] = []

    def patch(activation: Tensor, hook: Any) -> Tensor:
        fired.append(hook.name)
        rows = [setter(activation[i : i + 1], [layer, c], clean[None]) for i, c in enumerate(columns)]
        return torch.cat([*rows, activation[len(rows) :]])

    name = plan.hook(layer)
    if plan.receiving is None:
        logits = plan.logits(plan.corrupted_trace, [(name, patch)], n_rows)
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

    plan.logits(plan.corrupted_trace, [(name, patch), (z_name, lend)], n_rows)
    check_fired(name, len(fired))
    check_fired(z_name, len(read))
    logits = plan.logits(plan.corrupted_trace, [(z_name, receive)], n_rows)
    check_fired(z_name, len(written))
    return logits
