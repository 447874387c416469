"""The answers that `evaluate` wrote, as rows: a model's own traces, token by token as it wrote them.

1. A ledger of answers is a journal (`results.journal`): a header with the settings of its run, then one line
   per answer. It may lie in a folder, cut into shards: `answers.jsonl`, `answers-0-of-2.jsonl`.
2. Of each answer the last line counts. A last line that is still being written is passed over; a damaged one
   is a row that cannot be read.
3. Rows are numbered from 1, through all files of a folder, in the order of the lines that count.

Two passes over the files: one finds the lines that count, the other yields them. Memory: a place per answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from stepflow_tl.errors import InputFileError, ResultFileError
from stepflow_tl.results.journal import JournalKind, check_settings, read_journal
from stepflow_tl.runs.row_files import MAX_LINE_BYTES, Row, Unit

_NAME = re.compile(r"answers(?:-\d{1,6}-of-\d{1,6})?\.jsonl", re.ASCII)
_LEDGER = JournalKind(
    what="answer file",
    of="evaluation",
    schema=1,
    entries=("answer",),
    check=dict,
    when_in_use="It is only read here",
)


class AnswerRows:
    """The answers of one ledger, or of the ledgers of a folder.

    Attributes:
        settings: What the headers say of the run: model_name, format, splitter, and others.
    """

    unit: Unit = "row"

    def __init__(self, path: Path) -> None:
        """Find the lines that count.

        Raises:
            InputFileError: If a file cannot be read, is of a later version, or two are of different runs.
        """
        self.path = path
        self.settings: Mapping[str, Any] = {}
        self._last: dict[str, tuple[Path, int]] = {}
        self._damaged = 0
        for file, settings, name, offset, _ in self._lines():
            if settings is not None:
                self._agree(file, settings)
            elif name:
                self._last[name] = (file, offset)
            else:
                self._damaged += 1

    @staticmethod
    def are_at(path: Path) -> bool:
        """Whether there is a ledger of answers at `path`, or a folder with one."""
        if path.is_dir():
            return any(_NAME.fullmatch(file.name) for file in path.iterdir())
        if not path.is_file():
            return False
        try:
            with path.open("rb") as file:
                first = json.loads(file.readline(MAX_LINE_BYTES))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(first, dict) and first.get("kind") == "header" and "settings" in first

    def count(self, limit: int | None = None) -> int:
        """Answers, and lines that cannot be read."""
        total = len(self._last) + self._damaged
        return total if limit is None else min(limit, total)

    def rows(self, columns: Sequence[str], limit: int | None = None) -> Iterator[Row]:
        """Number and fields of each answer, or what is wrong with its line; all its fields.

        Raises:
            InputFileError: If a file cannot be read on.
        """
        return islice(enumerate(self._rows(), start=1), limit)

    def _rows(self) -> Iterator[Mapping[str, Any] | InputFileError]:
        for file, settings, name, offset, found in self._lines():
            if settings is None and (not name or self._last.get(name) == (file, offset)):
                yield found

    def _lines(self) -> Iterator[tuple[Path, dict[str, Any] | None, str, int, Any]]:
        """File, settings of a header, id and place of an entry, and the entry, or what is wrong with it."""
        files = [self.path]
        if self.path.is_dir():
            files = sorted(file for file in self.path.iterdir() if _NAME.fullmatch(file.name))
        try:
            for file in files:
                for line in read_journal(file, _LEDGER):
                    found = InputFileError(line.damage) if line.damage else line.entry
                    yield file, line.settings, line.id, line.offset, found
        except ResultFileError as error:
            raise InputFileError(str(error)) from error

    def _agree(self, file: Path, settings: dict[str, Any]) -> None:
        if differing := check_settings(self.settings, settings):
            name, found, other = differing
            raise InputFileError(
                f"{file}: answers with {name} {other!r}, another file of this folder has {found!r}: read one "
                "evaluation at a time"
            )
        self.settings = {**self.settings, **settings}
