"""A journal: an append-only file of JSON lines that survives a kill between any two system calls.

The first line is a header: `{"schema", "kind": "header", "settings": {...}, "stepflow_tl": version}`. Every
other line is an entry: a JSON object with a `kind` and a string `id`, of which the last one counts. What else
an entry holds is the caller's business (`runs.manifest` keeps traces in one).

1. Opening takes an exclusive lock (`flock`), which the operating system gives back when the process ends,
   however it ends. A second writer is refused.
2. A last line without its newline was being written when an earlier writer was killed: it is cut off.
3. Settings of the header that differ from the caller's are refused, or begin the journal anew with
   `overwrite`. A setting that only one of the two names is no difference, so settings can be added later;
   a kind may say what one of them is where it is not named.
4. Appending one entry, or several together, is one `write` at the end of the file and one `fsync`. If the
   disk takes only part of it, that part is cut off again before the error is raised.
5. In memory there is an index only: where in the file the last line of each id begins.

Reading, by the writer and by `read_journal`, takes the file for hostile: every line must be UTF-8, one JSON
object without NaN or Infinity, no longer than `MAX_LINE_BYTES`. A damaged line is reported and costs itself
only; a header that cannot be read, or one of a later schema, costs the file. Lines of an unknown `kind` are
a later version's and are passed over.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from stepflow_tl.errors import DiskFullError, ResultFileError
from stepflow_tl.results.files import is_disk_full
from stepflow_tl.version import __version__

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is read."""

# What a check raises where a line does not hold what it should.
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class JournalKind:
    """A kind of journal.

    Attributes:
        what: In words, for messages: "manifest".
        of: What it records, for messages: "analysis".
        schema: Highest schema that can be read, and the one that is written.
        entries: The kinds of entry: lines of another kind are passed over.
        check: Makes of an entry's data whatever it stands for; a `KeyError`, `TypeError`, `ValueError` or
            the like means that the line is damaged.
        when_in_use: What to do where another writer holds the lock.
        defaults: What a setting is where a header does not name it.
    """

    what: str
    of: str
    schema: int
    entries: tuple[str, ...]
    check: Callable[[dict[str, Any]], Any]
    when_in_use: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


class _LaterSchemaError(ResultFileError):
    """The whole file is a later version's."""


@dataclass(frozen=True)
class Line:
    """A line of a journal that is a header, an entry, or damaged.

    Attributes:
        offset: Where it begins, in bytes.
        settings: Those of a header; None in other lines.
        entry: What the kind's `check` made of an entry; None in other lines.
        id: The entry's id; empty in other lines.
        damage: Why the line cannot be read; empty where it can.
    """

    offset: int
    settings: dict[str, Any] | None = None
    entry: Any = None
    id: str = ""
    damage: str = ""


def read_journal(path: Path, kind: JournalKind) -> Iterator[Line]:
    """The lines of a journal in order, without locking it; its writer may be at work.

    A last line that is cut off is passed over; so are blank lines and lines of an unknown kind.

    Args:
        path: The file.
        kind: What it must be.

    Raises:
        ResultFileError: If the file cannot be read, does not begin with a header, a header is of a later
            schema, or a line exceeds `MAX_LINE_BYTES`.
    """
    try:
        with path.open("rb") as file:
            yield from _lines(file, path, kind)
    except OSError as error:
        raise ResultFileError(f"cannot read {path}: {error.strerror or error}") from error


def check_settings(found: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that both name with different values, or None: its name and both values."""
    for name, value in expected.items():
        if name in found and found[name] != value:
            return name, found[name], value
    return None


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
        return None if offset is None else self._kind.check(json.loads(self._line_at(offset)))

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
            raise ResultFileError(
                f"{self.path} is in use: another run works in this folder. {self._kind.when_in_use}"
            ) from error

    def _cut_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        end = size
        while end:
            first = max(0, end - 65536)
            found = self._at(first, end - first).rfind(b"\n")
            if found >= 0:
                end = first + found + 1
                break
            end = first
        if end != size:
            os.ftruncate(self._file, end)
            self._note(f"{self.path.name}: cut off the {size - end} bytes of a line that was never finished")

    def _is_continued(self, settings: Mapping[str, Any], overwrite: bool) -> bool:
        """Fill the index; False in an empty file and where a journal of other settings is to be replaced."""
        is_there = False
        # A copy of the descriptor: it shares the lock, and closing it gives nothing back.
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            for line in _lines(file, self.path, self._kind):
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

    def _line_at(self, offset: int) -> bytes:
        chunks, chunk = [], b""
        while b"\n" not in chunk:
            chunk = self._at(offset, 65536)
            if not chunk:
                break
            chunks.append(chunk)
            offset += len(chunk)
        return b"".join(chunks).partition(b"\n")[0]

    def _at(self, offset: int, size: int) -> bytes:
        os.lseek(self._file, offset, os.SEEK_SET)  # writing goes to the end all the same: O_APPEND
        return os.read(self._file, size)

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


def _lines(file: BinaryIO, path: Path, kind: JournalKind) -> Iterator[Line]:
    number, offset, has_header = 0, 0, False
    while text := file.readline(MAX_LINE_BYTES + 1):
        number, begin, offset = number + 1, offset, offset + len(text)
        place = f"{path}, line {number}"
        if len(text) > MAX_LINE_BYTES:
            raise ResultFileError(f"{place}: longer than {MAX_LINE_BYTES} bytes")
        if not text.strip():
            continue
        try:
            line = _parsed(text, begin, place, kind)
        except _LaterSchemaError:
            raise
        except _DAMAGE as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            if has_header and not text.endswith(b"\n"):
                return  # cut off in the middle of a write
            line = Line(begin, damage=f"{place} is not a {kind.what} line that can be read ({reason})")
        if not has_header and (line is None or line.settings is None):
            why = f": {line.damage}" if line is not None and line.damage else ""
            raise ResultFileError(
                f"{path} is not a {kind.what} of stepflow-tl, it does not begin with a header{why}. It was "
                "left alone: choose another folder"
            )
        has_header = True
        if line is not None:
            yield line


def _parsed(text: bytes, offset: int, place: str, kind: JournalKind) -> Line | None:
    data = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
    if not isinstance(data, dict):
        raise TypeError(f"a JSON {type(data).__name__}, expected an object")
    if data["kind"] == "header":
        version, settings = data["schema"], data["settings"]
        if type(version) is int and version > kind.schema:
            raise _LaterSchemaError(
                f"{place}: {kind.what} schema {version}; this stepflow_tl reads up to {kind.schema}: upgrade "
                "stepflow-tl, or choose another folder"
            )
        if type(version) is not int or version < 1:
            raise ValueError(f"schema is {version!r}")
        if not isinstance(settings, dict):
            raise TypeError(f"settings is a {type(settings).__name__}, expected an object")
        return Line(offset, settings=settings)
    if data["kind"] not in kind.entries:
        return None
    name = data["id"]
    if not isinstance(name, str):
        raise TypeError(f"id is a {type(name).__name__}, expected a string")
    name.encode()  # half a character is refused here, with a ValueError
    return Line(offset, entry=kind.check(data), id=name)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _refused(what: str, error: OSError) -> ResultFileError:
    kind = DiskFullError if is_disk_full(error) else ResultFileError
    return kind(f"{what} ({error.strerror or error})")
