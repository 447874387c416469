"""What a run says at its end, read back from the manifest: table, `summary.csv`, comparison, agreement.

1. Outcomes are read one by one, in the order of the input. Only what a comparison needs is held: the layer
   measures of the traces that have a group, or their agreement.
2. A shard writes its own files, `summary-<i>-of-<n>.csv`, and compares nothing: half a data set is no sample
   of it. `stepflow-tl summarize` reads all shards of a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stepflow_tl.causal.agreement import AgreementSummary, summarise_agreement
from stepflow_tl.diagnosis import Comparison, compare_groups, pairing_field
from stepflow_tl.errors import ComparisonError, ResultFileError
from stepflow_tl.results.files import write_atomically
from stepflow_tl.runs.entries import RunSettings
from stepflow_tl.runs.knockouts import agreement_csv
from stepflow_tl.runs.outcomes import Outcome, Status, SummaryTable, summary_csv
from stepflow_tl.runs.plan import Shard

Stop = Literal["", "interrupted", "disk full"]


@dataclass(frozen=True)
class GroupOptions:
    """Which groups are compared.

    Attributes:
        group_by: Field that is true or false; None compares nothing.
        pair_by: Field to pair by; None takes `problem_id` where the records have it.
        unpaired: Do not pair.
    """

    group_by: str | None = None
    pair_by: str | None = None
    unpaired: bool = False


@dataclass(frozen=True)
class DatasetReport:
    """The end of a run.

    Attributes:
        out: The folder.
        settings: What all results have in common.
        total: Rows of the input, or of this shard of it.
        counts: How many traces were analysed, kept and failed.
        stopped: Why the run ended early; empty if it did not.
        table: Band means over the traces, the counts, and the first failures with their reasons.
        agreement: Saliency against knockout, where that was asked for.
        comparison: Of the two groups, where that was asked for and can be made.
        paired_by: Field that the comparison is paired by.
        notes: What was left out of the comparison.
        problems: What could not be compared or written, and why.
        written: Files beside the results.
    """

    out: Path
    settings: RunSettings
    total: int
    counts: Mapping[Status, int]
    stopped: Stop
    table: str
    agreement: AgreementSummary | None = None
    comparison: Comparison | None = None
    paired_by: str | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    written: tuple[Path, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Every row has a result, and everything that was asked for could be made."""
        return not self.stopped and not self.counts.get("failed") and not self.problems

    def __str__(self) -> str:
        """The table."""
        return self.table


def make_report(
    outcomes: Callable[[], Iterable[Outcome]],
    *,
    out: Path,
    settings: RunSettings,
    total: int,
    stopped: Stop,
    groups: GroupOptions,
    shard: Shard,
) -> DatasetReport:
    """Read the outcomes, write the files and return the report; after a full disk, nothing is written.

    Args:
        outcomes: Called once; the outcomes in the order of the input.
        out: The folder.
        settings: Of the run.
        total: Rows of the input, or of the shard.
        stopped: Why the run ended early.
        groups: What is compared.
        shard: The part that was run.
    """
    table, held = SummaryTable(), []

    def counted() -> Iterator[Outcome]:
        for outcome in outcomes():
            table.add(outcome)
            if outcome.agreement is not None or (
                outcome.diagnosis is not None and groups.group_by is not None
            ):
                held.append(outcome)
            yield outcome

    files = {f"summary{shard.suffix}.csv": summary_csv(counted())}
    agreement = None
    agreements = [outcome.agreement for outcome in held if outcome.agreement is not None]
    if agreements and shard.count == 1:
        agreement = summarise_agreement(agreements)
        files["agreement.csv"] = agreement_csv(held)
        files["agreement.json"] = json.dumps(agreement.to_json(), indent=1) + "\n"
    comparison, paired_by, notes, problems = None, None, [], []
    if groups.group_by is not None and shard.count == 1:
        paired_by = pairing_field(held, groups.pair_by, unpaired=groups.unpaired)
        try:
            comparison, notes = compare_groups(held, groups.group_by, paired_by)
        except ComparisonError as error:
            hint = "" if paired_by is None else " (--unpaired compares without pairing)"
            problems.append(f"no comparison by {groups.group_by}: {error}{hint}")
        else:
            files["comparison.txt"] = f"{comparison}\n\n{comparison.full_table()}\n"
            files["comparison.json"] = json.dumps(comparison.to_json(), indent=1) + "\n"
    written = []
    for name, text in files.items() if stopped != "disk full" else ():
        try:
            write_atomically(out / name, text.encode("utf-8", "backslashreplace"))
        except ResultFileError as error:
            problems.append(str(error))
        else:
            written.append(out / name)
    return DatasetReport(
        out=out,
        settings=settings,
        total=total,
        counts=dict(table.counts),
        stopped=stopped,
        table=str(table),
        agreement=agreement,
        comparison=comparison,
        paired_by=paired_by,
        notes=tuple(notes),
        problems=tuple(problems),
        written=tuple(written),
    )
