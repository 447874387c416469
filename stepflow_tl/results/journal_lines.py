"""The lines of journals: what kinds there are, and how they are read, one file or all those of a folder.

The first line is a header: `{"schema", "kind": "header", "settings": {...}, "stepflow_tl": version}`. Every
other line is an entry: a JSON object with a `kind` and a string `id`, of which the last one counts. What else
an entry holds is the caller's business (`runs.manifest` keeps traces in one).

1. A reader takes the file for hostile: every line must be UTF-8, one JSON object without NaN or Infinity, no
   longer than `MAX_LINE_BYTES`. A damaged line is reported and costs itself only; a header that cannot be
   read, or one of a later schema, costs the file. Lines of an unknown `kind` are a later version's and are
   passed over.
2. A journal is `stem.jsonl`; that of shard i of n is `stem-i-of-n.jsonl` in the same folder. All journals of
   one stem in a folder are parts of one run: settings that two of them name must be equal.
3. A setting that only one of two headers names is no difference, so settings can be added later; a kind may
   say what one of them is where it is not named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from stepflow_tl.errors import ResultFileError
from stepflow_tl.results.plain_data import DAMAGE, damage

Read = TypeVar("Read")

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is read."""


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
        stem: How its files are called; empty where shards cannot share a folder.
        defaults: What a setting is where a header does not name it.
    """

    what: str
    of: str
    schema: int
    entries: tuple[str, ...]
    check: Callable[[dict[str, Any]], Any]
    stem: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def files(self, folder: Path) -> list[Path]:
        """The journals of a folder, by name."""
        name = re.compile(rf"{self.stem}(?:-\d{{1,6}}-of-\d{{1,6}})?\.jsonl", re.ASCII)
        return sorted(path for path in folder.glob("*.jsonl") if name.fullmatch(path.name))


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

    Raises:
        ResultFileError: If the file cannot be read, does not begin with a header, a header is of a later
            schema, or a line exceeds `MAX_LINE_BYTES`.
    """
    try:
        with path.open("rb") as file:
            yield from lines_of(file, path, kind)
    except OSError as error:
        raise ResultFileError(f"cannot read {path}: {error.strerror or error}") from error


def read_journals(paths: Iterable[Path], kind: JournalKind) -> Iterator[tuple[Path, Line]]:
    """The lines of several journals of one run, one file after the other.

    Raises:
        ResultFileError: As `read_journal`, and if two headers are of different settings.
    """
    agreed: dict[str, Any] = {}
    for path in paths:
        for line in read_journal(path, kind):
            if line.settings is not None:
                refuse_other_run(path, line.settings, agreed, kind)
                agreed |= {**kind.defaults, **line.settings}
            yield path, line


def refuse_other_run(
    path: Path, found: Mapping[str, Any], others: Mapping[str, Any], kind: JournalKind
) -> None:
    """Refuse settings `found` in the header of `path` that differ from those of the folder's `others`."""
    if differing := check_settings({**kind.defaults, **found}, others):
        name, own, other = differing
        raise ResultFileError(
            f"{path}: a header with {name} {own!r}, another header of this folder has {other!r}: read "
            f"one run at a time, each {kind.of} from a folder of its own"
        )


def read_settings(read: Callable[[dict[str, Any]], Read], settings: dict[str, Any], path: Path) -> Read:
    """What `read` makes of a header's settings; a `ResultFileError` says that they stand in `path`."""
    try:
        return read(settings)
    except DAMAGE as error:
        raise ResultFileError(
            f"{path}: the settings of its header cannot be read ({damage(error)})"
        ) from error


def check_settings(found: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that both name with different values, or None: its name and both values."""
    for name, value in expected.items():
        if name in found and found[name] != value:
            return name, found[name], value
    return None


def lines_of(file: BinaryIO, path: Path, kind: JournalKind) -> Iterator[Line]:
    """The lines of an open journal, as `read_journal` has them."""
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
        except DAMAGE as error:
            if has_header and not text.endswith(b"\n"):
                return  # cut off in the middle of a write
            line = Line(begin, damage=f"{place} is not a {kind.what} line that can be read ({damage(error)})")
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
