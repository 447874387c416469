"""What is compared: the plain model, StepFlow, each half of it, and a control of equal size for each.

A difference to the plain model says that something changed; only a difference to the control says that it was
the bridge's region or the momentum's direction that changed it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from stepflow_tl.stepflow.flow import StepFlow

PLAIN = "plain"
CONTROL_OF = {"bridge": "bridge control", "momentum": "momentum control", "StepFlow": "StepFlow control"}


def standard_conditions(flow: StepFlow | None = None) -> dict[str, StepFlow | None]:
    """The seven conditions around one StepFlow, the paper's by default.

    Args:
        flow: Strengths, bands and the rest, with both halves on.

    Returns:
        By name: None for the plain model, else what is put on it.

    Raises:
        ValueError: If a half of `flow` is off, or it is a control itself.
    """
    flow = StepFlow() if flow is None else flow
    if not flow.tau_max or not flow.alpha or flow.placebo is not None:
        raise ValueError(f"{flow!r}: expected both halves on and placebo=None; the halves are made from it")
    return {
        PLAIN: None,
        "bridge": replace(flow, alpha=0),
        "momentum": replace(flow, tau_max=0),
        "StepFlow": flow,
        "bridge control": replace(flow, alpha=0, placebo="bridge"),
        "momentum control": replace(flow, tau_max=0, placebo="momentum"),
        "StepFlow control": replace(flow, placebo="both"),
    }


def controls(names: Iterable[str]) -> dict[str, str]:
    """The control of each of these conditions that has one among them."""
    present = set(names)
    return {name: control for name, control in CONTROL_OF.items() if {name, control} <= present}
