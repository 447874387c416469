"""`step_saliency`: check the inputs, choose a backend, run it, label the result.

`"auto"` takes the fused backend where it can be exact, else hooks; the reason for falling back goes into the
provenance. Hooks on scores or patterns need those tensors to exist, so they make it choose `"hooks"`.
StepFlow's bridge does not: the fused backend has a bridge of its own (`FlowCalls`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from jaxtyping import Float
from torch import Tensor

from stepflow_tl.errors import FusedRefusal, ModelError
from stepflow_tl.models.facts import check_fit, check_layers, is_transformerlens, model_facts
from stepflow_tl.models.hook_names import resolve_hooks
from stepflow_tl.models.passes import NamedHook, attached
from stepflow_tl.results.provenance import Provenance, package_versions
from stepflow_tl.saliency.backends import BACKENDS, Backend, check_per_token, refuse_early
from stepflow_tl.saliency.fused.run import fused_backend
from stepflow_tl.saliency.objectives import Objective, ObjectiveLike, resolve_objective
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.saliency.scores import Score, check_score
from stepflow_tl.stepflow.flow import StepFlow
from stepflow_tl.stepflow.standing import FwdHooks, standing_hooks, standing_notes
from stepflow_tl.trace import ReasoningTrace


def step_saliency(
    model: Any,
    trace: ReasoningTrace,
    *,
    objective: ObjectiveLike = "per_token",
    score: Score = "saliency",
    backend: Backend = "auto",
    layers: Sequence[int] | None = None,
    checkpoint: bool = False,
    block_divisor: int = 1,
    stepflow: StepFlow | None = None,
    fwd_hooks: FwdHooks = (),
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
        objective: `"per_token"`, `"log_odds"` (per token too, of `-log(p / (1 - p))`, whose gradient does not
            fade where the model is sure), `"response"` (mean NLL of thinking and summary), `"thinking"`,
            `"summary"`, a step or its label, a token span `(start, end)` (`(0, len(trace))` is the mean over
            all tokens, as in the authors' code), a `LogitDifference`, or any callable `(logits, tokens) ->
            scalar` with logits `[1, T, vocabulary]` and tokens `[1, T]`.
        score: `"saliency"`, the paper's `|A * dL/dA|`; `"signed"`, the same with its sign; or `"cut"`, what
            removing a step from a row's softmax does to L to first order, signed, comparable with knockout
            (`saliency.scores`). Every backend and option serves each.
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
        stepflow: Map the repaired flow: the passes run under this StepFlow, with any backend; with `"fused"`
            also of a plain transformers causal LM.
        fwd_hooks: Hooks `(name, hook)` in force in the passes, after those already attached and before
            StepFlow's, or a function from the trace to them. The map is that of `model.hooks(fwd_hooks=...)`
            around the call; `"auto"` takes `"hooks"` where they listen at scores or patterns.

    Returns:
        Sums per layer, head and step pair, in nats, on the CPU.

    Raises:
        ModelError: If the trace does not fit the model (vocabulary, context), a hook point is missing or
            silent, `per_token` does not hold on this model, or hooks are given for a model without hook
            points.
        ObjectiveError: If the objective is unknown, no scalar, or touches no token.
        GradientError: If a gradient is missing or not finite.
        ScoreError: If `score` is unknown.
        ValueError: If `backend` is unknown, or cannot do with `checkpoint` or `block_divisor`.

    Cost: one forward and one backward pass. On a GPU the Triton kernel pools "saliency" only; other scores go
    through the tiles of the CPU path there, which take longer. Memory: that of the activations with `fused`,
    `O(L H T^2)` on top with `hooks`.
    """
    check_score(score)
    facts = model_facts(model)
    check_fit(facts, trace)
    chosen = check_layers(facts, layers)
    resolved = resolve_objective(objective, trace)
    own = standing_hooks(model, trace, fwd_hooks=fwd_hooks)
    if own and not is_transformerlens(model):
        raise ModelError(
            f"{type(model).__name__} has no hook points for `fwd_hooks`: wrap it with "
            "TransformerBridge.boot_transformers(name, hf_model=..., tokenizer=...)"
        )
    sums, ran, notes = _run_backend(
        backend,
        model,
        trace,
        resolved,
        chosen,
        own,
        stepflow,
        score=score,
        checkpoint=checkpoint,
        block_divisor=block_divisor,
    )
    return StepSaliency(
        sums=sums[..., :-1].contiguous(),
        template_sums=sums[..., -1].contiguous(),
        trace=trace,
        layers=chosen,
        n_layers=facts.n_layers,
        score=score,
        provenance=Provenance(
            model_name=facts.name,
            objective=resolved.name,
            backend=ran,
            dtype=str(facts.dtype),
            device=str(facts.device),
            versions=package_versions(),
            notes={**notes, **standing_notes(stepflow, own)},
        ),
    )


def _run_backend(
    backend: Backend,
    model: Any,
    trace: ReasoningTrace,
    objective: Objective,
    layers: tuple[int, ...],
    own: Sequence[NamedHook],
    stepflow: StepFlow | None,
    *,
    score: Score,
    checkpoint: bool,
    block_divisor: int,
) -> tuple[Float[Tensor, "layer head query_step key_bin"], str, dict[str, str]]:
    """The sums, the backend that ran, and facts for the provenance; the last key bin is TEMPLATE.

    The caller's `own` hooks, and those of `stepflow`, are on the model while the map is computed and while it
    is asked whether fused can serve it, but not during the check of the per-token rows: they know the trace's
    positions, and the check runs on a few tokens.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(get_args(Backend))}")
    if backend in ("hooks", "layerwise") and checkpoint:
        raise ValueError(f"checkpoint=True needs backend='fused': {backend!r} holds T x T patterns anyway")
    if block_divisor < 1 or (backend in ("hooks", "layerwise") and block_divisor > 1):
        raise ValueError(f"block_divisor is {block_divisor}: expected 1, or more with backend='fused'")
    arguments = (model, trace.tokens, trace.step_ids, objective, layers)
    notes: dict[str, str] = {}
    if backend in ("auto", "fused"):
        try:
            with attached(model, last=own):
                refuse_early(model)
            if objective.per_token:
                notes["self_check"] = check_per_token(model, trace.tokens, "fused")
            flow = stepflow and stepflow.calls(model, trace, detach_values=objective.per_token)
            with attached(model, last=[*own, *(flow.hooks if flow else ())]):
                sums = fused_backend(
                    *arguments, score=score, checkpoint=checkpoint, block_divisor=block_divisor, flow=flow
                )
            if checkpoint or block_divisor > 1:
                notes["memory"] = f"checkpoint={checkpoint}, block_divisor={block_divisor}"
            return sums, "fused", notes
        except FusedRefusal as refusal:
            if backend == "fused" or checkpoint or block_divisor > 1 or not is_transformerlens(model):
                raise
            notes = {"not_fused": refusal.reason}
    hooks = standing_hooks(model, trace, stepflow=stepflow, fwd_hooks=own, detach_values=objective.per_token)
    resolve_hooks(model, None if objective.per_token else layers)
    name = "layerwise" if backend == "layerwise" else "hooks"
    if objective.per_token:
        notes["self_check"] = check_per_token(model, trace.tokens, name)
    with attached(model, last=hooks):
        return BACKENDS[name](*arguments, score=score), name, notes
