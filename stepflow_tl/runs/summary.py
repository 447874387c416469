"""`summarize`: the folder of a run in numbers, without loading a map that need not be loaded.

1. Read the manifests (`manifest`).
2. One pass over the traces (`inventory`): each adds its rows to the Parquet table (`layer_table`) and 21
   numbers to the band means; where a trace has a group, its diagnosis is kept for the comparison.
3. Band means with intervals (`band_means`), and the comparison of the two groups (`diagnostics.grouping`).

Cost: RESULTS.md has the figures for 10 000 traces. Memory grows by some 4 kB a trace that a
manifest names, and by as much again where it has a group.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepflow_tl.diagnosis import LAYER_METRICS, Comparison, compare_groups, left_out, pairing_field
from stepflow_tl.errors import ComparisonError, ResultFileError
from stepflow_tl.results.tables import html_table, number, printable, text_table
from stepflow_tl.runs.band_means import BandMean, band_means, band_row
from stepflow_tl.runs.inventory import Problem, TraceNumbers, traces
from stepflow_tl.runs.layer_table import layer_table
from stepflow_tl.runs.manifest_reading import ManifestIndex, read_manifests

_MAX_LISTED = 10

Labels = Mapping[str, tuple[bool | None, str | None]]
"""Group and problem of each trace, by id."""


@dataclass(frozen=True)
class Aggregate:
    """The numbers of a run.

    Attributes:
        folder: The run folder.
        n_traces: Traces with numbers.
        n_tokens: Their tokens.
        seconds: Wall-clock time of their analyses, where it was written down.
        model_name: Model that was analysed.
        objective: Objective that was differentiated.
        dtype: Floating dtype of the model's weights.
        layers: Model layers of the metrics.
        n_layers: Layers of the whole model.
        backends: How many traces each backend analysed.
        means: Band means over the traces, with intervals.
        confidence: Coverage of the intervals.
        comparison: The two groups compared, or None.
        notes: What the comparison left out, or why there is none.
        problems: Traces without numbers.
        parquet: The table that was written, or None.
    """

    folder: Path
    n_traces: int
    n_tokens: int
    seconds: float
    model_name: str
    objective: str
    dtype: str
    layers: tuple[int, ...]
    n_layers: int
    backends: Mapping[str, int]
    means: tuple[BandMean, ...]
    confidence: float
    comparison: Comparison | None
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]
    parquet: Path | None

    @property
    def is_whole(self) -> bool:
        """Whether every result of the run is there and whole; traces that failed in the run do not count."""
        return all(problem.kind == "failed" for problem in self.problems)

    def mean(self, metric: str, band: str | None = None) -> BandMean:
        """The mean of one metric in one band.

        Args:
            metric: One of `LAYER_METRICS`, or "decay_slope".
            band: "shallow" or "deep"; None for the slope.

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
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data |= {
            "folder": str(self.folder),
            "parquet": None if self.parquet is None else str(self.parquet),
            "layers": list(self.layers),
            "backends": dict(self.backends),
            "means": [_plain(asdict(mean)) for mean in self.means],
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "notes": list(self.notes),
            "problems": [asdict(problem) for problem in self.problems],
        }
        return _plain(data)

    def __str__(self) -> str:
        """Band means with intervals, then what is missing and why."""
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def __repr__(self) -> str:
        """One line: how many traces, of which model."""
        return (
            f"Aggregate({self.n_traces} traces, {len(self.problems)} without numbers, "
            f"objective={self.objective!r}, model={self.model_name!r})"
        )

    def _table(self) -> tuple[str, list[str], list[list[str]], list[str]]:
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
        return title, header, rows, self._footer()

    def _footer(self) -> list[str]:
        backends = ", ".join(f"{name} {count}" for name, count in self.backends.items())
        lines = [f"{self.n_tokens} tokens, {len(self.layers)} of {self.n_layers} layers; backend: {backends}"]
        lines.append("intervals: BCa bootstrap over traces; shares depend on the number of steps")
        counts = Counter(problem.kind for problem in self.problems)
        if counts:
            lines.append(", ".join(f"{count} {kind}" for kind, count in counts.items()) + ":")
        reasons = Counter((problem.kind, problem.reason) for problem in self.problems).most_common()
        for (kind, reason), count in reasons[:_MAX_LISTED]:
            lines.append(f"  {f'{count} x ' if count > 1 else ''}{kind}: {printable(reason)}")
        if len(reasons) > _MAX_LISTED:
            lines.append(f"  and {len(reasons) - _MAX_LISTED} other reasons: see Aggregate.problems")
        return lines


