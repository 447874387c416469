"""Files of rows: JSON lines, Parquet, Hugging Face data sets saved on disk. One batch in memory at a time.

1. A folder that `datasets` wrote is a saved data set; a `.parquet` file, or a folder of them, is Parquet;
   anything else is a file of JSON lines.
2. JSON lines: a line is cut at a newline and refused, unread, where it exceeds `MAX_LINE_BYTES`. It must be
   UTF-8 and one JSON object. Blank lines are passed over; a byte order mark before the first is allowed.
3. Parquet and saved data sets: only the columns that are asked for are read, by row group or memory-mapped.
   Rows are numbered from 1, through all files of a folder. Needs the extra `datasets` (pyarrow and datasets),
   imported when such a source is opened.

A row that cannot be read is an `InputFileError` in its place and costs no other row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, runtime_checkable

from stepflow_tl.errors import InputFileError, require
from stepflow_tl.results.journal_lines import MAX_LINE_BYTES

_ROWS_PER_BATCH = 64
_JSON_NAMES = {
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}

Unit = Literal["line", "row"]
Row = tuple[int, Mapping[str, Any] | InputFileError]
"""Number and fields of a row, or what is wrong with it."""


@runtime_checkable
class Source(Protocol):
    """A file or folder of rows."""

    unit: Unit
    path: Path
    settings: Mapping[str, Any]
    """What the file says of how its traces were made; most say nothing."""

    def count(self, limit: int | None = None) -> int:
        """How many rows there are."""
        ...

    def rows(self, columns: Sequence[str], limit: int | None = None) -> Iterator[Row]:
        """Every row in order; JSON lines give all their fields, tables the columns asked for."""
        ...


def open_source(path: Path) -> Source:
    """The source at `path`.

    Raises:
        InputFileError: If there is nothing that can be read.
        MissingExtraError: If a package that reads it is not installed.
    """
    if path.is_dir() and _is_saved_dataset(path):
        return SavedDataset(path)
    if path.is_dir() and any(path.glob("*.parquet")):
        return ParquetFiles(path)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return ParquetFiles(path)
    return JsonLines(path)


def json_name(value: object) -> str:
    """What a value is, in words that fit every kind of file."""
    return "null" if value is None else _JSON_NAMES.get(type(value), type(value).__name__)


class JsonLines:
    """The objects of a file of JSON lines."""

    unit: Unit = "line"
    settings: Mapping[str, Any] = {}

    def __init__(self, path: Path) -> None:
        """Look at the file only.

        Raises:
            InputFileError: If there is no such file.
        """
        if not path.is_file():
            what = (
                "is a folder"
                if path.is_dir()
                else "is not a regular file"
                if path.exists()
                else "does not exist"
            )
            raise InputFileError(f"{path} {what}: expected a file of JSON lines, one trace per line")
        self.path = path

    def count(self, limit: int | None = None) -> int:
        """Lines that `rows` would yield, without parsing them.

        Raises:
            InputFileError: If the file cannot be read.
        """
        return sum(1 for _ in self._lines(limit))

    def rows(self, columns: Sequence[str], limit: int | None = None) -> Iterator[Row]:
        """Number and object of each line that is not blank, or what is wrong with it; all its fields.

        Raises:
            InputFileError: If the file cannot be read.
        """
        for number, line in self._lines(limit):
            try:
                yield number, _object(line)
            except InputFileError as error:
                yield number, error

    def _lines(self, limit: int | None) -> Iterator[tuple[int, bytes | None]]:
        """Number and bytes of each line that is not blank; None for one that is too long."""
        found = 0
        try:
            with self.path.open("rb") as file:
                number = 0
                while limit is None or found < limit:
                    line = file.readline(MAX_LINE_BYTES + 1)
                    if not line:
                        return
                    number += 1
                    is_too_long = len(line) > MAX_LINE_BYTES
                    if is_too_long:
                        _skip_line(file, line)
                    elif number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.strip():
                        found += 1
                        yield number, None if is_too_long else line
        except OSError as error:
            raise InputFileError(f"cannot read {self.path}: {error.strerror or error}") from error


class ParquetFiles:
    """The rows of one Parquet file, or of the sorted `*.parquet` files of a folder."""

    unit: Unit = "row"
    settings: Mapping[str, Any] = {}

    def __init__(self, path: Path) -> None:
        """Read the footers.

        Raises:
            InputFileError: If a file is not a Parquet file.
            MissingExtraError: If pyarrow is not installed.
        """
        self.path = path
        self._files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        self._n_rows = 0
        for file in self._files:
            with self._open(file) as table:
                self._n_rows += table.metadata.num_rows

    def count(self, limit: int | None = None) -> int:
        """Rows, from the footers alone."""
        return self._n_rows if limit is None else min(limit, self._n_rows)

    def rows(self, columns: Sequence[str], limit: int | None = None) -> Iterator[Row]:
        """Number and fields of each row, or what is wrong with it.

        Raises:
            InputFileError: If a file cannot be read on.
        """
        return islice(self._rows(columns), limit)

    def _rows(self, columns: Sequence[str]) -> Iterator[Row]:
        number = 0
        for file in self._files:
            with self._open(file) as table, _readable(file):
                present = [name for name in columns if name in table.schema_arrow.names]
                for batch in table.iter_batches(batch_size=_ROWS_PER_BATCH, columns=present):
                    for row in _fields(batch, present):
                        number += 1
                        yield number, row

    def _open(self, file: Path) -> Any:
        require("pyarrow", purpose="Reading Parquet files", extra="datasets")
        from pyarrow import parquet

        with _readable(file):
            return parquet.ParquetFile(file)


class SavedDataset:
    """The rows of a folder that `datasets.Dataset.save_to_disk` wrote, or of one split of a `DatasetDict`."""

    unit: Unit = "row"
    settings: Mapping[str, Any] = {}

    def __init__(self, path: Path) -> None:
        """Map the data set into memory.

        Raises:
            InputFileError: If it cannot be loaded, or holds several splits.
            MissingExtraError: If datasets is not installed.
        """
        datasets = require("datasets", purpose="Reading saved data sets", extra="datasets")
        self.path = path
        try:
            found = datasets.load_from_disk(str(path))
        except Exception as error:  # it raises what its many parts raise
            raise InputFileError(f"{path} cannot be loaded as a saved data set: {error}") from error
        if not isinstance(found, datasets.Dataset):
            splits = ", ".join(str(path / str(name)) for name in found)
            raise InputFileError(f"{path} holds several splits: name one of them, {splits}")
        self._table = found

    def count(self, limit: int | None = None) -> int:
        """Rows."""
        return len(self._table) if limit is None else min(limit, len(self._table))

    def rows(self, columns: Sequence[str], limit: int | None = None) -> Iterator[Row]:
        """Number and fields of each row, or what is wrong with it."""
        present = [name for name in columns if name in self._table.column_names]
        if not present:  # Arrow would count no row in a table without columns
            yield from ((number, {}) for number in range(1, self.count(limit) + 1))
            return
        arrow = self._table.select_columns(present).with_format("arrow")
        n_rows = self.count(limit)
        for first in range(0, n_rows, _ROWS_PER_BATCH):
            batch = arrow[first : min(first + _ROWS_PER_BATCH, n_rows)]
            yield from enumerate(_fields(batch, present), start=first + 1)


def _skip_line(file: BinaryIO, chunk: bytes) -> None:
    while chunk and not chunk.endswith(b"\n"):
        chunk = file.readline(MAX_LINE_BYTES)


def _object(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise InputFileError(f"longer than {MAX_LINE_BYTES} bytes: is each trace on a line of its own?")
    try:
        data = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputFileError(f"not UTF-8 (byte {error.start} of the line): save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputFileError(f"not JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or brackets nested without end.
        raise InputFileError(f"not JSON that can be read ({error})") from error
    if not isinstance(data, dict):
        raise InputFileError(f"holds {json_name(data)}, expected an object with the fields of a trace")
    return data


def _is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` wrote this folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json", "dataset_info.json"))


def _fields(batch: Any, columns: Sequence[str]) -> Iterator[Mapping[str, Any] | InputFileError]:
    """Rows as plain data; a text that is not UTF-8 costs its row only."""
    if not columns:
        yield from ({} for _ in range(batch.num_rows))
        return
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield InputFileError(f"holds a text that is not UTF-8 (byte {error.start}): save it as UTF-8")


class _readable:
    """Inside the block, what Arrow says about a file becomes an `InputFileError`."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        import pyarrow

        if isinstance(error, OSError | pyarrow.ArrowException):
            raise InputFileError(f"cannot read {self._file} as Parquet: {error}") from error
