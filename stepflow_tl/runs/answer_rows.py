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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from stepflow_tl.errors import InputFileError, ResultFileError
from stepflow_tl.results.journal_lines import Line, read_journals
from stepflow_tl.runs.answer_file import ANSWERS
from stepflow_tl.runs.row_files import MAX_LINE_BYTES, Row, Unit

_LEDGER = replace(ANSWERS, check=dict)  # rows are read as any other: `records` checks their fields


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
        for file, line in self._lines():
            if line.settings is not None:
                self.settings = {**self.settings, **line.settings}
            elif line.damage:
                self._damaged += 1
            else:
                self._last[line.id] = (file, line.offset)

    @staticmethod
    def are_at(path: Path) -> bool:
        """Whether there is a ledger of answers at `path`, or a folder with one."""
        if path.is_dir():
            return bool(ANSWERS.files(path))
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
        for file, line in self._lines():
            if line.damage:
                yield InputFileError(line.damage)
            elif line.settings is None and self._last.get(line.id) == (file, line.offset):
                yield line.entry

    def _lines(self) -> Iterator[tuple[Path, Line]]:
        files = ANSWERS.files(self.path) if self.path.is_dir() else [self.path]
        try:
            yield from read_journals(files, _LEDGER)
        except ResultFileError as error:
            raise InputFileError(str(error)) from error
