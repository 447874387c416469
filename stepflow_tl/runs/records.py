"""The fields of a trace in a data set, whatever kind of file it comes from.

1. A row has the `tokens` of the whole transcript, as an answer of `evaluate` has, or the parts (`question`,
   `thinking`, perhaps `summary`), or the full `text`. Tokens come before the rest: they are what the model
   read and wrote.
2. Fields that are read must have the expected types; other fields are left alone.
3. `where` chooses rows by the values of their fields; the others are as if they were not there.

A row that fails is an `Unreadable` with its number and reason, and costs no other row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from stepflow_tl.diagnosis import DEFAULT_PAIR_FIELD
from stepflow_tl.errors import InputFileError
from stepflow_tl.results.tables import printable
from stepflow_tl.runs.answer_rows import AnswerRows
from stepflow_tl.runs.options import GroupOptions
from stepflow_tl.runs.row_files import Row, Source, Unit, json_name, open_source

PARTS = ("question", "thinking", "summary")
FIELDS = ("id", *PARTS, "text", "tokens")

_CHARACTERS_A_TOKEN = 4


@dataclass(frozen=True)
class Record:
    """One trace of the input: its tokens, or the parts, or the full `text`.

    Attributes:
        line: Line or row number, from 1.
        id: The field `id` as text; "line-<number>" or "row-<number>" where there is none.
        question: The user's text; empty where `text` is given, and perhaps where `tokens` are.
        thinking: The thinking.
        summary: The visible answer; may be empty.
        text: Full transcript with its markers, or None.
        group: Value of the field asked for with `group_by`, or None.
        pair: Value of the field asked for with `pair_by`, as text, or None.
        unit: What `line` counts.
        tokens: Token ids of the full transcript, or None.
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
    tokens: tuple[int, ...] | None = None

    @property
    def place(self) -> str:
        """Where it stands in the input, safe to print."""
        return f"{self.unit} {self.line}, id '{printable(self.id)}'"

    @property
    def size(self) -> int:
        """Characters of its text, about: what its tokens are about proportional to."""
        if self.tokens is not None:
            return _CHARACTERS_A_TOKEN * len(self.tokens)
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


def open_traces(path: Path, where: Sequence[str] | None = None) -> Source:
    """The rows at `path`: the answers of an evaluation, or any other file of traces.

    Args:
        path: A file or folder.
        where: FIELD=VALUE; only rows with these values are there. Of several values of a field each will do.

    Raises:
        InputFileError: If there is nothing that can be read.
        MissingExtraError: If a package that reads it is not installed.
    """
    source = AnswerRows(path) if AnswerRows.are_at(path) else open_source(path)
    return Chosen(source, where) if where else source


class Chosen:
    """The rows of a source whose fields have the values asked for, and those that cannot be read."""

    unit: Unit

    def __init__(self, source: Source, where: Sequence[str]) -> None:
        """Read nothing yet."""
        self.unit, self.path, self.settings = source.unit, source.path, source.settings
        self._source = source
        self._values: dict[str, list[str]] = {}
        for condition in where:
            field, _, value = condition.partition("=")
            self._values.setdefault(field, []).append(value)

    def count(self, limit: int | None = None) -> int:
        """Rows chosen: all of them are read."""
        return sum(1 for _ in self.rows((), limit))

    def rows(self, columns: Sequence[str], limit: int | None = None) -> Iterator[Row]:
        """Number and fields of each row chosen, or what is wrong with it.

        Raises:
            InputFileError: If the source cannot be read on.
        """
        found = self._source.rows(list(dict.fromkeys([*columns, *self._values])))
        return islice((row for row in found if self._is_chosen(row[1])), limit)

    def _is_chosen(self, row: Mapping[str, Any] | InputFileError) -> bool:
        if isinstance(row, InputFileError):
            return True
        return all(
            any(_reads_as(row.get(field), value) for value in values)
            for field, values in self._values.items()
        )


def _reads_as(found: object, value: str) -> bool:
    """Whether a field holds what the user wrote: a string, or what JSON makes of it."""
    if isinstance(found, str):
        return found == value
    try:
        wanted = json.loads(value)
    except (ValueError, RecursionError):
        return False
    # True is 1 to Python, but not to a reader.
    return found == wanted and isinstance(found, bool) is isinstance(wanted, bool)


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
    opened = open_traces(source) if isinstance(source, Path) else source
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
    tokens = _tokens(data)
    names = ("question",) if tokens is not None else (*PARTS, "text")
    parts = dict.fromkeys((*PARTS, "text")) | {name: _text(data, name) for name in names}
    if parts["text"] is not None and (parts["thinking"] is not None or parts["summary"] is not None):
        raise InputFileError(
            "has 'text' beside 'thinking' or 'summary': give the full transcript or its parts"
        )
    if parts["text"] is None and tokens is None:
        missing = [repr(name) for name in ("question", "thinking") if parts[name] is None]
        if missing:
            raise InputFileError(
                f"lacks {' and '.join(missing)}: expected the fields question, thinking and summary, or "
                "text, or tokens"
            )
    return Record(
        line=number,
        id=_name(data, "id") or f"{unit}-{number}",
        **{name: parts[name] or "" for name in PARTS},
        text=parts["text"],
        group=None if group_by is None else _truth(data, group_by),
        pair=None if pair_by is None else _name(data, pair_by),
        unit=unit,
        tokens=tokens,
    )


def _tokens(data: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Token ids, where the field holds a list: many a data set counts tokens under that name."""
    value = data.get("tokens")
    if not isinstance(value, list):
        return None
    for place, token in enumerate(value):
        if type(token) is not int:
            raise InputFileError(
                f"field 'tokens' holds {json_name(token)} at {place}, expected token ids: whole numbers"
            )
    if not value:
        raise InputFileError("field 'tokens' is empty: expected the token ids of the whole transcript")
    return tuple(value)


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
