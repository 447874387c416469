"""Numbers for one step map (`diagnose`) and for two groups of them (`compare`); docs/method.md section 5."""

from stepflow_tl.diagnosis.band_choice import BandChoice as BandChoice
from stepflow_tl.diagnosis.band_choice import choose_bands as choose_bands
from stepflow_tl.diagnosis.comparison import compare as compare
from stepflow_tl.diagnosis.comparison import compare_groups as compare_groups
from stepflow_tl.diagnosis.comparison_result import Comparison as Comparison
from stepflow_tl.diagnosis.comparison_result import PairMatching as PairMatching
from stepflow_tl.diagnosis.diagnosis import Diagnosis as Diagnosis
from stepflow_tl.diagnosis.diagnosis import diagnose as diagnose
from stepflow_tl.diagnosis.groups import DEFAULT_PAIR_FIELD as DEFAULT_PAIR_FIELD
from stepflow_tl.diagnosis.groups import left_out as left_out
from stepflow_tl.diagnosis.groups import pairing_field as pairing_field
from stepflow_tl.diagnosis.layer_metrics import HEADLINE as HEADLINE
from stepflow_tl.diagnosis.layer_metrics import LAYER_METRICS as LAYER_METRICS
from stepflow_tl.diagnosis.layer_metrics import Band as Band
from stepflow_tl.diagnosis.layer_metrics import LayerMetric as LayerMetric
from stepflow_tl.diagnosis.shares import row_shares as row_shares
from stepflow_tl.statistics.effects import Effect as Effect
