"""Numbers for one step map (`diagnose`) and for two groups of them (`compare`); docs/method.md section 5."""

from stepflow_tl.diagnosis.band_choice import BandChoice as BandChoice
from stepflow_tl.diagnosis.band_choice import choose_bands as choose_bands
from stepflow_tl.diagnosis.comparison import Comparison as Comparison
from stepflow_tl.diagnosis.comparison import compare as compare
from stepflow_tl.diagnosis.diagnosis import HEADLINE as HEADLINE
from stepflow_tl.diagnosis.diagnosis import LAYER_METRICS as LAYER_METRICS
from stepflow_tl.diagnosis.diagnosis import Diagnosis as Diagnosis
from stepflow_tl.diagnosis.measures import row_shares as row_shares
from stepflow_tl.diagnosis.measures import step_segments as step_segments
from stepflow_tl.diagnosis.single_trace import diagnose as diagnose
from stepflow_tl.statistics.effects import Effect as Effect
