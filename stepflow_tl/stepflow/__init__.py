"""StepFlow: repairing the flow between steps, as composable hooks.

The names are imported on first use (PEP 562): `runs.flow_options`, which the command line is built from,
names `StepFlow` without loading torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepflow_tl.stepflow.bridge import bridge_hook as bridge_hook
    from stepflow_tl.stepflow.bridge import bridge_pattern_hook as bridge_pattern_hook
    from stepflow_tl.stepflow.flow import FlowHooks as FlowHooks
    from stepflow_tl.stepflow.flow import FlowRun as FlowRun
    from stepflow_tl.stepflow.flow import StepFlow as StepFlow
    from stepflow_tl.stepflow.momentum import capture_values_hook as capture_values_hook
    from stepflow_tl.stepflow.momentum import momentum_hook as momentum_hook
    from stepflow_tl.stepflow.report import FlowReport as FlowReport
    from stepflow_tl.stepflow.report import LayerReport as LayerReport
    from stepflow_tl.stepflow.state import FlowState as FlowState

_HOME_OF = {
    "FlowHooks": "stepflow_tl.stepflow.flow",
    "FlowReport": "stepflow_tl.stepflow.report",
    "FlowRun": "stepflow_tl.stepflow.flow",
    "FlowState": "stepflow_tl.stepflow.state",
    "LayerReport": "stepflow_tl.stepflow.report",
    "StepFlow": "stepflow_tl.stepflow.flow",
    "bridge_hook": "stepflow_tl.stepflow.bridge",
    "bridge_pattern_hook": "stepflow_tl.stepflow.bridge",
    "capture_values_hook": "stepflow_tl.stepflow.momentum",
    "momentum_hook": "stepflow_tl.stepflow.momentum",
}

__all__ = [
    "FlowHooks",
    "FlowReport",
    "FlowRun",
    "FlowState",
    "LayerReport",
    "StepFlow",
    "bridge_hook",
    "bridge_pattern_hook",
    "capture_values_hook",
    "momentum_hook",
]


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
