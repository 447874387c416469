"""Which traces a run deals with, under which file names, in which order.

1. Rows are read in order. Ids that were met before are refused, and every id gets its file name here, over
   the whole input: so names and refusals do not depend on shards, order or what an earlier run did.
2. Shard i of n takes the rows whose place in the input, counted from 0, leaves the remainder i modulo n.
3. Inside a window of some hundred records, long traces come first: memory is asked for at its peak once and
   used again, and what is left is known for the window and estimated from the rows read so far beyond it.

The order is a function of the input alone. Memory: one window of records, and one file name an id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from stepflow_tl.errors import InputFileError
from stepflow_tl.runs.file_names import FileNames
from stepflow_tl.runs.records import Record, Unit, Unreadable

WINDOW_RECORDS = 256
_WINDOW_CHARACTERS = 1 << 26


@dataclass(frozen=True)
class Shard:
    """One part of an input that several runs share, in the same folder.

    Attributes:
        index: Which part, from 0, as in SLURM's array 0-(n-1).
        count: How many parts there are.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse a part that does not exist."""
        if not 0 <= self.index < self.count:
            raise InputFileError(
                f"shard {self.index}/{self.count} does not exist: of n shards the first is 0/n, the last "
                "(n-1)/n"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read a shard as it is written on the command line.

        Args:
            text: Such as "2/8".

        Raises:
            InputFileError: If it does not name a part.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if not found:
            raise InputFileError(f"{text!r} is no shard: expected i/n, such as 0/8 for the first of eight")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        """As it is written on the command line."""
        return f"{self.index}/{self.count}"

    @property
    def suffix(self) -> str:
        """What tells its files from those of the other shards: "-2-of-8", empty for a run that is not cut."""
        return "" if self.count == 1 else f"-{self.index}-of-{self.count}"


@dataclass(frozen=True)
class Task:
    """One trace to deal with.

    Attributes:
        record: Its row.
        file: Name of its result file.
    """

    record: Record
    file: str


@dataclass(frozen=True)
class Rejected:
    """A row that names no trace; `id` stands for it in the manifest.

    Attributes:
        line: Line or row number.
        id: "line-<number>" or "row-<number>".
        trace_id: The id that it gives, or empty.
        reason: What is wrong with it.
        unit: What `line` counts.
    """

    line: int
    id: str
    trace_id: str
    reason: str
    unit: Unit


class Plan:
    """The tasks of one shard, in the order in which they are done; iterate once."""

    def __init__(
        self, records: Iterable[Record | Unreadable], total: int, *, shard: Shard | None = None
    ) -> None:
        """Nothing is read yet.

        Args:
            records: The rows, in order.
            total: How many there are.
            shard: The part to take; all by default.
        """
        self._records, self._shard = records, shard or Shard()
        self._names = FileNames()
        self._line_of: dict[str, int] = {}
        self._n_read = self._size_read = 0
        self.total = len(range(self._shard.index, total, self._shard.count))

    def __iter__(self) -> Iterator[Task | Rejected]:
        """Tasks, window by window, and rows that name none."""
        window: list[Task] = []
        size = 0
        for place, record in enumerate(self._records):
            task = self._task(record)
            if place % self._shard.count != self._shard.index:
                continue
            self._n_read += 1
            if isinstance(task, Rejected):
                yield task
                continue
            self._size_read += task.record.size
            size += task.record.size
            window.append(task)
            if len(window) == WINDOW_RECORDS or size >= _WINDOW_CHARACTERS:
                yield from _longest_first(window)
                window, size = [], 0
        yield from _longest_first(window)

    @property
    def estimated_size(self) -> float:
        """Characters of the whole shard: those read, and as many a row for the rest."""
        return self._size_read / self._n_read * self.total if self._n_read else 0.0

    def _task(self, record: Record | Unreadable) -> Task | Rejected:
        stand_in = f"{record.unit}-{record.line}"
        if isinstance(record, Unreadable):
            return Rejected(record.line, stand_in, "", record.reason, record.unit)
        first = self._line_of.setdefault(record.id, record.line)
        if first != record.line:
            reason = f"duplicate id, first on {record.unit} {first}: ids must differ"
            return Rejected(record.line, stand_in, record.id, reason, record.unit)
        return Task(record, f"{self._names.stem(record.id)}.safetensors")


def _longest_first(window: list[Task]) -> list[Task]:
    return sorted(window, key=lambda task: -task.record.size)  # stable: equal lengths stay in file order
