"""`summarize`: the folder of a run in numbers, without loading a map that need not be loaded.

1. Read the manifests (`manifest`), and look at the traces one by one (`outcomes`).
2. One pass over them: each adds its rows to the Parquet table (`layer_table`) and 21 numbers to the band
   means; where a trace has a group, its numbers are kept for the comparison, and its agreement with a
   knockout where it has one.
3. Band means with intervals (`aggregate`), the comparison of the two groups (`diagnosis.grouping`), and the
   agreement over the traces (`causal.agreement`).

`analyze_dataset` ends with steps 2 and 3 on the rows that it dealt with (`report_run`).

A manifest's line names the field that its group was read from. Groups of one name are never compared under
another: that is refused, unless `labels` bring groups of their own.

Cost: RESULTS.md has the figures for 10 000 traces. Memory grows by some 6 kB per trace that a manifest names.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stepflow_tl.causal.agreement import summarise_agreement
from stepflow_tl.diagnosis import Comparison, compare_groups, left_out, pairing_field
from stepflow_tl.errors import ComparisonError, ResultFileError
from stepflow_tl.results.files import write_atomically
from stepflow_tl.runs.aggregate import Aggregate, DatasetReport, Stop, band_means, band_row
from stepflow_tl.runs.layer_table import layer_table
from stepflow_tl.runs.manifest import RunSettings, read_manifests
from stepflow_tl.runs.options import RunOptions, SummaryOptions
from stepflow_tl.runs.outcomes import Outcome, Status, agreement_csv, folder_outcomes, summary_csv

Labels = Mapping[str, tuple[bool | None, str | None]]
"""Group and problem of each trace, by id."""


def summarize(
    folder: str | Path, *, out: str | Path | None = None, labels: Labels | None = None, **options: Any
) -> Aggregate:
    """The numbers of a run folder: band means with intervals, and its two groups compared.

    Args:
        folder: Folder that `analyze` wrote, or any folder of `StepSaliency.save` files of one analysis.
        out: Parquet file to write, one row per trace and layer; none by default. See `layer_table`.
        labels: Group and problem of each trace by id, in place of the manifest's.
        **options: Those of `SummaryOptions`, by name: group_by, pair_by, unpaired, match_on, verify,
            confidence, n_bootstrap, n_permutations, seed.

    Raises:
        ResultFileError: If the folder cannot be read, has no result, mixes analyses, or a manifest is damaged
            or of a later schema.
        ComparisonError: If the run was grouped, or paired, by another field than `group_by` or `pair_by`, and
            there are no labels.
        MissingExtraError: If `out` is given and pyarrow is not installed.
        TypeError: If an option is unknown.
        ValueError: If a level or a count is out of range.
    """
    asked = SummaryOptions.of("summarize", options)
    folder = Path(folder)
    if not folder.is_dir():
        raise ResultFileError(f"{folder} is not a folder: expected one that `analyze --out` wrote")
    outcomes = folder_outcomes(folder, read_manifests(folder), verify=asked.verify)
    return aggregate(
        outcomes if labels is None else (_labelled(outcome, labels, asked) for outcome in outcomes),
        asked,
        folder=folder,
        parquet=None if out is None else Path(out),
        needs_result=True,
    )


def aggregate(
    outcomes: Iterable[Outcome],
    options: SummaryOptions,
    *,
    folder: Path,
    parquet: Path | None = None,
    needs_result: bool = False,
    compares: bool = True,
) -> Aggregate:
    """The numbers of the traces of a folder.

    Args:
        outcomes: What became of each trace; read once.
        options: What is compared, and how.
        folder: The folder.
        parquet: Table to write, or None.
        needs_result: Refuse, before a table is written, where no trace has a result.
        compares: Compare the groups, and average the agreement with the knockouts.

    Raises:
        ComparisonError: If the traces were grouped, or paired, by another field than the options name.
        ResultFileError: If no trace has a result, and one is needed; or the table cannot be written.
        MissingExtraError: If there is a table to write and pyarrow is not installed.
    """
    totals = _Totals()
    with layer_table(parquet) if parquet is not None else contextlib.nullcontext() as table:
        for outcome in outcomes:
            totals.add(outcome, holds=compares)
            if table is not None and outcome.done is not None:
                table.add(outcome)
        if needs_result and totals.first is None:  # inside, so that no empty table is written
            raise ResultFileError(_nothing(folder, totals.problems))
        comparison, paired_by, notes = _comparison(totals, options, folder)  # it may refuse, likewise
    level = {"confidence": options.confidence, "n_bootstrap": options.n_bootstrap, "seed": options.seed}
    agreements = [outcome.agreement for outcome in totals.held if outcome.agreement is not None]
    first = totals.first
    facts: dict[str, Any] = dict(model_name="", objective="", dtype="", stepflow=None, layers=(), n_layers=0)
    if first is not None and first.diagnosis is not None:
        names = ("model_name", "objective", "layers", "n_layers")
        measured = {name: getattr(first.diagnosis, name) for name in names}
        facts = {**measured, "dtype": first.dtype, "stepflow": first.stepflow}
    return Aggregate(
        folder=folder,
        n_traces=len(totals.rows),
        n_tokens=totals.n_tokens,
        seconds=totals.seconds,
        **facts,
        backends=dict(totals.backends.most_common()),
        means=band_means(totals.rows, **level) if totals.rows else (),
        confidence=options.confidence,
        comparison=comparison,
        paired_by=paired_by,
        agreement=summarise_agreement(agreements) if agreements else None,
        notes=tuple(notes),
        problems=tuple(totals.problems),
        parquet=parquet,
        counts=dict(totals.counts),
    )


def report_run(
    outcomes: Iterable[Outcome],
    options: RunOptions,
    *,
    out: Path,
    settings: RunSettings,
    total: int,
    stopped: Stop,
) -> DatasetReport:
    """Summarise the rows of a run, write its files and report; after a full disk, nothing is written.

    A shard writes its own `summary-<i>-of-<n>.csv` and compares nothing: half a data set is no sample of it.

    Args:
        outcomes: What became of each row, in the order of the input; read once.
        options: Of the run.
        out: The folder.
        settings: What all results have in common.
        total: Rows of the input, or of the shard.
        stopped: Why the run ended early.
    """
    summary, agreements, part = summary_csv(), agreement_csv(), options.part
    seconds, tokens = [], []

    def written_down() -> Iterator[Outcome]:
        for outcome in outcomes:
            summary.add(outcome)
            agreements.add(outcome)
            if outcome.status == "analysed" and outcome.done is not None:
                seconds.append(outcome.seconds)
                tokens.append(outcome.done.n_tokens)
            yield outcome

    groups = SummaryOptions(
        group_by=options.group_by,
        pair_by=options.pair_by,
        unpaired=options.unpaired,
        match_on=options.match_on,
    )
    found = aggregate(written_down(), groups, folder=out, compares=part.count == 1)
    files = {f"summary{part.suffix}.csv": str(summary)}
    if found.agreement is not None:
        files["agreement.csv"] = str(agreements)
        files["agreement.json"] = json.dumps(found.agreement.to_json(), indent=1) + "\n"
    if found.comparison is not None:
        files["comparison.txt"] = f"{found.comparison}\n\n{found.comparison.full_table()}\n"
        files["comparison.json"] = json.dumps(found.comparison.to_json(), indent=1) + "\n"
    is_compared = options.group_by is not None and part.count == 1
    problems = list(found.notes) if is_compared and found.comparison is None else []
    written = []
    for name, text in files.items() if stopped != "disk full" else ():
        try:
            write_atomically(out / name, text.encode("utf-8", "backslashreplace"))
        except ResultFileError as error:
            problems.append(str(error))
        else:
            written.append(out / name)
    notes = () if found.comparison is None else found.notes
    speed = (sum(seconds) / len(seconds), sum(tokens) / len(tokens)) if seconds else None
    return DatasetReport(out, settings, total, stopped, found, speed, notes, tuple(problems), tuple(written))


class _Totals:
    """What is kept of the traces while they pass by."""

    def __init__(self) -> None:
        self.first: Outcome | None = None
        self.n_tokens, self.seconds = 0, 0.0
        self.counts: Counter[Status] = Counter()
        self.backends: Counter[str] = Counter()
        self.rows: list[np.ndarray] = []
        self.held: list[Outcome] = []
        self.problems: list[Outcome] = []

    def add(self, outcome: Outcome, *, holds: bool) -> None:
        self.counts[outcome.status] += 1
        if (done := outcome.done) is None:
            self.problems.append(outcome)
            return
        self.first = self.first or outcome
        self.n_tokens += done.n_tokens
        self.seconds += 0.0 if math.isnan(done.seconds) else done.seconds
        self.backends[outcome.backend] += 1
        self.rows.append(band_row(done.diagnosis))
        if holds and (done.group is not None or done.agreement is not None):
            self.held.append(outcome)


def _comparison(
    totals: _Totals, options: SummaryOptions, folder: Path
) -> tuple[Comparison | None, str | None, list[str]]:
    """The comparison, the field it is paired by, and what it left out; or None, None and why not."""
    traces = [outcome for outcome in totals.held if outcome.group is not None]
    if not traces:
        by = "" if options.group_by is None else f" by {options.group_by}"
        return None, None, [f"no comparison{by}: no trace has a group"]
    groups = [trace.done.group_by for trace in traces if trace.done]
    pairs = [trace.done.pair_by for trace in traces if trace.done and trace.pair is not None]
    try:
        name = _one_field(groups, options.group_by, "grouped", folder) or "group"
        pair_by = None if options.unpaired else _one_field(pairs, options.pair_by, "paired", folder)
    except ComparisonError as error:
        if options.group_by is not None or options.pair_by is not None:
            raise
        return None, None, [f"no comparison: {error}"]
    paired_by = pairing_field(traces, pair_by, unpaired=options.unpaired)
    try:
        comparison, notes = compare_groups(
            traces,
            name,
            paired_by,
            match_on=options.match_on,
            confidence=options.confidence,
            n_bootstrap=options.n_bootstrap,
            n_permutations=options.n_permutations,
            seed=options.seed,
        )
    except ComparisonError as error:
        hint = "" if paired_by is None else " (--unpaired compares without pairing)"
        return None, None, [f"no comparison by {name}: {error}{hint}"]
    notes = left_out(len(totals.rows) - len(traces), name) + notes
    if options.group_by is not None and None in groups:  # written by a version that did not name it
        notes.append(f"the run does not say by which field it was grouped: {name} is believed")
    return comparison, paired_by, notes


def _one_field(stated: Sequence[str | None], asked: str | None, what: str, folder: Path) -> str | None:
    """The field that the traces are grouped or paired by; None where nobody says.

    Raises:
        ComparisonError: If they have another one than is asked for, or several.
    """
    names = sorted({name for name in stated if name is not None})
    if len(names) > 1 or (asked is not None and names not in ([], [asked])):
        raise ComparisonError(
            f"the traces of {folder} were {what} by {' and '.join(map(repr, names))}, not by "
            f"{repr(asked) if asked else 'one field'}: pass labels (--labels on the command line), or "
            "analyse again with the field wanted"
        )
    return asked or (names[0] if names else None)


def _labelled(outcome: Outcome, labels: Labels, options: SummaryOptions) -> Outcome:
    if outcome.done is None:
        return outcome
    group, pair = labels.get(outcome.id, (None, None))
    named = {"group_by": options.group_by, "pair_by": options.pair_by}
    return replace(outcome, entry=replace(outcome.done, group=group, pair=pair, **named))


def _nothing(folder: Path, problems: list[Outcome]) -> str:
    if not problems:
        return f"{folder} holds no result: expected a manifest of `analyze`, or files of StepSaliency.save"
    first = problems[0]
    reason = first.reason if first.status == "failed" else f"{first.status}: {first.reason}"
    return f"no trace of {folder} has a result; {len(problems)} have none, the first: {reason}"
