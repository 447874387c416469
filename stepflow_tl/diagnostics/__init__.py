"""Numbers for one step map (`diagnose`) and for two groups of them (`compare`); docs/method.md section 5."""

from stepflow_tl.diagnostics.band_choice import BandChoice as BandChoice
from stepflow_tl.diagnostics.band_choice import choose_bands as choose_bands
from stepflow_tl.diagnostics.comparison import Comparison as Comparison
from stepflow_tl.diagnostics.comparison import compare as compare
from stepflow_tl.diagnostics.diagnosis import HEADLINE as HEADLINE
from stepflow_tl.diagnostics.diagnosis import LAYER_METRICS as LAYER_METRICS
from stepflow_tl.diagnostics.diagnosis import Diagnosis as Diagnosis
from stepflow_tl.diagnostics.effects import Effect as Effect
from stepflow_tl.diagnostics.measures import row_shares as row_shares
from stepflow_tl.diagnostics.measures import step_segments as step_segments
from stepflow_tl.diagnostics.single_trace import diagnose as diagnose
