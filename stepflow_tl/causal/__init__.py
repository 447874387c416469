"""Causal checks of step maps: what changes when an edge of the flow is cut or an activation is replaced."""

from stepflow_tl.causal.attribution import effect_agreement as effect_agreement
from stepflow_tl.causal.knockout import step_knockout as step_knockout
from stepflow_tl.causal.knockout_result import StepKnockout as StepKnockout
from stepflow_tl.causal.linearity import linearity_check as linearity_check
from stepflow_tl.causal.patching import attribution_patching as attribution_patching
from stepflow_tl.causal.patching import step_patching as step_patching
from stepflow_tl.causal.patching_result import StepPatching as StepPatching
from stepflow_tl.causal.spot_check import SpotCheck as SpotCheck
from stepflow_tl.causal.spot_check import spot_check as spot_check
from stepflow_tl.causal.spot_check import spot_pairs as spot_pairs
