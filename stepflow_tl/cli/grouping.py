"""The comparison of two groups, where the command line used to keep it; see `diagnostics.grouping`."""

from stepflow_tl.diagnostics.grouping import DEFAULT_PAIR_FIELD as DEFAULT_PAIR_FIELD
from stepflow_tl.diagnostics.grouping import compare_groups as compare_groups
from stepflow_tl.diagnostics.grouping import pairing_field as pairing_field
