"""Hooks that stay on for a whole measurement: the caller's own, and StepFlow's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stepflow_tl.models.passes import NamedHook
from stepflow_tl.stepflow.flow import StepFlow
from stepflow_tl.trace import ReasoningTrace

FwdHooks = Sequence[NamedHook] | Callable[[ReasoningTrace], Sequence[NamedHook]]
"""Hooks that stay on for a whole measurement: (name, hook) pairs, or a function from the trace to them."""


def standing_notes(stepflow: StepFlow | None, fwd_hooks: FwdHooks) -> dict[str, str]:
    """What stays on, in words for a result's provenance; nothing where nothing does."""
    notes = {} if stepflow is None else {"stepflow": repr(stepflow)}
    if stepflow is not None and stepflow.placebo is not None:
        notes["placebo"] = str(stepflow.placebo)
    if callable(fwd_hooks):
        notes["fwd_hooks"] = "made for each trace"
    elif fwd_hooks:
        notes["fwd_hooks"] = ", ".join(dict.fromkeys(name for name, _ in fwd_hooks))
    return notes


def standing_hooks(
    model: Any,
    trace: ReasoningTrace,
    *,
    stepflow: StepFlow | None = None,
    fwd_hooks: FwdHooks = (),
    detach_values: bool = False,
) -> list[NamedHook]:
    """The hooks under which a pass over `trace` is measured: the caller's own, then those of StepFlow.

    Arguments and errors as in `StepFlow.hooks`.
    """
    own = list(fwd_hooks(trace) if callable(fwd_hooks) else fwd_hooks)
    return own if stepflow is None else own + stepflow.hooks(model, trace, detach_values=detach_values)
