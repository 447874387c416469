"""StepFlow: repairing the flow between steps, as composable hooks."""

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
