"""`Aggregate`, the numbers of the traces of a folder, and `DatasetReport`, those of a run at its end.

The band means:

1. A trace's band metric is its mean over the stored layers of the band (`Diagnosis.band`).
2. The mean over the traces that have a value, every trace counted once.
3. Its BCa bootstrap interval, traces resampled; `statistics.effects` computes it, as that of a paired
   difference from 0.

Several traces of one problem are not independent, and the intervals do not know: they are then too narrow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from stepflow_tl.causal.agreement import AgreementSummary
from stepflow_tl.diagnosis import LAYER_METRICS, Comparison, Diagnosis
from stepflow_tl.diagnosis.diagnosis import Band
from stepflow_tl.errors import ComparisonError
from stepflow_tl.results.plain_data import plain_fields
from stepflow_tl.results.tables import html_table, number, printable, text_table
from stepflow_tl.runs.manifest import RunSettings
from stepflow_tl.runs.outcomes import Outcome, Status
from stepflow_tl.statistics.effects import Resampling, column_effects

_MAX_LISTED = 10
_NO_NUMBERS = ("failed", "missing", "damaged", "unsafe")

Table = tuple[str, list[str], list[list[str]], list[str]]
Stop = Literal["", "interrupted", "disk full"]
"""Why a run ended early."""

COLUMNS: tuple[tuple[str, Band | None], ...] = (
    *((metric, band) for band in get_args(Band) for metric in LAYER_METRICS),
    ("decay_slope", None),
)


@dataclass(frozen=True)
class BandMean:
    """Mean over traces of one metric in one band.

    Attributes:
        metric: One of `LAYER_METRICS`, or "decay_slope".
        band: "shallow" or "deep"; None for the slope.
        n: Traces with a value.
        mean: Their mean; NaN without any.
        low: Lower end of its interval; NaN with fewer than two traces.
        high: Upper end.
    """

    metric: str
    band: Band | None
    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Aggregate:
    """The numbers of a run.

    Attributes:
        folder: The run folder.
        n_traces: Traces with numbers.
        n_tokens: Their tokens.
        seconds: Wall-clock time of their analyses, where it was written down.
        model_name: Model that was analysed; this and the next five are empty or 0 without a trace.
        objective: Objective that was differentiated.
        dtype: Floating dtype of the model's weights.
        stepflow: The repair that was on the model; None for the plain one.
        layers: Model layers of the metrics.
        n_layers: Layers of the whole model.
        backends: How many traces each backend analysed.
        means: Band means over the traces, with intervals.
        confidence: Coverage of the intervals.
        comparison: The two groups compared, or None.
        paired_by: Field that the comparison is paired by, or None.
        agreement: Saliency against knockout, where the run was asked for it.
        notes: What the comparison left out, or why there is none.
        problems: Traces without numbers.
        parquet: The table that was written, or None.
        counts: How many traces have which status.
    """

    folder: Path
    n_traces: int
    n_tokens: int
    seconds: float
    model_name: str
    objective: str
    dtype: str
    stepflow: str | None
    layers: tuple[int, ...]
    n_layers: int
    backends: Mapping[str, int]
    means: tuple[BandMean, ...]
    confidence: float
    comparison: Comparison | None
    paired_by: str | None
    agreement: AgreementSummary | None
    notes: tuple[str, ...]
    problems: tuple[Outcome, ...]
    parquet: Path | None
    counts: Mapping[Status, int]

    @property
    def is_whole(self) -> bool:
        """Whether every result of the run is there and whole; traces that failed in the run do not count."""
        return all(problem.status == "failed" for problem in self.problems)

    def mean(self, metric: str, band: str | None = None) -> BandMean:
        """The mean of one metric in one band.

        Args:
            metric: One of `LAYER_METRICS`, or "decay_slope".
            band: "shallow" or "deep"; None for "decay_slope".

        Raises:
            ComparisonError: If there is no such metric or band.
        """
        for found in self.means:
            if (found.metric, found.band) == (metric, band):
                return found
        known = ", ".join((*LAYER_METRICS, "decay_slope"))
        raise ComparisonError(
            f"no mean of {metric!r} in band {band!r}: expected one of {known}, shallow or deep"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; NaN is written as None, so that any JSON reader takes it."""
        named = {"folder": str(self.folder), "parquet": None if self.parquet is None else str(self.parquet)}
        problems = [{"id": each.id, "kind": each.status, "reason": each.reason} for each in self.problems]
        return {**plain_fields(replace(self, problems=())), **named, "problems": problems}

    def __str__(self) -> str:
        """Band means with intervals, then what is missing and why."""
        return _text(self._table(self._footer()))

    def _repr_html_(self) -> str:
        return html_table(*self._table(self._footer()))

    def __repr__(self) -> str:
        """One line: how many traces, of which model."""
        return (
            f"Aggregate({self.n_traces} traces, {len(self.problems)} without numbers, "
            f"objective={self.objective!r}, model={self.model_name!r})"
        )

    def _table(self, footer: list[str]) -> Table:
        if not self.n_traces:
            return "No trace has a result.", [], [], footer
        percent = f"{100 * self.confidence:g}%"
        rows = []
        for metric in (*LAYER_METRICS, "decay_slope"):
            is_slope = metric == "decay_slope"
            shallow = None if is_slope else self.mean(metric, "shallow")
            deep = self.mean(metric, None if is_slope else "deep")
            counts = dict.fromkeys(str(mean.n) for mean in (shallow, deep) if mean is not None)
            rows.append([metric.replace("_", " "), *_cells(shallow), *_cells(deep), ", ".join(counts)])
        header = ["metric", "shallow layers", f"{percent} low", f"{percent} high"]
        header += ["deep layers", f"{percent} low", f"{percent} high", "traces"]
        title = (
            f"Means over {self.n_traces} traces: {self.model_name}, objective {self.objective}, {self.dtype}"
        )
        if self.stepflow is not None:
            title += f", under {self.stepflow}"
        return title, header, rows, footer

    def _footer(self) -> list[str]:
        backends = ", ".join(f"{name} {count}" for name, count in self.backends.items())
        lines = [f"{self.n_tokens} tokens, {len(self.layers)} of {self.n_layers} layers; backend: {backends}"]
        lines.append("intervals: BCa bootstrap over traces; shares depend on the number of steps")
        counts = [f"{self.counts[status]} {status}" for status in _NO_NUMBERS if self.counts.get(status)]
        if counts:
            lines.append(f"{', '.join(counts)}:")
        reasons = Counter((problem.status, problem.reason) for problem in self.problems).most_common()
        for (status, reason), count in reasons[:_MAX_LISTED]:
            lines.append(f"  {f'{count} x ' if count > 1 else ''}{status}: {printable(reason)}")
        if len(reasons) > _MAX_LISTED:
            lines.append(f"  and {len(reasons) - _MAX_LISTED} other reasons: see Aggregate.problems")
        return lines


