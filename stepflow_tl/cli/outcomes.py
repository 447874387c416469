"""What became of each trace, as numbers only: a run over thousands of traces keeps no map.

`summary_csv` has one row a line of the input, `summary_table` the means over the traces. A band metric of
a trace is its mean over the layers of the band (`Diagnosis.band`); the table's number is the mean of that
over the traces that have a value, every trace counted once.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from stepflow_tl.causal.agreement import TraceAgreement
from stepflow_tl.cli.console import printable
from stepflow_tl.diagnostics import LAYER_METRICS, Diagnosis
from stepflow_tl.diagnostics.diagnosis import Band
from stepflow_tl.diagnostics.tables import number, text_table

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

    @property
    def place(self) -> str:
        """The line, and the id where it is known, safe to print."""
        return f"line {self.line}" + (f", id '{printable(self.id)}'" if self.id else "")


def summary_csv(outcomes: Sequence[Outcome]) -> str:
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


def summary_table(outcomes: Sequence[Outcome]) -> str:
    """Band means over the traces, then how many were analysed, kept and failed, and why."""
    diagnoses = [outcome.diagnosis for outcome in outcomes if outcome.diagnosis is not None]
    footer = _counts(outcomes)
    if not diagnoses:
        return "\n".join(["No trace has a result.", *footer])
    bands = {band: [diagnosis.band(band) for diagnosis in diagnoses] for band in _BANDS}
    rows = []
    for metric in LAYER_METRICS:
        values = [_present([means[metric] for means in bands[band]]) for band in _BANDS]
        counts = dict.fromkeys(str(len(v)) for v in values)
        rows.append([metric.replace("_", " "), *(number(_mean(v)) for v in values), ", ".join(counts)])
    slopes = _present([diagnosis.decay_slope for diagnosis in diagnoses])
    rows.append(["decay slope", "", number(_mean(slopes)), str(len(slopes))])
    first = diagnoses[0]
    title = f"Means over {len(diagnoses)} traces: {first.model_name}, objective {first.objective}"
    return text_table(title, ["metric", "shallow layers", "deep layers", "traces"], rows, footer)


def _counts(outcomes: Sequence[Outcome]) -> list[str]:
    count = Counter(outcome.status for outcome in outcomes)
    analysed = [outcome for outcome in outcomes if outcome.status == "analysed"]
    seconds = sum(outcome.seconds for outcome in analysed)
    speed = ""
    if analysed and seconds:
        tokens = sum(outcome.n_tokens for outcome in analysed)
        speed = f" ({seconds / len(analysed):.2f} s and {tokens / len(analysed):.0f} tokens a trace)"
    lines = [f"{count['analysed']} analysed{speed}, {count['kept']} kept, {count['failed']} failed"]
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    lines += [f"  {outcome.place}: {printable(outcome.reason)}" for outcome in failed[:_MAX_LISTED]]
    if len(failed) > _MAX_LISTED:
        lines.append(f"  and {len(failed) - _MAX_LISTED} more: see the column reason of summary.csv")
    return lines


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


def _present(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
