"""Numbers over the folder of a run: one table of every trace and layer, band means, two groups compared."""

from stepflow_tl.aggregates.summary import Aggregate as Aggregate
from stepflow_tl.aggregates.summary import summarize as summarize
