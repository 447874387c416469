"""Where the traces of a data set come from: JSON lines, Parquet, a Hugging Face data set saved on disk.

1. A folder that `datasets` wrote is a saved data set; a `.parquet` file, or a folder of them, is Parquet;
   anything else is a file of JSON lines.
2. Every kind is streamed, and its rows go through the same field rules (`records`) with the same messages.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from stepflow_tl.errors import InputFileError
from stepflow_tl.runs.arrow_tables import ParquetFiles, SavedDataset, is_saved_dataset
from stepflow_tl.runs.json_lines import JsonLines
from stepflow_tl.runs.records import FIELDS, Record, Unit, Unreadable, record_of


@runtime_checkable
class Source(Protocol):
    """A file or folder of rows."""

    unit: Unit
    path: Path

    def count(self, limit: int | None = None) -> int:
        """How many rows there are."""
        ...

    def rows(
        self, columns: Sequence[str], limit: int | None = None
    ) -> Iterator[tuple[int, Mapping[str, Any] | InputFileError]]:
        """Number and fields of each row, or what is wrong with it."""
        ...


def open_source(path: Path) -> Source:
    """The source at `path`.

    Raises:
        InputFileError: If there is nothing that can be read.
        MissingExtraError: If a package that reads it is not installed.
    """
    if path.is_dir() and is_saved_dataset(path):
        return SavedDataset(path)
    if path.is_dir() and any(path.glob("*.parquet")):
        return ParquetFiles(path)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return ParquetFiles(path)
    return JsonLines(path)


def read_records(
    source: Source | Path,
    *,
    group_by: str | None = None,
    pair_by: str | None = None,
    limit: int | None = None,
) -> Iterator[Record | Unreadable]:
    """The records of a source in order; at most the first `limit` rows.

    Raises:
        InputFileError: If the source cannot be opened or read.
        MissingExtraError: If a package that reads it is not installed.
    """
    opened = open_source(source) if isinstance(source, Path) else source
    columns = dict.fromkeys(name for name in (*FIELDS, group_by, pair_by) if name is not None)
    for number, row in opened.rows(list(columns), limit):
        try:
            if isinstance(row, InputFileError):
                raise row
            yield record_of(row, number, group_by, pair_by, opened.unit)
        except InputFileError as error:
            yield Unreadable(number, str(error), opened.unit)


def count_records(source: Source | Path, limit: int | None = None) -> int:
    """Rows that `read_records` would yield, without parsing them.

    Raises:
        InputFileError: If the source cannot be opened or read.
        MissingExtraError: If a package that reads it is not installed.
    """
    return (open_source(source) if isinstance(source, Path) else source).count(limit)
