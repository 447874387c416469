"""`stepflow-tl analyze`: the command line of `analyze_dataset`.

The work is `stepflow_tl.runs`'s; here arguments go in, and progress, tables and the exit code come out: 0
if every row has a result, 1 if something failed or the disk is full, 130 after Ctrl-C. What stops the run
before it starts is an exception.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stepflow_tl import runs
from stepflow_tl.cli.arguments import DEFAULT_MODEL, add_command, add_options, add_weights, options_of
from stepflow_tl.cli.console import Progress, Watcher, say
from stepflow_tl.runs.flow_options import FlowOptions
from stepflow_tl.runs.options import RunOptions

_EPILOG = """\
input: a file with one JSON object per line, a Parquet file or a folder of them, or a data set that Hugging
Face `datasets` saved on disk (Parquet and data sets need the extra "datasets"), with the fields
  id          name of the result file (optional)
  question, thinking, summary
              the parts of the trace (summary may be missing)
  text        or, in place of the parts, the full transcript with its markers
  tokens      or its token ids, which come before all others
  any other   left alone, unless --where, --group-by or --pair-by names it
or the answers that `evaluate --out DIR` wrote: DIR, or one of its answers*.jsonl. They are read from their
tokens; fields: id, question_id, sample, condition, difficulty, right, finished, new_tokens and others.

example line:
  {"id": "q1", "question": "2+2*3?", "thinking": "2*3 = 6.\\n\\n2+6 = 8.", "summary": "8", "is_correct": true}

output, in the folder --out: one .safetensors per trace (StepSaliency.load reads it), manifest.jsonl (what is
done, what failed and why), summary.csv, and with --group-by comparison.txt and comparison.json. With --causal
also knockout/ with one .safetensors per trace (StepKnockout.load reads it), agreement.csv and agreement.json;
--causal screened costs less on long traces, and compares only the pairs that Step-Saliency ranks first.

A model's own right answers against its own wrong ones, then of the same questions, then under StepFlow:
  stepflow-tl analyze answers --out maps --where condition=plain --group-by right
  stepflow-tl analyze answers --out maps --where condition=plain --group-by right --pair-by question_id
  stepflow-tl analyze answers --out repaired --where condition=plain --group-by right --stepflow

A run that was killed goes on where it was when the same command is given again. Several runs may share
a folder:
  sbatch --array=0-7 ... stepflow-tl analyze traces.jsonl --out results --shard $SLURM_ARRAY_TASK_ID/8

exit code: 0 every line has a result; 1 something failed or the disk is full, the rest is done; 2 the run
could not start; 130 after Ctrl-C.
"""


def add_analyze(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    summary = "Step-Saliency of every trace of a data set"
    command = add_command(commands, "analyze", summary, _run, _EPILOG)
    add = command.add_argument
    add("traces", type=Path, metavar="TRACES", help="the traces: JSON lines, Parquet, or a saved data set")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME_OR_PATH",
        help=f"{DEFAULT_MODEL} (the embedded model, the default), a Hugging Face name, or a model folder",
    )
    add_options(command, RunOptions)
    flow = command.add_argument_group("StepFlow")
    flow.add_argument("--stepflow", action="store_true", help=RunOptions.helps().get("stepflow"))
    add_options(flow, FlowOptions)
    add_weights(command)


def _run(arguments: argparse.Namespace) -> int:
    from stepflow_tl.cli.device import load

    options, flow = options_of(arguments, RunOptions), options_of(arguments, FlowOptions)
    if arguments.stepflow:
        options = replace(options, stepflow=flow.flow())
    elif flow != FlowOptions():
        print("stepflow-tl: error: the options of StepFlow go with --stepflow", file=sys.stderr)
        return 2
    needs_groups = options.pair_by is not None or options.unpaired or options.match_on is not None
    if options.group_by is None and needs_groups:
        print("stepflow-tl: error: --pair-by, --unpaired and --match go with --group-by", file=sys.stderr)
        return 2
    place = arguments.device, arguments.dtype, arguments.device_map
    watcher = _Terminal(arguments.traces, arguments.out, options)
    try:
        report = runs.analyze_dataset(
            partial(load, arguments.model, *place),
            arguments.traces,
            arguments.out,
            watcher=watcher,
            **vars(options),
        )
    finally:
        watcher.close()
    _print(options, report)
    return 130 if report.stopped == "interrupted" else 0 if report.is_complete else 1


class _Terminal(Watcher):
    """Progress of the run on stderr."""

    def __init__(self, traces: Path, out: Path, options: RunOptions) -> None:
        super().__init__()
        self._traces, self._out, self._options = traces, out, options

    def begin(self, total: int, settings: Any, replicas: int) -> None:
        part = "" if self._options.shard is None else f", shard {self._options.shard}"
        where = "" if self._options.engine == "local" else f", {replicas} replicas by {self._options.engine}"
        traces = f"{total} traces from {self._traces}{part}"
        say(f"{traces}, model {settings.model_name}{where}, results in {self._out}")
        self.progress = Progress(total, replicas)


def _print(options: RunOptions, report: runs.DatasetReport) -> None:
    print(report)
    if report.agreement is not None:
        print(f"\n{report.agreement}")
    for problem in report.problems:
        say(problem)
    if report.comparison is not None:
        pairing = "" if report.paired_by is None else f", paired by {report.paired_by}"
        print(f"\nBy {options.group_by}{pairing}\n{report.comparison}", *report.notes, sep="\n")
    if options.shard is not None and (options.group_by is not None or options.causal):
        print("\nOne shard is compared with nothing: stepflow-tl summarize reads all of them together.")
    if report.written:
        print("\nwritten:", *map(str, report.written), sep="\n  ")
