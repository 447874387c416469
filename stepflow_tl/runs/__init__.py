"""Runs over whole data sets: streamed, sharded, resumable after a kill at any moment.

The flow goes one way: `sources` -> `plan` -> `worker` -> `manifest` -> `report`, driven by `run`.
"""

from stepflow_tl.runs.manifest import manifest_path as manifest_path
from stepflow_tl.runs.plan import Shard as Shard
from stepflow_tl.runs.report import DatasetReport as DatasetReport
from stepflow_tl.runs.run import Watcher as Watcher
from stepflow_tl.runs.run import analyze_dataset as analyze_dataset
from stepflow_tl.runs.summary import Aggregate as Aggregate
from stepflow_tl.runs.summary import summarize as summarize
