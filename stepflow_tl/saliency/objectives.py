"""What is differentiated: the per-token losses of the paper, or one scalar.

`per_token` (default) is the paper's definition: row t of the map is the gradient of L_t, the NLL of the
token after t, and nothing else. `log_odds` is the same with `L_t = -log(p / (1 - p))`, p the probability of
that token: the NLL's derivative by the token's logit is `p - 1`, which fades where the model is sure; that of
the log-odds is -1. Every other objective is one scalar, so its row t also counts what row t does to all later
tokens.

Names: `"per_token"`; `"log_odds"`; `"response"` (mean NLL of thinking and summary tokens); `"thinking"`;
`"summary"`; a step's label such as `"T3"` or a `Step`; a token span `(start, end)`, of which `(0,
len(trace))` is the mean over all tokens, as in the authors' code; a `LogitDifference`; or any callable
`(logits, tokens) -> scalar`. Losses are in nats, taken in at least float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import ObjectiveError
from stepflow_tl.trace import ReasoningTrace, Segment, Step

_SEGMENT_OBJECTIVES = {
    "response": (Segment.THINKING, Segment.SUMMARY),
    "thinking": (Segment.THINKING,),
    "summary": (Segment.SUMMARY,),
}


@dataclass(frozen=True)
class LogitDifference:
    """Logit of one token minus logit of another, at one position.

    Attributes:
        position: Token position whose prediction is read (the logits after this token).
        token: Token id that counts positive.
        other_token: Token id that counts negative.
    """

    position: int
    token: int
    other_token: int

    def __call__(
        self, logits: Float[Tensor, "batch token vocabulary"], tokens: Int[Tensor, "batch token"]
    ) -> Float[Tensor, ""]:
        """The difference, for a batch of one."""
        row = logits[0, self.position]
        return row[self.token] - row[self.other_token]


def token_nll(
    logits: Float[Tensor, "target vocabulary"], tokens: Int[Tensor, " target"]
) -> Float[Tensor, " target"]:
    """Negative log-likelihood of each token, in nats and at least float32."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(precise, tokens, reduction="none")


