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
    "FlowHooks": "flow",
    "FlowReport": "report",
    "FlowRun": "flow",
    "FlowState": "state",
    "LayerReport": "report",
    "StepFlow": "flow",
    "bridge_hook": "bridge",
    "bridge_pattern_hook": "bridge",
    "capture_values_hook": "momentum",
    "momentum_hook": "momentum",
}

__all__ = list(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        public = ", ".join(__all__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {public}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
