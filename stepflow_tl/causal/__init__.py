"""The causal check: what happens to a step when it may no longer read another one."""

from stepflow_tl.causal.knockout import step_knockout as step_knockout
from stepflow_tl.causal.knockout_result import StepKnockout as StepKnockout
