"""`stepflow-tl compare-runs`: runs of lm-evaluation-harness or Inspect, paired question by question."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepflow_tl.cli.arguments import add_command, checked
from stepflow_tl.errors import InputFileError

_EPILOG = """\
input: two or three runs on the same questions, the plain one first, each NAME=PATH: a samples_*.jsonl of
lm-eval --log_samples, a log of Inspect, or a folder with those of one run. A name that comes several times
has several runs of the same questions (seeds): plain=out/plain/{0,1,2} in bash. Their scores are averaged.

output: share of right answers, paired differences to the first run (and of the second to the third: a repair
to its control) with intervals and McNemar's test, also by subject. --traces writes the answers as JSON lines
that `stepflow-tl analyze FILE --group-by is_correct --where condition=NAME` reads. Of a harness run with
think_end_token the thinking is gone: leave that option out where maps are wanted.

example:
  stepflow-tl compare-runs plain=out/plain StepFlow=out/stepflow control=out/control --filter flexible-extract
"""


@checked
def named_path(text: str) -> tuple[str, Path]:
    """NAME=PATH."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"{text!r} is not NAME=PATH, such as plain=out/plain")
    return name, Path(path)


def add_compare_runs(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    summary = "runs of lm-evaluation-harness or Inspect, paired question by question"
    command = add_command(commands, "compare-runs", summary, _run, _EPILOG)
    add = command.add_argument
    add("runs", type=named_path, nargs="+", metavar="NAME=PATH", help="the runs, the plain one first")
    add("--metric", metavar="NAME", help="metric (lm-eval) or scorer (Inspect) that counts (the first)")
    add("--filter", metavar="NAME", help="lm-eval's filter, where there are several")
    add(
        "--subject",
        metavar="FIELD",
        help="field of the question by which scores are reported apart (the task)",
    )
    add("--out", type=Path, metavar="FILE.json", help="scores and differences")
    add("--traces", type=Path, metavar="FILE.jsonl", help="the answers, for analyze")
    add("--seed", type=int, default=0, help="of the resampling (0)")


def _run(arguments: argparse.Namespace) -> int:
    from stepflow_tl.engines.run_comparison import RunComparison, trace_lines
    from stepflow_tl.engines.run_samples import Reading, RunSample, read_samples
    from stepflow_tl.results.files import write_atomically

    paths = [path.resolve() for _, path in arguments.runs]
    if len(set(paths)) < len(paths):
        raise InputFileError(f"{', '.join(map(str, paths))}: these runs must differ")
    reading = Reading(arguments.metric, arguments.filter, arguments.subject)
    runs: dict[str, list[RunSample]] = {}
    for name, path in arguments.runs:
        runs.setdefault(name, []).extend(read_samples(path, reading))
    found = RunComparison.of(runs, arguments.seed)
    print(found.table())
    if arguments.out is not None:
        write_atomically(arguments.out, f"{found.to_json()}\n".encode())
    if arguments.traces is not None:
        write_atomically(arguments.traces, "".join(trace_lines(runs)).encode())
    return 0
