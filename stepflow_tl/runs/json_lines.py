r"""JSON lines: one object a line, one line in memory at a time.

1. A line is cut at "\n" and refused, unread, where it exceeds `MAX_LINE_BYTES`.
2. It must be UTF-8 and one JSON object. Blank lines are passed over; a byte order mark before the first
   is allowed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from stepflow_tl.errors import InputFileError
from stepflow_tl.runs.records import Unit, json_name

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is read. A trace of a million tokens is some 5 MB of text."""


class JsonLines:
    """The objects of a file of JSON lines."""

    unit: Unit = "line"

    def __init__(self, path: Path) -> None:
        """Look at the file only.

        Raises:
            InputFileError: If there is no such file.
        """
        if not path.is_file():
            what = (
                "is a folder"
                if path.is_dir()
                else "is no regular file"
                if path.exists()
                else "does not exist"
            )
            raise InputFileError(f"{path} {what}: expected a file of JSON lines, one trace a line")
        self.path = path

    def count(self, limit: int | None = None) -> int:
        """Lines that `rows` would yield, without parsing them.

        Raises:
            InputFileError: If the file cannot be read.
        """
        return sum(1 for _ in self._lines(limit))

    def rows(
        self, columns: Sequence[str], limit: int | None = None
    ) -> Iterator[tuple[int, Mapping[str, Any] | InputFileError]]:
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
