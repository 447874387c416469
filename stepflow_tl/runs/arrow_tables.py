"""Parquet files and Hugging Face data sets saved on disk: rows of Arrow tables, a batch in memory at a time.

Only the columns that are asked for are read. A Parquet file is streamed by row group, a saved data set is
memory-mapped by `datasets`. Rows are numbered from 1, through all files of a folder. Needs the extra
`datasets` (pyarrow and datasets), imported when a source is opened.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from stepflow_tl.errors import InputFileError, MissingExtraError
from stepflow_tl.runs.records import Unit

_ROWS_PER_BATCH = 64

Row = tuple[int, Mapping[str, Any] | InputFileError]


class ParquetFiles:
    """The rows of one Parquet file, or of the sorted `*.parquet` files of a folder."""

    unit: Unit = "row"

    def __init__(self, path: Path) -> None:
        """Read the footers.

        Raises:
            InputFileError: If a file is no Parquet file.
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
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise _missing("Parquet files", "pyarrow") from error
        with _readable(file):
            return parquet.ParquetFile(file)


class SavedDataset:
    """The rows of a folder that `datasets.Dataset.save_to_disk` wrote, or of one split of a `DatasetDict`."""

    unit: Unit = "row"

    def __init__(self, path: Path) -> None:
        """Map the data set into memory.

        Raises:
            InputFileError: If it cannot be loaded, or holds several splits.
            MissingExtraError: If datasets is not installed.
        """
        try:
            from datasets import Dataset, load_from_disk
        except ImportError as error:
            raise _missing("Saved data sets", "datasets") from error
        self.path = path
        try:
            found = load_from_disk(str(path))
        except Exception as error:  # it raises what its many parts raise
            raise InputFileError(f"{path} cannot be loaded as a saved data set: {error}") from error
        if not isinstance(found, Dataset):
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


def is_saved_dataset(path: Path) -> bool:
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


def _missing(what: str, package: str) -> MissingExtraError:
    return MissingExtraError(
        f'{what} need the package {package}. Install with:\n    pip install "stepflow-tl[datasets]"'
    )
