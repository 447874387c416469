"""`linearity_check`: does signed saliency predict what a small dose of knockout does?

1. Dose: at `hook_pattern`, the attention from step i's queries to step j's keys is multiplied by `1 - eps`,
   in the chosen layers and heads at once, after the softmax and without renormalising. Then
   `dL / d eps = - sum of A * dL/dA` over the edge's tokens, layers and heads, at eps = 0.
2. Predicted: that sum, from one backward pass (`step_saliency(score="signed")`, through the pattern hooks).
3. Measured: the slope at 0 by central differences of fourth order, from four forward passes per pair:
   `(8 (L(eps) - L(-eps)) - (L(2 eps) - L(-2 eps))) / (12 eps)`.

The loss is one scalar, differentiated and measured through all paths: "response", a step's NLL, or
"query_step", the NLL of each pair's own step i (one backward pass per query step). The paper's per-token loss
is not: each row has its own, along its own position only, and no dose moves that alone.

A gross disagreement says that a factor, a sign or a head mapping is wrong, or that patterns are not live on
this model. The differences err by O(eps^4), plus rounding / eps: float64 models agree to far below 1 %. In
float32, slopes near 0 drown in rounding; a larger eps helps. In a mixture of experts a dose may change which
expert a token goes to, and the loss jumps there: a smaller eps, in float64, stays on one side of the jump.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.controls import StepPair
from stepflow_tl.causal.cut import causal_pair
from stepflow_tl.errors import AlignmentError, ModelError, ObjectiveError
from stepflow_tl.models.facts import check_heads, check_layers, model_facts
from stepflow_tl.models.hook_names import resolve_hooks
from stepflow_tl.models.passes import NamedHook, attached, frozen, model_device
from stepflow_tl.saliency.objectives import Objective, ObjectiveLike, resolve_objective
from stepflow_tl.saliency.run import step_saliency
from stepflow_tl.stepflow.flow import StepFlow
from stepflow_tl.stepflow.standing import FwdHooks, standing_hooks
from stepflow_tl.trace import ReasoningTrace, Step


@dataclass(frozen=True)
class LinearityCheck:
    """Predicted and measured slopes of the loss in the dose, one per pair.

    Attributes:
        pairs: (query step, key step) labels.
        predicted: `- sum of A * dL/dA`, in the objective's unit per unit of dose.
        measured: Slopes by finite differences.
        eps: Size of the smaller dose.
        layers: Layers dosed.
        heads: Heads dosed, or None for all.
    """

    pairs: tuple[StepPair, ...]
    predicted: Float[Tensor, " pair"]
    measured: Float[Tensor, " pair"]
    eps: float
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None

    @property
    def relative_error(self) -> Float[Tensor, " pair"]:
        """`|measured - predicted|` over the larger of the two; 0 where both are 0."""
        scale = torch.maximum(self.predicted.abs(), self.measured.abs())
        return (self.measured - self.predicted).abs() / scale.clamp(min=torch.finfo(scale.dtype).tiny)

    @property
    def max_relative_error(self) -> float:
        """The largest of them."""
        return float(self.relative_error.max())

    def table(self) -> str:
        """One line per pair: slopes and relative error."""
        lines = ["query  key    predicted     measured      error"]
        columns = (column.tolist() for column in (self.predicted, self.measured, self.relative_error))
        for (query, key), predicted, measured, error in zip(self.pairs, *columns, strict=True):
            lines.append(f"{query:<6} {key:<6} {predicted:+.5e}  {measured:+.5e}  {error:.2%}")
        return "\n".join(lines)


def linearity_check(
    model: Any,
    trace: ReasoningTrace,
    pairs: Sequence[StepPair] | Literal["all"] = "all",
    *,
    objective: ObjectiveLike = "response",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    eps: float = 1e-2,
    stepflow: StepFlow | None = None,
    fwd_hooks: FwdHooks = (),
) -> LinearityCheck:
    """Compare the slope that signed saliency predicts for each edge with the measured one.

    Args:
        model: A TransformerLens model whose patterns are live; float64 for errors well under 1 %.
        trace: The trace, in this model's token ids.
        pairs: (query step, key step) labels, or "all": every pair whose key step is not later.
        objective: One scalar loss as in `step_saliency`, or "query_step" for the NLL of each pair's query
            step. "per_token" and "log_odds" are refused.
        layers: Layers dosed together; all by default.
        heads: Heads dosed together, the same in every layer; all by default.
        eps: Size of the smaller dose; doses are +-eps and +-2 eps.
        stepflow: Check under this repair; the dose acts on the pattern that it leaves.
        fwd_hooks: Hooks that stay on in every pass, after those already on the model and before StepFlow's:
            (name, hook) pairs, or a function from the trace to them.

    Raises:
        TraceError: If a pair names a step that the trace lacks.
        AlignmentError: If a pair's key step is later, or there is no pair.
        ModelError: If the trace does not fit, a head does not exist, or patterns are missing or silent.
        ObjectiveError: If the objective is per token, unknown, no scalar, or touches no token.
        GradientError: If a gradient is missing or not finite.
        ValueError: If `eps` is not between 0 and 0.5.

    Cost: one backward pass for each objective (one, or one per query step), four forward passes per pair.
    """
    if not 0 < eps < 0.5:
        raise ValueError(f"eps is {eps}: expected a dose between 0 and 0.5, both excluded")
    chosen_layers = check_layers(model_facts(model), layers)
    chosen_heads = check_heads(model, heads)
    every = ((i.label, j.label) for i in trace.steps for j in trace.steps[: i.index + 1])
    chosen = tuple(every if pairs == "all" else ((query, key) for query, key in pairs))
    if not chosen:
        raise AlignmentError("pairs is empty: expected at least one (query step, key step)")
    edges = [causal_pair(trace, pair) for pair in chosen]
    patterns = [hooks.pattern for hooks in resolve_hooks(model, sorted(chosen_layers)).layers]
    standing = standing_hooks(model, trace, stepflow=stepflow, fwd_hooks=fwd_hooks)
    maps: dict[str, Tensor] = {}
    predicted, measured = [], []
    for query, key in edges:
        loss = query if objective == "query_step" else objective
        resolved = resolve_objective(loss, trace)
        if resolved.per_token:
            raise ObjectiveError(
                f"objective={resolved.name!r} has a loss for each row, and no change of an edge moves only "
                "that one: use a scalar such as 'response', 'summary' or a step's label"
            )
        name = query.label if objective == "query_step" else ""
        if name not in maps:
            how: Any = dict(score="signed", backend="hooks", layers=chosen_layers, fwd_hooks=standing)
            maps[name] = step_saliency(model, trace, objective=loss, **how).sums
        by_head = maps[name][:, :, query.index, key.index]
        by_head = by_head if chosen_heads is None else by_head[:, list(chosen_heads)]
        predicted.append(-float(by_head.double().sum()))
        dosing = partial(dose_hook, edge=(query, key), heads=chosen_heads)
        loss_at = partial(_dosed_loss, model, trace, resolved, patterns, dosing, standing)
        measured.append(_slope_at_zero(loss_at, eps))
    slopes = torch.tensor([predicted, measured], dtype=torch.float64)
    return LinearityCheck(chosen, slopes[0], slopes[1], eps, chosen_layers, chosen_heads)


def dose_hook(
    pattern: Float[Tensor, "batch head query key"],
    hook: Any,
    *,
    edge: tuple[Step, Step],
    dose: float,
    heads: Sequence[int] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """Multiply the attention of one edge (query step, key step) by `1 - dose`; for `hook_pattern`."""
    query, key = edge
    factor = torch.ones_like(pattern)
    chosen = slice(None) if heads is None else list(heads)
    factor[:, chosen, slice(*query.token_span), slice(*key.token_span)] = 1 - dose
    return pattern * factor


def _slope_at_zero(function: Callable[[float], float], eps: float) -> float:
    """Central differences of fourth order."""
    near, far = (function(size) - function(-size) for size in (eps, 2 * eps))
    return (8 * near - far) / (12 * eps)


def _dosed_loss(
    model: Any,
    trace: ReasoningTrace,
    objective: Objective,
    patterns: Sequence[str],
    dosing: Callable[..., Tensor],
    standing: Sequence[NamedHook],
    dose: float,
) -> float:
    fired: list[str] = []

    def count(pattern: Tensor, hook: Any) -> None:
        fired.append(hook.name)

    last = [*standing, *((name, hook) for name in patterns for hook in (partial(dosing, dose=dose), count))]
    with frozen(model), torch.no_grad(), attached(model, last=last):
        batch = trace.tokens[None].to(model_device(model))
        logits = model(batch, return_type="logits")
    if sorted(fired) != sorted(patterns):
        raise ModelError(
            f"{len(fired)} of {len(patterns)} pattern hooks fired: this attention implementation does not "
            "compute patterns at its hook points. Boot the model with eager attention."
        )
    return float(objective.measure(logits, batch))
