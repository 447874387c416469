"""The trace: tokens, segments and steps, and how a text or its parts become one."""

from stepflow_tl.trace.reasoning_trace import ReasoningTrace as ReasoningTrace
from stepflow_tl.trace.steps import Segment as Segment
from stepflow_tl.trace.steps import Step as Step
