"""A journal: an append-only file of JSON lines that survives a kill between any two system calls.

What its lines are, and how they are read: `results.journal_lines`. This is the one who writes:

1. Opening takes an exclusive lock (`flock`), which the operating system gives back when the process ends,
   however it ends. A second writer is refused.
2. A last line without its newline was being written when an earlier writer was killed: it is cut off.
3. Settings of the header that differ from the caller's are refused, or begin the journal anew with
   `overwrite`.
4. Appending one entry, or several together, is one `write` at the end of the file and one `fsync`. If the
   disk takes only part of it, that part is cut off again before the error is raised.
5. In memory there is an index only: where in the file the last line of each id begins.

Cost: an `fsync` per call that appends, milliseconds. Without `flock` (Windows) nothing keeps two writers
apart.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from stepflow_tl.errors import DiskFullError, ResultFileError
from stepflow_tl.results.files import is_disk_full
from stepflow_tl.results.journal_lines import JournalKind, check_settings, lines_of
from stepflow_tl.version import __version__


class Journal:
    """An open, locked journal; a context manager."""

    def __init__(
        self,
        path: Path,
        kind: JournalKind,
        settings: Mapping[str, Any],
        *,
        overwrite: bool = False,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Open and lock `path`, mend its end, and check or write its header.

        Args:
            path: The file, made if it does not exist.
            kind: What it is, or will be.
            settings: What all entries have in common, as plain data.
            overwrite: Begin anew where the settings differ, instead of refusing.
            note: Told what was mended.

        Raises:
            DiskFullError: If there is no room for the header.
            ResultFileError: If another process holds the lock, or the file is something else or of other
                settings.
        """
        self.path, self._kind, self._note = path, kind, note
        self._index: dict[str, int] = {}
        try:
            self._file = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666
            )
        except OSError as error:
            raise _refused(f"cannot open {path}", error) from error
        try:
            self._lock()
            self._cut_torn_line()
            if not self._is_continued(settings, overwrite):
                os.ftruncate(self._file, 0)
                self._index = {}
                header = {"schema": kind.schema, "kind": "header", "settings": dict(settings)}
                self._write({**header, "stepflow_tl": __version__})
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Journal:
        """The open journal."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the file, which gives the lock back."""
        os.close(self._file)

    def __len__(self) -> int:
        """Ids it has an entry for."""
        return len(self._index)

    def __contains__(self, entry_id: str) -> bool:
        """Whether there is an entry of that id."""
        return entry_id in self._index

    def __iter__(self) -> Iterator[Any]:
        """The last entry of each id, in the order in which the ids first came; each is read from the file."""
        return map(self.last, list(self._index))

    def last(self, entry_id: str) -> Any | None:
        """The last entry of an id as the kind's `check` makes it, read from the file; None without one."""
        offset = self._index.get(entry_id)
        if offset is None:
            return None
        with self._reader(offset) as file:
            return self._kind.check(json.loads(file.readline()))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add an entry, on the disk when this returns.

        Args:
            entry: Plain data with a string `id` and a `kind` that the journal's kind names.

        Raises:
            DiskFullError: If there is no room; the journal is then as it was.
            ResultFileError: If the disk refuses for another reason.
            ValueError: If it is no such data.
        """
        self.append_all([entry])

    def append_all(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add entries together, all on the disk when this returns.

        A kill in the middle of it may leave the first ones only, each of them whole.

        Args:
            entries: As in `append`.

        Raises:
            DiskFullError: As `append`, and so the other errors.
        """
        for entry in entries:
            if not isinstance(entry.get("id"), str) or entry.get("kind") not in self._kind.entries:
                raise ValueError(
                    f"an entry of a {self._kind.what} needs a string id and a kind of {self._kind.entries}, "
                    f"found id {entry.get('id')!r}, kind {entry.get('kind')!r}"
                )
        begins = self._write(*entries)
        self._index |= {entry["id"]: begin for entry, begin in zip(entries, begins, strict=True)}

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            together = "; --shard i/n lets several runs share a folder" if self._kind.stem else ""
            raise ResultFileError(
                f"{self.path} is in use: another run works in this folder. Wait for it, end it, or choose "
                f"another --out{together}"
            ) from error

    def _cut_torn_line(self) -> None:
        end = size = os.fstat(self._file).st_size
        found = -1
        with self._reader(0) as file:
            while end and found < 0:
                begin = max(0, end - 65536)
                file.seek(begin)
                found = file.read(end - begin).rfind(b"\n")
                end = begin + found + 1
        if end != size:
            os.ftruncate(self._file, end)
            self._note(f"{self.path.name}: cut off the {size - end} bytes of a line that was never finished")

    def _is_continued(self, settings: Mapping[str, Any], overwrite: bool) -> bool:
        """Fill the index; False in an empty file and where a journal of other settings is to be replaced."""
        is_there = False
        with self._reader(0) as file:
            for line in lines_of(file, self.path, self._kind):
                if line.damage:
                    self._note(f"{self.path.name}: ignored a line that is damaged: {line.damage}")
                elif line.settings is None:
                    self._index[line.id] = line.offset
                elif not is_there:
                    is_there = True
                    there, wanted = ({**self._kind.defaults, **each} for each in (line.settings, settings))
                    if differing := check_settings(there, wanted):
                        if overwrite:
                            return False
                        name, found, other = differing
                        raise ResultFileError(
                            f"{self.path.parent} holds another {self._kind.of}, with {name} {found}, this "
                            f"one has {other}: choose another --out, or replace it with --overwrite"
                        )
        return is_there

    def _reader(self, offset: int) -> BinaryIO:
        """The file from a place on. A copy of the descriptor: it shares the lock, closing it keeps that."""
        file = os.fdopen(os.dup(self._file), "rb")
        file.seek(offset)  # writing goes to the end all the same: O_APPEND
        return file

    def _write(self, *data: Mapping[str, Any]) -> list[int]:
        """Add a line for each; where they begin."""
        lines = [json.dumps(each, allow_nan=False).encode("ascii") + b"\n" for each in data]
        begin, text = os.fstat(self._file).st_size, b"".join(lines)
        try:
            written = os.write(self._file, text)
            if written < len(text):  # the rest tells why
                written += os.write(self._file, text[written:])
            if written < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, begin)
            raise _refused(f"cannot write {self.path}", error) from error
        return list(itertools.accumulate(map(len, lines), initial=begin))[: len(lines)]


def _refused(what: str, error: OSError) -> ResultFileError:
    kind = DiskFullError if is_disk_full(error) else ResultFileError
    return kind(f"{what} ({error.strerror or error})")
