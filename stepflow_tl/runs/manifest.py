"""The manifest of a folder of results: append-only, locked, safe against a kill between any two system calls.

1. Opening takes an exclusive lock (`flock`), which the operating system gives back when the process ends,
   however it ends. A second run in the same folder and shard is refused.
2. A last line without its newline was being written when an earlier run was killed: it is cut off. Its
   trace's result, if that was saved, is found and taken over by the worker.
3. The first line says what was analysed and how; a run with other settings is refused, or begins the
   manifest anew with `overwrite`.
4. Appending is one `write` at the end of the file and one `fsync`. If the disk takes only part of a line,
   that part is cut off again before the error is raised.
5. In memory there is an index only: where in the file the last line of each id begins.

Cost: an `fsync` a trace, milliseconds. Without `flock` (Windows) nothing keeps two runs apart.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepflow_tl.errors import DiskFullError, ResultFileError
from stepflow_tl.results.files import is_disk_full
from stepflow_tl.runs.entries import SCHEMA_VERSION, Entry, RunSettings, entry_of
from stepflow_tl.runs.plan import Shard
from stepflow_tl.version import __version__


def manifest_path(folder: Path, shard: Shard | None = None) -> Path:
    """Where the manifest of a run lies.

    Args:
        folder: The folder of the results.
        shard: Whose part; of a run that is not cut by default.
    """
    return folder / f"manifest{(shard or Shard()).suffix}.jsonl"


class Manifest:
    """An open manifest; a context manager."""

    def __init__(
        self,
        path: Path,
        settings: RunSettings,
        *,
        overwrite: bool = False,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Open and lock `path`, mend its end, and check or write its header.

        Args:
            path: The file, made if it does not exist.
            settings: Of this run.
            overwrite: Begin anew where the settings differ, instead of refusing.
            note: Told what was mended.

        Raises:
            DiskFullError: If there is no room for the header.
            ResultFileError: If another run holds the lock, or the file is something else or of other
                settings.
        """
        self.path, self._note = path, note
        self._index: dict[str, int] = {}
        try:
            self._file = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666
            )
        except OSError as error:
            kind = DiskFullError if is_disk_full(error) else ResultFileError
            raise kind(f"cannot open {path} ({error.strerror or error})") from error
        try:
            self._lock()
            self._cut_torn_line()
            header = self._read()
            if header is not None and self._differs(header, settings, overwrite):
                os.ftruncate(self._file, 0)
                self._index, header = {}, None
            if header is None:
                self._write(
                    {
                        "schema": SCHEMA_VERSION,
                        "kind": "header",
                        "settings": settings.to_json(),
                        "stepflow_tl": __version__,
                    }
                )
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Manifest:
        """The open manifest."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the file, which gives the lock back."""
        os.close(self._file)

    def __len__(self) -> int:
        """Traces it has a line for."""
        return len(self._index)

    def last(self, trace_id: str) -> Entry | None:
        """The last entry of an id, read from the file."""
        offset = self._index.get(trace_id)
        if offset is None:
            return None
        return entry_of(json.loads(self._line_at(offset)))

    def append(self, entry: Entry) -> None:
        """Add a line, on the disk when this returns.

        Raises:
            DiskFullError: If there is no room; the manifest is then as it was.
            ResultFileError: If the disk refuses for another reason.
        """
        self._index[entry.id] = self._write(entry.to_json())

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResultFileError(
                f"{self.path} is in use: another run works in this folder. Wait for it, end it, or choose "
                "another --out; --shard i/n lets several runs share a folder"
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

    def _read(self) -> dict[str, Any] | None:
        """The header, or None in an empty file; fills the index."""
        header, offset = None, 0
        # A copy of the descriptor: it shares the lock, and closing it gives nothing back.
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            for line in file:
                try:
                    data = json.loads(line)
                    if not isinstance(data, dict):
                        raise TypeError(f"a JSON {type(data).__name__}")
                    if header is None:
                        header = self._header(data)
                    else:
                        self._index[entry_of(data).id] = offset
                except (ValueError, TypeError, RecursionError) as error:
                    if header is None:
                        raise ResultFileError(
                            f"{self.path} is no manifest of stepflow-tl ({error}): choose another --out"
                        ) from error
                    self._note(f"{self.path.name}: ignored a line that is damaged ({error})")
                offset += len(line)
        return header

    def _header(self, data: dict[str, Any]) -> dict[str, Any]:
        version, settings = data.get("schema"), data.get("settings")
        if data.get("kind") != "header" or not isinstance(version, int) or not isinstance(settings, dict):
            raise ValueError("its first line is no header")
        if version > SCHEMA_VERSION:
            raise ResultFileError(
                f"{self.path} has schema {version}; this stepflow_tl reads up to {SCHEMA_VERSION}: upgrade "
                "stepflow-tl, or choose another --out"
            )
        return settings

    def _differs(self, found: dict[str, Any], settings: RunSettings, overwrite: bool) -> bool:
        for name, value in settings.to_json().items():
            if name in found and found[name] != value:
                if overwrite:
                    return True
                raise ResultFileError(
                    f"{self.path.parent} holds an analysis with {name} {found[name]}, this one has {value}: "
                    "choose another --out, or replace it with --overwrite"
                )
        return False

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

    def _write(self, data: dict[str, Any]) -> int:
        """Add a line; where it begins."""
        line = json.dumps(data, allow_nan=False).encode("ascii") + b"\n"
        begin = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):  # the rest tells why
                written += os.write(self._file, line[written:])
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, begin)
            kind = DiskFullError if is_disk_full(error) else ResultFileError
            raise kind(f"cannot write {self.path} ({error.strerror or error})") from error
        return begin
