"""Runs over whole data sets: streamed, sharded, resumable after a kill at any moment.

One JSON line passes these modules from `stepflow-tl analyze` to its result file:

1. `cli.main`, `cli.analyze`: the command; its options are declared in `runs.options`.
2. `runs.run`: the driver.
3. `runs.row_files`, `runs.records`: the line becomes a `Record`.
4. `runs.plan`: a `Task`, with its place in the order and its file name.
5. `runs.engines`, `runs.worker`: the task at a model. `trace.assembly` builds its trace, `saliency.run` its
   map, `saliency.result` and `results.files` write it.

Then what became of it goes into `runs.manifest` (a `results.journal`), and all traces of the folder together
into `runs.summary`.

Answers come by the same stairs: `cli.evaluate`, `runs.answer_options`, then `runs.answers` (the driver), the
engines, `runs.answer_worker`, and the ledger `runs.answer_file`. `runs.study_run` does both and reports.

The public names are imported on first use (PEP 562), so that the command line can read `runs.options` alone.
"""

from typing import TYPE_CHECKING

from stepflow_tl.lazy import lazy_face

if TYPE_CHECKING:
    from stepflow_tl.runs.aggregate import Aggregate as Aggregate
    from stepflow_tl.runs.aggregate import DatasetReport as DatasetReport
    from stepflow_tl.runs.answer_file import read_answers as read_answers
    from stepflow_tl.runs.answer_options import AnswerOptions as AnswerOptions
    from stepflow_tl.runs.answer_options import StudyOptions as StudyOptions
    from stepflow_tl.runs.answers import AnswerWatcher as AnswerWatcher
    from stepflow_tl.runs.answers import evaluate as evaluate
    from stepflow_tl.runs.flow_options import FlowOptions as FlowOptions
    from stepflow_tl.runs.manifest import manifest_path as manifest_path
    from stepflow_tl.runs.options import RunOptions as RunOptions
    from stepflow_tl.runs.options import Shard as Shard
    from stepflow_tl.runs.options import SummaryOptions as SummaryOptions
    from stepflow_tl.runs.run import Watcher as Watcher
    from stepflow_tl.runs.run import analyze_dataset as analyze_dataset
    from stepflow_tl.runs.study_run import StudyReport as StudyReport
    from stepflow_tl.runs.study_run import study as study
    from stepflow_tl.runs.study_stages import StudyWatcher as StudyWatcher
    from stepflow_tl.runs.summary import summarize as summarize

__getattr__, __dir__, __all__ = lazy_face(__name__)
