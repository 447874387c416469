"""StepFlow: repairing the flow between steps, as composable hooks.

The names are imported on first use (PEP 562): `runs.flow_options`, which the command line is built from,
names `StepFlow` without loading torch.
"""

from typing import TYPE_CHECKING

from stepflow_tl.lazy import lazy_face

if TYPE_CHECKING:
    from stepflow_tl.stepflow.bridge import bridge_hook as bridge_hook
    from stepflow_tl.stepflow.bridge import bridge_pattern_hook as bridge_pattern_hook
    from stepflow_tl.stepflow.flow import StepFlow as StepFlow
    from stepflow_tl.stepflow.momentum import capture_values_hook as capture_values_hook
    from stepflow_tl.stepflow.momentum import momentum_hook as momentum_hook
    from stepflow_tl.stepflow.planting import PlantedFlow as PlantedFlow
    from stepflow_tl.stepflow.planting import plant_decay as plant_decay
    from stepflow_tl.stepflow.planting import plant_lock_in as plant_lock_in
    from stepflow_tl.stepflow.report import FlowHooks as FlowHooks
    from stepflow_tl.stepflow.report import FlowReport as FlowReport
    from stepflow_tl.stepflow.report import LayerReport as LayerReport
    from stepflow_tl.stepflow.state import FlowState as FlowState
    from stepflow_tl.stepflow.streaming import FlowRun as FlowRun

__getattr__, __dir__, __all__ = lazy_face(__name__)
