"""The fields of a trace in a data set, whatever kind of file it comes from.

1. A row has either the parts (`question`, `thinking`, perhaps `summary`) or the full `text`.
2. Fields that are read must have the expected types; other fields are left alone.

A row that fails is an `Unreadable` with its number and reason, and costs no other row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepflow_tl.diagnosis import DEFAULT_PAIR_FIELD
from stepflow_tl.errors import InputFileError
from stepflow_tl.results.tables import printable
from stepflow_tl.runs.options import GroupOptions
from stepflow_tl.runs.row_files import Source, Unit, json_name, open_source

PARTS = ("question", "thinking", "summary")
FIELDS = ("id", *PARTS, "text")


@dataclass(frozen=True)
class Record:
    """One trace of the input: either the parts or the full `text`.

    Attributes:
        line: Line or row number, from 1.
        id: The field `id` as text; "line-<number>" or "row-<number>" where there is none.
        question: The user's text; empty where `text` is given.
        thinking: The thinking.
        summary: The visible answer; may be empty.
        text: Full transcript with its markers, or None.
        group: Value of the field asked for with `group_by`, or None.
        pair: Value of the field asked for with `pair_by`, as text, or None.
        unit: What `line` counts.
    """

    line: int
    id: str
    question: str
    thinking: str
    summary: str
    text: str | None
    group: bool | None = None
    pair: str | None = None
    unit: Unit = "line"

    @property
    def place(self) -> str:
        """Where it stands in the input, safe to print."""
        return f"{self.unit} {self.line}, id '{printable(self.id)}'"

    @property
    def size(self) -> int:
        """Characters of its text: what its tokens are about proportional to."""
        return len(self.question) + len(self.thinking) + len(self.summary) + len(self.text or "")


@dataclass(frozen=True)
class Unreadable:
    """A row that names no trace, and why.

    Attributes:
        line: Line or row number, from 1.
        reason: What is wrong with it.
        unit: What `line` counts.
        id: The id that it gives, where it can be read.
    """

    line: int
    reason: str
    unit: Unit = "line"
    id: str = ""

    @property
    def stand_in(self) -> str:
        """What it is called in the manifest: "line-<number>" or "row-<number>"."""
        return f"{self.unit}-{self.line}"


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


def pair_field(options: GroupOptions) -> str | None:
    """The field that pairs the traces of two groups, where the records have it; None without groups."""
    return (options.pair_by or DEFAULT_PAIR_FIELD) if options.group_by is not None else None


def record_of(
    data: Mapping[str, Any], number: int, group_by: str | None, pair_by: str | None, unit: Unit = "line"
) -> Record:
    """Check the fields of one row.

    Args:
        data: The row's fields.
        number: Its line or row number.
        group_by: Field that tells the groups apart, or None.
        pair_by: Field that pairs them, or None.
        unit: What the number counts.

    Raises:
        InputFileError: If a field is missing or of the wrong type.
    """
    parts = {name: _text(data, name) for name in (*PARTS, "text")}
    if parts["text"] is not None and (parts["thinking"] is not None or parts["summary"] is not None):
        raise InputFileError(
            "has 'text' beside 'thinking' or 'summary': give the full transcript or its parts"
        )
    if parts["text"] is None:
        missing = [repr(name) for name in ("question", "thinking") if parts[name] is None]
        if missing:
            raise InputFileError(
                f"lacks {' and '.join(missing)}: expected the fields question, thinking and summary, or text"
            )
    return Record(
        line=number,
        id=_name(data, "id") or f"{unit}-{number}",
        **{name: parts[name] or "" for name in PARTS},
        text=parts["text"],
        group=None if group_by is None else _truth(data, group_by),
        pair=None if pair_by is None else _name(data, pair_by),
        unit=unit,
    )


def _text(data: Mapping[str, Any], field: str) -> str | None:
    value = data.get(field)
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputFileError(f"field {field!r} is {json_name(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(value[error.start]):04x}"
        raise InputFileError(f"field {field!r} holds half a character ({lone} at {error.start})") from error
    return value


def _name(data: Mapping[str, Any], field: str) -> str | None:
    """A name may be a number: data sets count their problems."""
    value = data.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise InputFileError(f"field {field!r} is {json_name(value)}, expected a string or a whole number")
    return _text(data, field)


def _truth(data: Mapping[str, Any], field: str) -> bool | None:
    value = data.get(field)
    if value is not None and not isinstance(value, bool):
        raise InputFileError(f"field {field!r} is {json_name(value)}, expected true or false")
    return value