@dataclass(frozen=True)
class DatasetReport:
    """The end of a run.

    Attributes:
        out: The folder.
        settings: What all results have in common.
        total: Rows of the input, or of this shard of it.
        stopped: Why the run ended early; empty if it did not.
        aggregate: The numbers of the rows that were dealt with.
        speed: Seconds and tokens per trace that was analysed in this run; None without any.
        notes: What was left out of the comparison.
        problems: What could not be compared or written, and why.
        written: Files beside the results.
    """

    out: Path
    settings: RunSettings
    total: int
    stopped: Stop
    aggregate: Aggregate
    speed: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    written: tuple[Path, ...] = ()

    @property
    def counts(self) -> Mapping[Status, int]:
        """How many traces were analysed, kept and failed."""
        return self.aggregate.counts

    @property
    def agreement(self) -> AgreementSummary | None:
        """Saliency against knockout, where that was asked for."""
        return self.aggregate.agreement

    @property
    def comparison(self) -> Comparison | None:
        """Of the two groups, where that was asked for and can be made."""
        return self.aggregate.comparison

    @property
    def paired_by(self) -> str | None:
        """Field that the comparison is paired by."""
        return self.aggregate.paired_by

    @property
    def is_complete(self) -> bool:
        """Every row has a result, and everything that was asked for could be made."""
        return not self.stopped and not self.aggregate.problems and not self.problems

    @property
    def table(self) -> str:
        """Band means over the traces, the counts, and the first failures with their reasons."""
        counts, problems = self.counts, self.aggregate.problems
        speed = ""
        if self.speed is not None:
            speed = f" ({self.speed[0]:.2f} s and {self.speed[1]:.0f} tokens per trace)"
        line = f"{counts.get('analysed', 0)} analysed{speed}, {counts.get('kept', 0)} kept"
        others: tuple[Status, ...] = ("missing", "damaged", "unsafe")
        bad = [f"{counts[status]} {status}" for status in others if counts.get(status)]
        lines = [", ".join([line, *bad, f"{counts.get('failed', 0)} failed"])]
        lines += [f"  {problem.place}: {printable(problem.reason)}" for problem in problems[:_MAX_LISTED]]
        if len(problems) > _MAX_LISTED:
            lines.append(f"  and {len(problems) - _MAX_LISTED} more: see the column reason of summary.csv")
        return _text(self.aggregate._table(lines))

    def __str__(self) -> str:
        """The table."""
        return self.table


def band_row(diagnosis: Diagnosis) -> Float[np.ndarray, " column"]:
    """What one trace contributes; columns as in `COLUMNS`."""
    values = [value for band in get_args(Band) for value in diagnosis.band(band).values()]
    return np.array([*values, diagnosis.decay_slope])


def band_means(
    rows: Sequence[Float[np.ndarray, " column"]], *, confidence: float, n_bootstrap: int, seed: int
) -> tuple[BandMean, ...]:
    """Mean and interval of each of `COLUMNS`.

    Args:
        rows: One `band_row` per trace, at least one.
        confidence: Coverage of the intervals.
        n_bootstrap: Resamples.
        seed: Of the resamples.
    """
    values = np.stack(rows)
    # The permutation p of that comparison is not asked for.
    resampling = Resampling(confidence, n_bootstrap, n_permutations=1, seed=seed)
    found = column_effects(values, np.zeros_like(values), paired=True, resampling=resampling)
    return tuple(
        BandMean(
            metric,
            band,
            int(found["n"][column]),
            mean=float(found["mean"][column]),
            low=float(found["low"][column]),
            high=float(found["high"][column]),
        )
        for column, (metric, band) in enumerate(COLUMNS)
    )


def _text(table: Table) -> str:
    title, header, rows, footer = table
    return text_table(title, header, rows, footer) if rows else "\n".join([title, *footer])


def _cells(mean: BandMean | None) -> list[str]:
    return ["", "", ""] if mean is None else [number(mean.mean), number(mean.low), number(mean.high)]
