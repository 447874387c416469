"""`stepflow-tl summarize`: the numbers of a run folder, printed, and written as one Parquet table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stepflow_tl import runs
from stepflow_tl.cli.arguments import add_command, add_options, options_of
from stepflow_tl.cli.console import say
from stepflow_tl.errors import InputFileError
from stepflow_tl.runs.options import SummaryOptions

TABLE_NAME = "layers.parquet"

_EPILOG = """\
input: a folder that `analyze --out` wrote (its manifests say what is in it), or any folder of
StepSaliency.save files of one analysis.

output: band means with intervals, what is missing and why, and the comparison of two groups where the traces
have groups; and a Parquet table, one row per trace and layer: id, group, pair, n_tokens, numbers of steps,
layer, every metric, model, objective, dtype, backend.

groups and pairs are those of the run; --group-by and --pair-by must name its fields, unless --labels brings
others.

exit code: 0 done; 1 a result is missing or damaged, or the comparison asked for cannot be made, the rest is
done; 2 it could not start.
"""


def add_summarize(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    summary = "the numbers of a whole run: band means, the comparison of two groups, one Parquet table"
    command = add_command(commands, "summarize", summary, _run, _EPILOG)
    add = command.add_argument
    add("folder", type=Path, metavar="DIR", help="the run")
    add("--out", type=Path, metavar="FILE.parquet", help=f"the table (DIR/{TABLE_NAME})")
    add_options(command, SummaryOptions)
    add("--labels", type=Path, metavar="TRACES.jsonl", help="take groups and pairs from here, by id")


def _run(arguments: argparse.Namespace) -> int:
    options = options_of(arguments, SummaryOptions)
    if arguments.labels is not None and options.group_by is None:
        print("stepflow-tl: error: --labels goes with --group-by FIELD", file=sys.stderr)
        return 2
    aggregate = runs.summarize(
        arguments.folder,
        out=arguments.out or arguments.folder / TABLE_NAME,
        labels=None if arguments.labels is None else _labels(arguments.labels, options),
        **vars(options),
    )
    print(aggregate)
    if aggregate.agreement is not None:
        print(f"\n{aggregate.agreement}")
    if aggregate.comparison is not None:
        print(f"\n{aggregate.comparison}")
    if aggregate.comparison is not None or options.group_by is not None:
        for note in aggregate.notes:
            print(note)
    print(f"\nwritten:\n  {aggregate.parquet}")
    is_compared = options.group_by is None or aggregate.comparison is not None
    return 0 if aggregate.is_whole and is_compared else 1


def _labels(path: Path, options: SummaryOptions) -> dict[str, tuple[bool | None, str | None]]:
    from stepflow_tl.runs.records import Record, pair_field, read_records

    labels: dict[str, tuple[bool | None, str | None]] = {}
    for record in read_records(path, group_by=options.group_by, pair_by=pair_field(options)):
        if not isinstance(record, Record):
            say(f"{path}, line {record.line}: {record.reason}; left out")
            continue
        if record.id in labels:
            raise InputFileError(
                f"{path}, line {record.line}: the id {record.id!r} occurs twice; ids must differ"
            )
        labels[record.id] = (record.group, record.pair)
    return labels
