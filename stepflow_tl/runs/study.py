"""`study`: from the question to the conclusion, each stage resumable from the files of the one before.

1. Answers under every condition, graded as they come: `answers.jsonl` (`runs.answers`).
2. Maps of plain answers, right and wrong, as many of each as asked for: `traces.jsonl`, `maps/`
   (`runs.study_traces` chooses them, `analyze_dataset` maps them).
3. The same traces, and the repaired answers that are shown, under the repair: `repaired.jsonl`, `repaired/`;
   what the repair did on these traces: `repaired/flow.jsonl`.
4. Right against wrong: all of them, matched on steps and tokens, and within questions where a question has
   both; with the repair against without, trace by trace. All from the manifests' numbers.
5. `pages/`: the map of both answers to every question gained or lost that is shown.
6. `report.md`, `report.html` and `findings.json`.

Call it again with the same arguments to go on after a kill at any moment: stages that are done cost a look at
their files. More maps or pages may be asked for later. Ctrl-C and a full disk end the stage at work in order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from stepflow_tl.diagnosis import Comparison, compare
from stepflow_tl.errors import ComparisonError, InputFileError
from stepflow_tl.evaluation import Evaluation
from stepflow_tl.evaluation.evaluation import PLAIN
from stepflow_tl.rendering import report
from stepflow_tl.rendering.study_conclusions import ChangedQuestion, Contrast, ShownAnswer, StudyFindings
from stepflow_tl.rendering.study_report import write_study_report
from stepflow_tl.results.files import write_atomically
from stepflow_tl.results.provenance import package_versions
from stepflow_tl.runs.aggregate import DatasetReport, Stop
from stepflow_tl.runs.flow_counts import flow_counts
from stepflow_tl.runs.flow_options import FlowOptions
from stepflow_tl.runs.manifest import Done, read_manifests
from stepflow_tl.runs.options import OptionSet, option, positive
from stepflow_tl.runs.outcomes import inside
from stepflow_tl.runs.run import Watcher, analyze_dataset
from stepflow_tl.runs.study_traces import (
    Change,
    Choice,
    answer_id,
    changes,
    choose_traces,
    with_pages,
    write_rows,
)
from stepflow_tl.saliency.result import StepSaliency

REPAIR = "StepFlow"
"""The condition that is compared with the plain model."""


@dataclass(frozen=True)
class StudyOptions(OptionSet):
    """Options of `study` and `stepflow-tl study` beside those of the answers and of StepFlow.

    Attributes:
        maps: right and wrong plain answers to map, at most N of each (100)
        pages: questions gained or lost to show, with a map of both answers (20)
    """

    maps: int = option(100, type=positive, metavar="N")
    pages: int = option(20, type=positive, metavar="N")


@runtime_checkable
class StudyWatcher(Protocol):
    """Is told how a study goes on."""

    def stage(self, words: str) -> Watcher:
        """A stage begins; who watches it.

        Args:
            words: What it is.
        """
        ...


@dataclass(frozen=True)
class StudyReport:
    """The end of a study.

    Attributes:
        out: The folder.
        stopped: Why it ended early; empty if it did not.
        stage: The stage at work then.
        findings: What was found; None where it ended early.
        written: The reports.
    """

    out: Path
    stopped: Stop
    stage: str
    findings: StudyFindings | None
    written: tuple[Path, ...]


class _Stopped(Exception):
    """A stage ended early."""

    def __init__(self, reason: Stop) -> None:
        super().__init__(reason)
        self.reason = reason


class _Stages:
    """The stages after the answers; what several of them need is worked out once."""

    def __init__(
        self,
        evaluation: Evaluation,
        out: Path,
        load: Callable[[], Any],
        flow: FlowOptions,
        options: StudyOptions,
        analysis: Mapping[str, Any],
        watch: StudyWatcher,
        seed: int,
    ) -> None:
        self._evaluation, self._out, self._load, self._flow = evaluation, out, load, flow
        self._options, self._analysis, self._watch, self._seed = options, analysis, watch, seed

    @cached_property
    def choice(self) -> Choice:
        """The plain answers that are compared."""
        return choose_traces(self._evaluation, self._options.maps, self._seed)

    @cached_property
    def all_changes(self) -> list[Change]:
        """Questions gained and lost."""
        return changes(self._evaluation, REPAIR)

    @property
    def shown(self) -> list[Change]:
        """Those of them that the report shows."""
        return self.all_changes[: self._options.pages]

    def map_plain(self) -> DatasetReport:
        """Maps of the chosen plain answers, and of those that are shown."""
        rows = with_pages(self._evaluation, self.choice.rows, self.shown, PLAIN)
        return self._map("maps of the plain answers", "traces.jsonl", "maps", rows)

    def map_repaired(self) -> DatasetReport:
        """Maps of the same traces under the repair, and of the repaired answers that are shown."""
        rows = with_pages(self._evaluation, self.choice.rows, self.shown, REPAIR)
        words = f"maps of the same traces under {REPAIR}"
        return self._map(words, "repaired.jsonl", "repaired", rows, stepflow=self._flow)

    def _map(self, words: str, source: str, folder: str, rows: list, **options: Any) -> DatasetReport:
        watcher = self._watch.stage(words)
        write_rows(self._out / source, rows)
        found = analyze_dataset(
            self._load,
            self._out / source,
            self._out / folder,
            watcher=watcher,
            group_by="right",
            unpaired=True,
            **self._analysis,
            **options,
        )
        if found.stopped:
            raise _Stopped(found.stopped)
        return found

    def maps_of(self, folder: str) -> dict[str, Done]:
        """The traces of one of the two runs that have a map, by id."""
        entries = read_manifests(self._out / folder).entries
        return {entry.id: entry for entry in entries if isinstance(entry, Done)}

    def contrasts(self, plain: Mapping[str, Done]) -> tuple[Contrast, ...]:
        """Right against wrong: all traces, matched, and within questions."""
        rows = [[row for row in self.choice.rows if row.right is right] for right in (True, False)]
        mapped = [[row for row in group if row.id in plain] for group in rows]
        groups = [[plain[row.id].diagnosis for row in group] for group in mapped]
        questions = tuple([row.question_id for row in group] for group in mapped)
        names = ("right", "wrong")
        everything = _contrast("all traces", *groups, names=names, match_on=("steps", "tokens"))
        within = _contrast("within questions", *groups, names=names, pair_by=questions)
        matched = Contrast("matched on length", None, everything.notes)
        if everything.comparison is not None and everything.comparison.matched is not None:
            matched = Contrast("matched on length", everything.comparison.matched)
        return everything, matched, within

    def repaired(self, plain: Mapping[str, Done], repaired: Mapping[str, Done]) -> Contrast:
        """The chosen traces under the repair against the same without."""
        both = [row.id for row in self.choice.rows if row.id in plain and row.id in repaired]
        groups = [[maps[name].diagnosis for name in both] for maps in (repaired, plain)]
        return _contrast("with and without", *groups, names=(REPAIR, PLAIN), pair_by=(both, both))

    def write_pages(self, maps: Mapping[str, Mapping[str, Done]]) -> tuple[ChangedQuestion, ...]:
        """A page for both answers to each question that is shown; one older than its map is made again."""
        self._watch.stage("pages of the questions gained and lost")
        (self._out / "pages").mkdir(exist_ok=True)
        return tuple(
            ChangedQuestion(
                self._evaluation.questions[change.question],
                change.gained,
                (self._shown(change, PLAIN, maps), self._shown(change, REPAIR, maps)),
            )
            for change in self.shown
        )

    def _shown(self, change: Change, condition: str, maps: Mapping[str, Mapping[str, Done]]) -> ShownAnswer:
        result, folder = self._evaluation.results[condition], "maps" if condition == PLAIN else "repaired"
        name = answer_id(self._evaluation, change.question, condition, change.sample)
        address = ""
        if (done := maps[folder].get(name)) is not None:
            source = inside(self._out / folder, done.file)
            address = f"pages/{source.stem}.html"
            page = self._out / address
            if not page.exists() or page.stat().st_mtime_ns < source.stat().st_mtime_ns:
                report(StepSaliency.load(source), page, title=name)
        return ShownAnswer(
            condition,
            result.answers[change.question][change.sample],
            result.verdicts[change.question][change.sample],
            address,
        )


def _contrast(name: str, group: list, other: list, **options: Any) -> Contrast:
    try:
        comparison = compare(group, other, **options)
    except ComparisonError as error:
        return Contrast(name, None, (str(error),))
    notes = ()
    if comparison.pairing is not None and comparison.pairing.n_dropped:
        notes = (f"{comparison.pairing.n_dropped} have no partner and are left out",)
    return Contrast(name, comparison, notes)