def token_log_odds(
    logits: Float[Tensor, "target vocabulary"], tokens: Int[Tensor, " target"]
) -> Float[Tensor, " target"]:
    """`-log(p / (1 - p))` of each token: logsumexp of all other logits minus its own, in at least float32.

    No probability is formed, so a token that the model is sure of keeps its value and its gradient.
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = tokens[:, None]
    others = precise.scatter(-1, own, float("-inf")).logsumexp(-1)
    return others - precise.gather(-1, own)[:, 0]


ObjectiveLike = str | Step | tuple[int, int] | LogitDifference | Callable[..., Any]


#: Objectives whose rows each have a loss of their own.
_TOKEN_LOSSES = {"per_token": token_nll, "log_odds": token_log_odds}
#: Every objective that has a name of its own on every trace.
OBJECTIVES = (*_TOKEN_LOSSES, *_SEGMENT_OBJECTIVES)


@dataclass(frozen=True)
class Objective:
    """A resolved objective.

    Attributes:
        name: What goes into the provenance.
        targets: Positions u >= 1 whose loss counts, or None for a callable on logits.
        per_token: Whether each row keeps its own loss (the sum is then the scalar handed to autograd).
        function: The callable on `(logits, tokens)`, where `targets` is None.
        token_loss: Loss of each target, of its logits and token id.
    """

    name: str
    targets: Int[Tensor, " target"] | None
    per_token: bool = False
    function: Callable[..., Any] | None = None
    token_loss: Callable[[Tensor, Tensor], Tensor] = token_nll

    def loss(
        self, logits: Float[Tensor, "1 token vocabulary"], tokens: Int[Tensor, "1 token"]
    ) -> Float[Tensor, ""]:
        """The scalar handed to autograd, in nats for all but callables.

        Raises:
            ObjectiveError: If a callable does not return one differentiable number.
        """
        value = self.measure(logits, tokens)
        if self.targets is None and not value.requires_grad:
            raise ObjectiveError(
                f"objective {self.name!r} does not depend on the logits it was given, so it has no gradient: "
                "compute it from `logits` without detach() or item()"
            )
        return value

    def measure(
        self, logits: Float[Tensor, "1 token vocabulary"], tokens: Int[Tensor, "1 token"]
    ) -> Float[Tensor, ""]:
        """The same scalar where no gradient is wanted.

        Raises:
            ObjectiveError: If a callable does not return one number.
        """
        if self.function is not None:
            value = self.function(logits, tokens)
            if not isinstance(value, Tensor) or value.numel() != 1:
                is_tensor = isinstance(value, Tensor)
                found = f"a tensor of shape {tuple(value.shape)}" if is_tensor else type(value).__name__
                raise ObjectiveError(f"objective {self.name!r} returned {found}: expected a scalar tensor")
            return value.reshape(())
        assert self.targets is not None
        targets = self.targets.to(logits.device)
        losses = self.token_loss(logits[0, targets - 1], tokens[0, targets])
        return losses.sum() if self.per_token else losses.mean()

    def residual_gradient(
        self,
        residual: Float[Tensor, "1 token d_model"],
        tokens: Int[Tensor, "1 token"],
        unembed: Callable[[Tensor], Tensor],
        *,
        rows: int | None,
    ) -> Float[Tensor, "1 token d_model"] | None:
        """Derivative of the loss by the final residual; None where it does not depend on it.

        Args:
            residual: The final residual, detached.
            tokens: The trace's token ids.
            unembed: Logits `[1, row, vocabulary]` of rows of the residual; norm and unembedding work on each
                row by itself.
            rows: How many rows are unembedded at a time; None for the whole trace at once, as a callable
                always is.

        Memory: one chunk of logits, `rows * vocabulary`.
        """
        if self.targets is None or rows is None:
            leaf = residual.clone().requires_grad_(True)
            loss = self.loss(unembed(leaf), tokens.to(residual.device))
            return torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
        gradient = torch.zeros_like(residual)
        weight = 1.0 if self.per_token else 1.0 / len(self.targets)
        for targets in self.targets.to(residual.device).split(rows):
            leaf = residual[:, targets - 1].requires_grad_(True)
            logits = unembed(leaf)
            losses = self.token_loss(logits[0], tokens[0, targets.to(tokens.device)].to(logits.device))
            del logits
            gradient[:, targets - 1] = torch.autograd.grad(losses.sum() * weight, leaf)[0]
            del losses
        return gradient


def resolve_objective(objective: Any, trace: ReasoningTrace) -> Objective:
    """Turn a name, step, span or callable into an `Objective` for this trace.

    Raises:
        ObjectiveError: If the name is unknown, a step or span is not in the trace, or no token is touched.
    """
    if isinstance(objective, str):
        return _resolve_name(objective, trace)
    if isinstance(objective, Step):
        if objective not in trace.steps:
            raise ObjectiveError(f"step {objective.label!r} is not a step of this trace")
        return _span_objective(objective.label, *objective.token_span)
    if isinstance(objective, tuple):
        return _resolve_span(objective, trace)
    if isinstance(objective, LogitDifference):
        if not 0 <= objective.position < len(trace):
            raise ObjectiveError(f"position {objective.position} leaves the trace's [0, {len(trace)})")
        name = f"logit_difference({objective.position}: {objective.token} - {objective.other_token})"
        return Objective(name, None, function=objective)
    if callable(objective):
        return Objective(getattr(objective, "__qualname__", repr(objective)), None, function=objective)
    raise ObjectiveError(
        f"objective {objective!r} is a {type(objective).__name__}: expected a name, a Step, a token span "
        "(start, end), a LogitDifference or a callable (logits, tokens) -> scalar"
    )


def _resolve_name(name: str, trace: ReasoningTrace) -> Objective:
    if name in _TOKEN_LOSSES:
        if len(trace) < 2:
            raise ObjectiveError(
                "a trace of one token has no next token, so no loss: give at least two tokens"
            )
        loss = _TOKEN_LOSSES[name]
        return Objective(name, torch.arange(1, len(trace)), per_token=True, token_loss=loss)
    if name in _SEGMENT_OBJECTIVES:
        segments = _SEGMENT_OBJECTIVES[name]
        touched = torch.isin(trace.segment_ids, torch.tensor([int(segment) for segment in segments]))
        touched[0] = False  # nothing predicts the first token
        if not touched.any():
            wanted = " or ".join(segment.name.lower() for segment in segments)
            present = ", ".join(Segment(int(i)).name.lower() for i in trace.segment_ids.unique())
            raise ObjectiveError(
                f"objective {name!r} touches no token: the trace has no {wanted} token. Its segments are "
                f"{present}; choose an objective over those, or mend the trace."
            )
        return Objective(name, touched.nonzero()[:, 0])
    for step in trace.steps:
        if step.label == name:
            return _span_objective(name, *step.token_span)
    labels = ", ".join(step.label for step in trace.steps)
    raise ObjectiveError(
        f"unknown objective {name!r}: expected {', '.join(map(repr, OBJECTIVES))}, or a step label of this "
        f"trace ({labels})"
    )


def _resolve_span(span: tuple[Any, ...], trace: ReasoningTrace) -> Objective:
    if len(span) != 2 or not all(isinstance(edge, int) for edge in span):
        raise ObjectiveError(f"token span {span!r}: expected (start, end), two integers, half-open")
    start, end = span
    if not 0 <= start < end <= len(trace):
        raise ObjectiveError(f"token span [{start}, {end}) is empty or leaves the trace's [0, {len(trace)})")
    return _span_objective(f"tokens[{start}:{end}]", start, end)


def _span_objective(name: str, start: int, end: int) -> Objective:
    targets = torch.arange(max(start, 1), end)
    if not len(targets):
        raise ObjectiveError(f"objective {name!r} covers only the first token, which nothing predicts")
    return Objective(name, targets)
