"""Which traces a run deals with, under which file names, in which order.

1. Rows are read in order. Ids that were met before are refused, and every id gets its file name here, over
   the whole input: so names and refusals do not depend on shards, order or what an earlier run did.
2. An id of ASCII letters, digits, ".", "_" and "-", short, without a leading dot, that no system reserves, is
   its own name. Any other becomes what is left of it, readable, and 12 hex digits of its SHA-256: `../x`
   becomes `x-` and the digits. So no path separator, NUL or device name gets through, and different ids keep
   different names. Of two ids that differ only in case, which would share a file on some systems, the later
   one gets the digits too.
3. Shard i of n takes the rows whose place in the input, counted from 0, leaves the remainder i modulo n.
4. Inside a window of some hundred records, long traces come first: memory is asked for at its peak once and
   used again, and what is left is known for the window and estimated from the rows read so far beyond it.

The order is a function of the input alone. Memory: one window of records, and one file name per id.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stepflow_tl.runs.manifest import Entry
from stepflow_tl.runs.options import Shard
from stepflow_tl.runs.records import Record, Unreadable

WINDOW_RECORDS = 256
_WINDOW_CHARACTERS = 1 << 26
_PLAIN = re.compile(r"[A-Za-z0-9_-](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?", re.ASCII)
# Windows devices, with any ending.
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.ASCII | re.IGNORECASE)
_READABLE = 80
# What `write_atomically` writes beside NAME before it is renamed to NAME.
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")


@dataclass(frozen=True)
class Task:
    """One trace to deal with.

    Attributes:
        record: Its row.
        file: Name of its result file.
        previous: What the manifest says of it already.
    """

    record: Record
    file: str
    previous: Entry | None = None


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

    def __iter__(self) -> Iterator[Task | Unreadable]:
        """Tasks, window by window, and rows that name none."""
        window: list[Task] = []
        size = 0
        for place, record in enumerate(self._records):
            task = self._task(record)
            if place % self._shard.count != self._shard.index:
                continue
            self._n_read += 1
            if isinstance(task, Unreadable):
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
        """Characters of the whole shard: those read, and as many per row for the rest."""
        return self._size_read / self._n_read * self.total if self._n_read else 0.0

    def _task(self, record: Record | Unreadable) -> Task | Unreadable:
        if isinstance(record, Unreadable):
            return record
        first = self._line_of.setdefault(record.id, record.line)
        if first != record.line:
            reason = f"duplicate id, first on {record.unit} {first}: ids must differ"
            return Unreadable(record.line, reason, record.unit, record.id)
        return Task(record, f"{self._names.stem(record.id)}.safetensors")


class FileNames:
    """Gives each id of a run its file stem."""

    def __init__(self) -> None:
        """No name is taken yet."""
        self._id_of: dict[str, str] = {}

    def stem(self, trace_id: str) -> str:
        """File name without ending; the same id gives the same name, another id another one."""
        is_plain = _PLAIN.fullmatch(trace_id) and not _RESERVED.fullmatch(trace_id)
        name = trace_id if is_plain else hashed_stem(trace_id)
        if self._id_of.setdefault(name.casefold(), trace_id) == trace_id:
            return name
        name = hashed_stem(trace_id)
        if self._id_of.setdefault(name.casefold(), trace_id) != trace_id:
            # An id that spells another one's digits.
            name = hashed_stem(trace_id, digits=64)
            self._id_of[name.casefold()] = trace_id
        return name


def hashed_stem(trace_id: str, digits: int = 12) -> str:
    """The readable part of an id and the first hex digits of its SHA-256."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", trace_id, flags=re.ASCII).strip("._-")[:_READABLE]
    if _RESERVED.fullmatch(readable):  # Windows looks at what stands before the first dot
        readable = f"trace-{readable}"
    digest = hashlib.sha256(trace_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{readable or 'trace'}-{digest[:digits]}"


class Leftovers:
    """Temporary files of a run that was killed while it wrote one.

    They are looked for once, when a run begins, and removed when the run that may write their target comes to
    it: another shard's are another run's business, perhaps at this moment.
    """

    def __init__(self, *folders: Path) -> None:
        """Look once."""
        self._of: dict[str, list[Path]] = {}
        for folder in folders:
            if folder.is_dir():
                for path in folder.iterdir():
                    if found := _TEMPORARY.fullmatch(path.name):
                        self._of.setdefault(found[1], []).append(path)

    def remove(self, name: str) -> None:
        """Remove what was to become the file `name`."""
        for path in self._of.pop(name, ()):
            with contextlib.suppress(OSError):
                path.unlink()


def _longest_first(window: list[Task]) -> list[Task]:
    return sorted(window, key=lambda task: -task.record.size)  # stable: equal lengths stay in file order
