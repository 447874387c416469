"""`stepflow-tl summarize`: the numbers of a run folder, printed, and written as one Parquet table."""

from dataclasses import dataclass
from pathlib import Path

from stepflow_tl.cli.console import say
from stepflow_tl.diagnosis import DEFAULT_PAIR_FIELD
from stepflow_tl.errors import InputFileError
from stepflow_tl.runs import summarize
from stepflow_tl.runs.records import Record
from stepflow_tl.runs.sources import read_records
from stepflow_tl.runs.summary import Labels

TABLE_NAME = "layers.parquet"


@dataclass(frozen=True)
class SummarizeOptions:
    """The command line, checked; see `stepflow-tl summarize --help`."""

    folder: Path
    out: Path | None = None
    group_by: str | None = None
    pair_by: str | None = None
    unpaired: bool = False
    labels: Path | None = None
    verify: bool = False


def run_summarize(options: SummarizeOptions) -> int:
    """Summarise, print and return the exit code.

    Raises:
        InputFileError: If the labels cannot be read.
        ResultFileError: If the folder cannot be summarised.
        MissingExtraError: If pyarrow is not installed.
    """
    aggregate = summarize(
        options.folder,
        out=options.out or options.folder / TABLE_NAME,
        group_by=options.group_by,
        pair_by=options.pair_by,
        unpaired=options.unpaired,
        labels=None if options.labels is None else _labels(options.labels, options),
        verify=options.verify,
    )
    print(aggregate)
    if aggregate.comparison is not None:
        print(f"\n{aggregate.comparison}")
    if aggregate.comparison is not None or options.group_by is not None:
        for note in aggregate.notes:
            print(note)
    print(f"\nwritten:\n  {aggregate.parquet}")
    is_compared = options.group_by is None or aggregate.comparison is not None
    return 0 if aggregate.is_whole and is_compared else 1


def _labels(path: Path, options: SummarizeOptions) -> Labels:
    pair_by = options.pair_by or DEFAULT_PAIR_FIELD
    labels: dict[str, tuple[bool | None, str | None]] = {}
    for record in read_records(path, group_by=options.group_by, pair_by=pair_by):
        if not isinstance(record, Record):
            say(f"{path}, line {record.line}: {record.reason}; left out")
            continue
        if record.id in labels:
            raise InputFileError(
                f"{path}, line {record.line}: the id {record.id!r} occurs twice; ids must differ"
            )
        labels[record.id] = (record.group, record.pair)
    return labels
