"""Step-Saliency: which earlier steps each step draws on, per layer and head."""

from stepflow_tl.saliency.objectives import LogitDifference as LogitDifference
from stepflow_tl.saliency.result import StepSaliency as StepSaliency
from stepflow_tl.saliency.run import step_saliency as step_saliency
