"""The stages of a study after its answers: maps, what the repair did, comparisons, pages.

Each is resumable from the files of the one before, and its numbers come from manifests and journals alone:
what stands in the report is what stands on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from stepflow_tl.diagnosis import compare
from stepflow_tl.errors import ComparisonError
from stepflow_tl.evaluation import Evaluation, Prompting
from stepflow_tl.evaluation.evaluation import PLAIN, Stop
from stepflow_tl.rendering import report
from stepflow_tl.rendering.study_conclusions import ChangedQuestion, Contrast, ShownAnswer, StudyFindings
from stepflow_tl.results.provenance import package_versions
from stepflow_tl.runs.aggregate import DatasetReport
from stepflow_tl.runs.answer_file import AnswerSettings, answer_id
from stepflow_tl.runs.answer_options import StudyOptions
from stepflow_tl.runs.answers import AnswerWatcher
from stepflow_tl.runs.engines import Loader
from stepflow_tl.runs.flow_counts import flow_counts
from stepflow_tl.runs.manifest import Done, read_manifests
from stepflow_tl.runs.outcomes import inside
from stepflow_tl.runs.run import Watcher, analyze_dataset
from stepflow_tl.runs.study_traces import Change, changes, choose_traces, with_pages, write_rows
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.stepflow import StepFlow
from stepflow_tl.stepflow.report import FlowReport

REPAIR = "StepFlow"
"""The condition that is compared with the plain model."""

_NAMES = ("right", "wrong")


@runtime_checkable
class StudyWatcher(Protocol):
    """Is told how a study goes on."""

    def stage(self, words: str) -> None:
        """A stage begins.

        Args:
            words: What it is.
        """
        ...

    @property
    def answers(self) -> AnswerWatcher | None:
        """Who watches the answers."""
        ...

    @property
    def maps(self) -> Watcher | None:
        """Who watches the maps of a stage."""
        ...


class StageStopped(Exception):
    """A stage ended early."""

    def __init__(self, reason: Stop) -> None:
        """Say why."""
        super().__init__(reason)
        self.reason: Stop = reason


class Stages:
    """The stages after the answers, one after the other.

    Attributes:
        stage: The one at work.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        out: Path,
        load: Loader,
        asked: Mapping[str, Any],
        options: StudyOptions,
        watch: StudyWatcher,
    ) -> None:
        """Choose what is mapped and shown; nothing is computed yet.

        Args:
            evaluation: The answers.
            out: Folder of the study.
            load: Gives the model that is mapped.
            asked: Arguments with which `evaluate` was called.
            options: How much is mapped and shown.
            watch: Is told how the study goes on.
        """
        self._evaluation, self._out, self._load, self._watch = evaluation, out, load, watch
        flow = evaluation.results[REPAIR].flow
        assert flow is not None  # `study` has looked
        self._flow, self._seed = flow, asked.get("seed", 0)
        prompting = asked.get("prompting") or Prompting()
        self._analysis = {"format": prompting.format, "splitter": prompting.splitter}
        self._analysis |= {name: asked[name] for name in ("engine", "replicas") if name in asked}
        self._choice = choose_traces(evaluation, options.maps, self._seed)
        self._changes = changes(evaluation, REPAIR)
        self._shown = self._changes[: options.pages]
        self.stage = "answers"

    def findings(self, command: str, settings: AnswerSettings) -> StudyFindings:
        """Run every stage; what they found.

        Args:
            command: How the study was started.
            settings: What all answers have in common.

        Raises:
            StageStopped: If Ctrl-C or a full disk ended a stage.
            StepflowError: As `analyze_dataset` and `flow_counts` do.
        """
        words = f"maps of the same answers under {REPAIR}"
        runs = {
            "maps": self._map("maps of plain answers", "traces.jsonl", "maps", PLAIN, None),
            "repaired": self._map(words, "repaired.jsonl", "repaired", REPAIR, self._flow),
        }
        maps = {folder: self._maps_of(folder, run) for folder, run in runs.items()}
        flow, n_flow_traces = self._count_flow(maps["maps"], runs["maps"])
        self._begin("comparisons and report")
        return StudyFindings(
            title=f"{settings.model_name} on {len(self._evaluation.questions)} questions",
            evaluation=self._evaluation,
            repair=REPAIR,
            contrasts=self._contrasts(maps["maps"]),
            repaired=self._with_and_without(maps),
            flow=flow,
            n_flow_traces=n_flow_traces,
            n_layers=0 if runs["maps"] is None else runs["maps"].settings.n_layers or 0,
            changed=tuple(self._changed(change, maps) for change in self._shown),
            n_changed=len(self._changes),
            run=tuple(self._facts(command, settings, runs)),
            exclusions=(*self._choice.left_out, *_failures(runs)),
        )

    def _begin(self, words: str) -> None:
        self.stage = words
        self._watch.stage(words)

    def _map(
        self, words: str, source: str, folder: str, condition: str, flow: StepFlow | None
    ) -> DatasetReport | None:
        """Maps of the chosen plain answers, and of a condition's answers that are shown; None without any."""
        self._begin(words)
        rows = with_pages(self._evaluation, self._choice.rows, self._shown, condition)
        write_rows(self._out / source, rows)
        if not rows:
            return None
        found = analyze_dataset(
            self._load,
            self._out / source,
            self._out / folder,
            watcher=self._watch.maps,
            stepflow=flow,
            group_by="right",
            pair_by="question_id",
            **self._analysis,
        )
        if found.stopped:
            raise StageStopped(found.stopped)
        return found

    def _maps_of(self, folder: str, run: DatasetReport | None) -> dict[str, Done]:
        """The traces of a run that have a map, by id."""
        entries = () if run is None else read_manifests(self._out / folder).entries
        return {entry.id: entry for entry in entries if isinstance(entry, Done)}

    def _count_flow(self, plain: Mapping[str, Done], run: DatasetReport | None) -> tuple[FlowReport, int]:
        """What the repair does on the chosen answers that have a map, and how many those are."""
        self._begin(f"what {REPAIR} does on these answers")
        maps = {
            row.id: inside(self._out / "maps", plain[row.id].file)
            for row in self._choice.rows
            if row.id in plain
        }
        if run is None or not maps:
            return FlowReport(), 0
        settings = {name: getattr(run.settings, name) for name in ("model_name", "dtype")}
        journal = self._out / "repaired" / "flow.jsonl"
        return flow_counts(self._load, self._flow, maps, journal, settings), len(maps)

    def _contrasts(self, plain: Mapping[str, Done]) -> tuple[Contrast, ...]:
        """Right against wrong: all traces, matched, and within questions."""
        rows = [
            [row for row in self._choice.rows if row.right is right and row.id in plain]
            for right in (True, False)
        ]
        groups = [[plain[row.id].diagnosis for row in group] for group in rows]
        right, wrong = ([row.question_id for row in group] for group in rows)
        everything = _contrast("all traces", *groups, names=_NAMES, match_on=("steps", "tokens"))
        if (found := everything.comparison) is None:  # perhaps for want of pairs alone
            matched = Contrast("matched on length", None, everything.notes)
            everything = _contrast("all traces", *groups, names=_NAMES)
        else:
            how = None if found.matched is None else found.matched.matching
            notes = () if how is None else tuple(how.lines(_NAMES))
            matched = Contrast("matched on length", found.matched, notes)
        if len({*right, *wrong}) < len(right) + len(wrong):
            note = "several answers to one question count as independent, so the intervals are too narrow"
            everything = replace(everything, notes=(*everything.notes, note))
        both = len(set(right) & set(wrong))
        if both < 2:
            why = f"{both} questions have a right and a wrong answer with a map (more --samples give more)"
            return everything, matched, Contrast("within questions", None, (why,))
        within = _contrast("within questions", *groups, names=_NAMES, pair_by=(right, wrong))
        return everything, matched, within

    def _with_and_without(self, maps: Mapping[str, Mapping[str, Done]]) -> Contrast:
        """The chosen traces under the repair against the same without."""
        ids = [row.id for row in self._choice.rows if all(row.id in found for found in maps.values())]
        groups = [[maps[folder][name].diagnosis for name in ids] for folder in ("repaired", "maps")]
        return _contrast("with and without", *groups, names=(REPAIR, PLAIN), pair_by=(ids, ids))

    def _changed(self, change: Change, maps: Mapping[str, Mapping[str, Done]]) -> ChangedQuestion:
        question, folders = self._evaluation.questions[change.question], {PLAIN: "maps", REPAIR: "repaired"}
        shown = []
        for condition, folder in folders.items():
            result = self._evaluation.results[condition]
            done = maps[folder].get(answer_id(question, condition, change.sample))
            shown.append(
                ShownAnswer(
                    condition,
                    result.answers[change.question][change.sample],
                    result.verdicts[change.question][change.sample],
                    "" if done is None else self._page(done, folder),
                )
            )
        return ChangedQuestion(question, change.gained, (shown[0], shown[1]))

    def _page(self, done: Done, folder: str) -> str:
        """Address of the page of a map; one older than its map is made again."""
        source = inside(self._out / folder, done.file)
        address = f"pages/{source.stem}.html"
        page = self._out / address
        if not page.exists() or page.stat().st_mtime_ns < source.stat().st_mtime_ns:
            page.parent.mkdir(exist_ok=True)
            report(StepSaliency.load(source), page, title=done.id)
        return address

    def _facts(
        self, command: str, settings: AnswerSettings, runs: Mapping[str, DatasetReport | None]
    ) -> Iterator[tuple[str, str]]:
        """What was run, name by name."""
        yield from [("command", command)] if command else []
        yield "model", settings.model_name
        yield "weights that answered", settings.dtype
        yield "questions", f"{settings.n_questions}, SHA-256 {settings.questions_sha256}"
        yield "grader", settings.grader
        yield "decoding", repr(settings.decoding)
        yield "prompt", settings.prompt
        yield "system prompt", "the template's own" if settings.system is None else settings.system
        yield "format, splitter", f"{settings.format}, {settings.splitter}"
        yield from ((f"condition {name}", repr(flow)) for name, flow in settings.conditions.items())
        chosen = [sum(row.right is right for row in self._choice.rows) for right in (True, False)]
        yield (
            "mapped",
            f"{chosen[0]} right and {chosen[1]} wrong plain answers, chosen with seed {self._seed}",
        )
        for folder, run in runs.items():
            if run is not None:
                backends = ", ".join(f"{name} {n}" for name, n in run.aggregate.backends.items())
                words = f"{run.settings.objective}, {run.settings.dtype}, backend {backends}"
                yield f"{folder}/", f"{words}, {run.aggregate.seconds:.0f} s"
        yield from ((f"version of {name}", version) for name, version in package_versions().items())


def _contrast(name: str, group: list, other: list, **options: Any) -> Contrast:
    try:
        comparison = compare(group, other, **options)
    except ComparisonError as error:
        return Contrast(name, None, (str(error),))
    notes = ()
    if comparison.pairing is not None and comparison.pairing.n_dropped:
        notes = (f"{comparison.pairing.n_dropped} questions have no partner and are left out",)
    return Contrast(name, comparison, notes)


def _failures(runs: Mapping[str, DatasetReport | None]) -> Iterator[str]:
    for folder, run in runs.items():
        if run is not None:
            yield from (
                f"{problem.id} has no map in {folder}/: {problem.reason}"
                for problem in run.aggregate.problems
            )
