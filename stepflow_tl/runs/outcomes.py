"""What became of each trace, as numbers only: a run over thousands of traces keeps no map.

`summary_csv` has one row a line of the input, `summary_table` the means over the traces. A band metric of
a trace is its mean over the layers of the band (`Diagnosis.band`); the table's number is the mean of that
over the traces that have a value, every trace counted once.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from stepflow_tl.causal.agreement import TraceAgreement
from stepflow_tl.diagnosis import LAYER_METRICS, Diagnosis
from stepflow_tl.diagnosis.diagnosis import Band
from stepflow_tl.results.tables import number, printable, text_table
from stepflow_tl.runs.records import Unit

Status = Literal["analysed", "kept", "failed"]

_MAX_LISTED = 10
_BANDS = get_args(Band)


@dataclass(frozen=True)
class Outcome:
    """One line of the input after the run.

    Attributes:
        line: Line number in the input.
        id: Trace id; empty where the line could not be read.
        status: "analysed" in this run, "kept" from an earlier one, or "failed".
        reason: Why it failed; empty otherwise.
        file: Name of the result file; empty where it failed.
        n_tokens: Tokens of the trace; 0 where it failed.
        seconds: Wall-clock time of the analysis; 0 where there was none.
        diagnosis: Its measures, or None where it failed.
        group: Value of the grouping field, if there is one.
        pair: Value of the pairing field, if there is one.
        agreement: Agreement of its map with knockout and attention, where `--causal` asked for it.
        unit: What `line` counts.
    """

    line: int
    id: str
    status: Status
    reason: str = ""
    file: str = ""
    n_tokens: int = 0
    seconds: float = 0.0
    diagnosis: Diagnosis | None = None
    group: bool | None = None
    pair: str | None = None
    agreement: TraceAgreement | None = None
    unit: Unit = "line"

    @property
    def place(self) -> str:
        """The line, and the id where it is known, safe to print."""
        return f"{self.unit} {self.line}" + (f", id '{printable(self.id)}'" if self.id else "")


def summary_csv(outcomes: Iterable[Outcome]) -> str:
    """One row a line of the input; a value that does not exist is an empty cell."""
    names = [f"{band}_{metric}" for band in _BANDS for metric in LAYER_METRICS]
    columns = ["line", "id", "status", "reason", "file", "n_tokens", "n_question", "n_thinking", "n_summary"]
    buffer = io.StringIO()
    writer = csv.DictWriter(
        buffer, [*columns, "seconds", "group", "pair", *names, "decay_slope"], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(_row(outcome) for outcome in outcomes)
    return buffer.getvalue()


class SummaryTable:
    """Adds up outcomes one by one; as a string: band means, then how many were analysed, kept and failed."""

    def __init__(self) -> None:
        """Nothing is added yet."""
        self.counts: Counter[Status] = Counter()
        self._title = ""
        self._cells: dict[tuple[str, str], list[float]] = {}
        self._slopes: list[float] = []
        self._failed: list[Outcome] = []
        self._seconds, self._tokens = 0.0, 0

    def add(self, outcome: Outcome) -> None:
        """Count one line of the input; its diagnosis is not held."""
        self.counts[outcome.status] += 1
        if outcome.status == "analysed":
            self._seconds += outcome.seconds
            self._tokens += outcome.n_tokens
        if outcome.status == "failed" and len(self._failed) < _MAX_LISTED:
            self._failed.append(outcome)
        diagnosis = outcome.diagnosis
        if diagnosis is None:
            return
        self._title = self._title or f"{diagnosis.model_name}, objective {diagnosis.objective}"
        for band in _BANDS:
            for metric, value in diagnosis.band(band).items():
                if not math.isnan(value):
                    self._cells.setdefault((metric, band), []).append(value)
        if not math.isnan(diagnosis.decay_slope):
            self._slopes.append(diagnosis.decay_slope)

    @property
    def n_results(self) -> int:
        """Traces with a result."""
        return self.counts["analysed"] + self.counts["kept"]

    def __str__(self) -> str:
        """The table."""
        footer = self._footer()
        if not self.n_results:
            return "\n".join(["No trace has a result.", *footer])
        rows = []
        for metric in LAYER_METRICS:
            values = [self._cells.get((metric, band), []) for band in _BANDS]
            counts = dict.fromkeys(str(len(v)) for v in values)
            rows.append([metric.replace("_", " "), *(number(_mean(v)) for v in values), ", ".join(counts)])
        rows.append(["decay slope", "", number(_mean(self._slopes)), str(len(self._slopes))])
        title = f"Means over {self.n_results} traces: {self._title}"
        return text_table(title, ["metric", "shallow layers", "deep layers", "traces"], rows, footer)

    def _footer(self) -> list[str]:
        analysed, failed = self.counts["analysed"], self.counts["failed"]
        speed = ""
        if analysed and self._seconds:
            speed = f" ({self._seconds / analysed:.2f} s and {self._tokens / analysed:.0f} tokens a trace)"
        lines = [f"{analysed} analysed{speed}, {self.counts['kept']} kept, {failed} failed"]
        lines += [f"  {outcome.place}: {printable(outcome.reason)}" for outcome in self._failed]
        if failed > _MAX_LISTED:
            lines.append(f"  and {failed - _MAX_LISTED} more: see the column reason of summary.csv")
        return lines


def summary_table(outcomes: Iterable[Outcome]) -> str:
    """Band means over the traces, then how many were analysed, kept and failed, and why."""
    table = SummaryTable()
    for outcome in outcomes:
        table.add(outcome)
    return str(table)


def _row(outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {
        "line": outcome.line,
        "id": outcome.id,
        "status": outcome.status,
        "reason": outcome.reason,
        "file": outcome.file,
        "seconds": f"{outcome.seconds:.3f}" if outcome.seconds else "",
        "group": "" if outcome.group is None else str(outcome.group).lower(),
        "pair": outcome.pair or "",
    }
    diagnosis = outcome.diagnosis
    if diagnosis is None:
        return row
    row["n_tokens"] = outcome.n_tokens
    row |= {name: getattr(diagnosis, name) for name in ("n_question", "n_thinking", "n_summary")}
    for band in _BANDS:
        row |= {f"{band}_{metric}": _cell(value) for metric, value in diagnosis.band(band).items()}
    return {**row, "decay_slope": _cell(diagnosis.decay_slope)}


def _cell(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