def summarize(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    group_by: str | None = None,
    pair_by: str | None = None,
    unpaired: bool = False,
    labels: Labels | None = None,
    verify: bool = False,
    confidence: float = 0.95,
    n_bootstrap: int = 4000,
    n_permutations: int = 9999,
    seed: int = 0,
) -> Aggregate:
    """The numbers of a run folder: band means with intervals, and its two groups compared.

    Args:
        folder: Folder that `analyze` wrote, or any folder of `StepSaliency.save` files of one analysis.
        out: Parquet file to write, one row a trace and layer; none by default. See `layer_table`.
        group_by: What the groups are called, as in `analyze --group-by`; the manifest's own by default.
        pair_by: What the problems are called; `problem_id` by default where the traces have problems.
        unpaired: Compare without pairing.
        labels: Group and problem of each trace by id, in place of the manifest's.
        verify: Compare every file with the SHA-256 in its manifest.
        confidence: Coverage of the intervals.
        n_bootstrap: Bootstrap resamples.
        n_permutations: Permutations of the comparison.
        seed: Of all resampling.

    Raises:
        ResultFileError: If the folder cannot be read, has no result, mixes analyses, or a manifest is damaged
            or of a later schema.
        ComparisonError: If the run was grouped by another field than `group_by`, and there are no labels.
        MissingExtraError: If `out` is given and pyarrow is not installed.
        ValueError: If a level or a count is out of range.
    """
    if not 0 < confidence < 1 or n_bootstrap < 1 or n_permutations < 1:
        raise ValueError(
            f"confidence is {confidence}, n_bootstrap {n_bootstrap}, n_permutations {n_permutations}: "
            "expected a level between 0 and 1, and at least one of each"
        )
    folder = Path(folder)
    if not folder.is_dir():
        raise ResultFileError(f"{folder} is no folder: expected one that `analyze --out` wrote")
    target = None if out is None else Path(out)
    index = read_manifests(folder)
    named = None if index.settings is None else index.settings.group_by
    if labels is None and group_by is not None and named is not None and named != group_by:
        raise ComparisonError(
            f"the traces of {folder} were grouped by {named!r}, not by {group_by!r}: pass labels "
            "(--labels on the command line)"
        )
    totals = _Totals()
    totals.problems += [Problem("", "damaged", reason) for reason in index.damaged]
    with layer_table(target) if target is not None else contextlib.nullcontext() as table:
        for found in traces(folder, index, verify=verify):
            if isinstance(found, Problem):
                totals.problems.append(found)
                continue
            trace = found if labels is None else _labelled(found, labels)
            totals.add(trace)
            if table is not None:
                table.add(trace)
        if totals.first is None:  # inside, so that no empty table is written
            raise ResultFileError(_nothing(folder, index, totals.problems))
    first = totals.first
    comparison, notes = None, ["no trace has a group: nothing to compare"]
    if totals.grouped:
        name = group_by or named or "group"
        pairing = pairing_field(totals.grouped, pair_by, unpaired=unpaired)
        try:
            comparison, notes = compare_groups(
                totals.grouped,
                name,
                pairing,
                confidence=confidence,
                n_bootstrap=n_bootstrap,
                n_permutations=n_permutations,
                seed=seed,
            )
        except ComparisonError as error:
            notes = [f"no comparison by {name}: {error}"]
        else:
            notes = left_out(totals.n_traces - len(totals.grouped), name) + notes
    return Aggregate(
        folder=folder,
        n_traces=totals.n_traces,
        n_tokens=totals.n_tokens,
        seconds=totals.seconds,
        model_name=first.diagnosis.model_name,
        objective=first.diagnosis.objective,
        dtype=first.dtype,
        layers=first.diagnosis.layers,
        n_layers=first.diagnosis.n_layers,
        backends=dict(totals.backends.most_common()),
        means=band_means(totals.rows, confidence=confidence, n_bootstrap=n_bootstrap, seed=seed),
        confidence=confidence,
        comparison=comparison,
        notes=tuple(notes),
        problems=(
            *(Problem(f.id, "failed", f"{f.error}: {f.reason}") for f in index.failed),
            *totals.problems,
        ),
        parquet=target,
    )


class _Totals:
    """What is kept of the traces while they pass by."""

    def __init__(self) -> None:
        self.first: TraceNumbers | None = None
        self.n_traces = self.n_tokens = 0
        self.seconds = 0.0
        self.backends: Counter[str] = Counter()
        self.rows: list[np.ndarray] = []
        self.grouped: list[TraceNumbers] = []
        self.problems: list[Problem] = []

    def add(self, trace: TraceNumbers) -> None:
        self.first = self.first or trace
        self.n_traces += 1
        self.n_tokens += trace.n_tokens
        self.seconds += 0.0 if math.isnan(trace.seconds) else trace.seconds
        self.backends[trace.backend] += 1
        self.rows.append(band_row(trace.diagnosis))
        if trace.group is not None:
            self.grouped.append(trace)


def _labelled(trace: TraceNumbers, labels: Labels) -> TraceNumbers:
    group, pair = labels.get(trace.id, (None, None))
    return replace(trace, group=group, pair=pair)


def _nothing(folder: Path, index: ManifestIndex, problems: list[Problem]) -> str:
    reasons = [(f.error, f.reason) for f in index.failed] + [(p.kind, p.reason) for p in problems]
    if not reasons:
        return f"{folder} holds no result: expected a manifest of `analyze`, or files of StepSaliency.save"
    return f"no trace of {folder} has a result; {len(reasons)} have none, the first: {': '.join(reasons[0])}"


def _cells(mean: BandMean | None) -> list[str]:
    return ["", "", ""] if mean is None else [number(mean.mean), number(mean.low), number(mean.high)]


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value for key, value in data.items()
    }
