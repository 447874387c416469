"""`step_saliency`: check the inputs, choose a backend, run it, label the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepflow_tl.models.facts import check_fit, check_layers, model_facts
from stepflow_tl.results.provenance import Provenance, package_versions
from stepflow_tl.saliency.backends import Backend, run_backend
from stepflow_tl.saliency.objectives import ObjectiveLike, resolve_objective
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.stepflow.flow import StepFlow
from stepflow_tl.trace import ReasoningTrace


def step_saliency(
    model: Any,
    trace: ReasoningTrace,
    *,
    objective: ObjectiveLike = "per_token",
    backend: Backend = "auto",
    layers: Sequence[int] | None = None,
    checkpoint: bool = False,
    block_divisor: int = 1,
    stepflow: StepFlow | None = None,
) -> StepSaliency:
    """Step-to-step saliency map of one trace (paper: Step-Saliency; docs/method.md sections 2 to 4).

    The default objective is the paper's per-token loss: row t of a map is `|A[t] * dL_t/dA[t]|`, with L_t
    the NLL of the token after t. The authors' code differentiates the mean loss over all tokens instead,
    question included. A mean loss also counts what row t does to every later token and so inflates the
    shallow layers, the very ones a diagnosis of Shallow Lock-in reads.

    Args:
        model: A TransformerLens model: TransformerBridge (4.x) or HookedTransformer (3.9). Its parameters
            need no gradient; hooks that are already attached stay in force. The fused backend also takes
            a plain transformers causal LM.
        trace: The trace, in this model's token ids.
        objective: `"per_token"`, `"response"` (mean NLL of thinking and summary), `"thinking"`, `"summary"`,
            a step or its label, a token span `(start, end)` (`(0, len(trace))` is the mean over all tokens,
            as in the authors' code), a `LogitDifference`, or any callable `(logits, tokens) -> scalar` with
            logits `[1, T, vocabulary]` and tokens `[1, T]`.
        backend: `"fused"` recomputes attention tile by tile, in O(T) memory, where attention goes through
            transformers' attention interface; `"hooks"` reads `hook_pattern` and its gradient, in O(L T^2);
            `"layerwise"` does so one layer at a time, in O(T^2), for one more forward pass;
            `"auto"` takes fused where it is exact, and says in `provenance` which ran and why.
        layers: Layers to keep; all by default. The passes run through all layers either way. Of a hybrid
            model its attention layers, with an objective other than "per_token".
        checkpoint: Keep only the input of each block and run it again in the backward pass (fused only): less
            memory, one more forward pass of time, and hooks on residuals fire twice.
        block_divisor: Attention tiles and chunks of logits are smaller by this factor (fused only): less
            scratch memory, some more time, and sums that round otherwise.
        stepflow: Map the repaired flow: the passes run under this StepFlow. Its bridge edits scores, so
            `"auto"` takes `"hooks"`; momentum alone goes with `"fused"`.

    Returns:
        Sums per layer, head and step pair, in nats, on the CPU.

    Raises:
        ModelError: If the trace does not fit the model (vocabulary, context), a hook point is missing or
            silent, or `per_token` does not hold on this model.
        ObjectiveError: If the objective is unknown, no scalar, or touches no token.
        GradientError: If a gradient is missing or not finite.
        ValueError: If `backend` is unknown, or cannot do with `checkpoint` or `block_divisor`.

    Cost: one forward and one backward pass. Memory: that of the activations with `fused`, `O(L H T^2)` on top
    with `hooks`.
    """
    facts = model_facts(model)
    check_fit(facts, trace)
    chosen = check_layers(facts, layers)
    resolved = resolve_objective(objective, trace)
    hooks = stepflow.hooks(model, trace, detach_values=resolved.per_token) if stepflow is not None else ()
    run = run_backend(
        backend,
        model,
        trace.tokens,
        trace.step_ids,
        resolved,
        chosen,
        checkpoint=checkpoint,
        block_divisor=block_divisor,
        hooks=hooks,
    )
    notes = dict(run.notes)
    if stepflow is not None:
        notes["stepflow"] = repr(stepflow)
        if stepflow.placebo is not None:
            notes["placebo"] = str(stepflow.placebo)
    return StepSaliency(
        sums=run.sums[..., :-1].contiguous(),
        template_sums=run.sums[..., -1].contiguous(),
        trace=trace,
        layers=chosen,
        n_layers=facts.n_layers,
        provenance=Provenance(
            model_name=facts.name,
            objective=resolved.name,
            backend=run.backend,
            dtype=str(facts.dtype),
            device=str(facts.device),
            versions=package_versions(),
            notes=notes,
        ),
    )
