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

Shards write answers only, until one of them finds that no answer is missing: that one goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stepflow_tl.errors import DiskFullError, InputFileError
from stepflow_tl.evaluation import Evaluation, Question, standard_conditions
from stepflow_tl.evaluation.evaluation import PLAIN, Stop
from stepflow_tl.rendering.study_conclusions import StudyFindings
from stepflow_tl.rendering.study_report import write_study_report
from stepflow_tl.results.files import write_atomically
from stepflow_tl.results.journal_lines import read_journal
from stepflow_tl.runs.answer_file import ANSWERS, AnswerSettings, answers_path
from stepflow_tl.runs.answer_options import StudyOptions
from stepflow_tl.runs.answers import AnswerWatcher, evaluate
from stepflow_tl.runs.engines import Loader, loader_of
from stepflow_tl.runs.options import Shard
from stepflow_tl.runs.run import Watcher
from stepflow_tl.runs.study_stages import REPAIR, Stages, StageStopped, StudyWatcher

CONDITIONS = (PLAIN, REPAIR, f"{REPAIR} control")
"""What the answers are written under where nobody names conditions."""


class _Silence:
    """Nobody watches."""

    answers: AnswerWatcher | None = None
    maps: Watcher | None = None

    def stage(self, words: str) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class StudyReport:
    """The end of a study.

    Attributes:
        out: The folder.
        evaluation: The answers.
        stopped: Why it ended early; empty if it did not.
        stage: The last stage that began.
        findings: What was found; None where it ended early, or answers of other shards are missing.
        written: The reports.
    """

    out: Path
    evaluation: Evaluation
    stopped: Stop
    stage: str
    findings: StudyFindings | None = None
    written: tuple[Path, ...] = ()


def study(
    model: Any,
    questions: Sequence[Question] | str | Path,
    out: str | Path,
    *,
    options: StudyOptions | None = None,
    map_model: Any = None,
    command: str = "",
    watcher: StudyWatcher | None = None,
    **asked: Any,
) -> StudyReport:
    """Ask, grade, map, repair, compare and report: a study of one model on one set of questions.

    Args:
        model: What answers: a TransformerLens model; a name or path for `models.load_model`; or a function
            without arguments that loads one.
        questions: What to ask, or a file of JSON lines for `read_questions`.
        out: Folder for everything, see the module; made if it does not exist.
        options: How much is mapped and shown.
        map_model: What is mapped, for weights of another precision; by default `model`.
        command: How the study was started, for the report.
        watcher: Is told how the study goes on.
        **asked: Those of `evaluate`, by name: conditions, decoding, prompting, grader, allow_code_execution,
            shard, engine, replicas, overwrite, seed. The conditions are `CONDITIONS` of the paper's StepFlow
            by default, and must have "plain" and "StepFlow" among them.

    Raises:
        InputFileError: If the plain model or the repair is not among the conditions, or not what it says.
        StepflowError: As `evaluate` and `analyze_dataset` do.

    Cost: the answers, then two maps and one forward pass per trace that is mapped.
    """
    watch, out = watcher or _Silence(), Path(out)
    standard = standard_conditions()
    conditions = asked.get("conditions") or {name: standard[name] for name in CONDITIONS}
    if missing := [name for name in (PLAIN, REPAIR) if name not in conditions]:
        raise InputFileError(
            f"the conditions are {', '.join(conditions)}: a study compares {PLAIN!r} with {REPAIR!r}, add "
            f"{' and '.join(map(repr, missing))}"
        )
    if conditions[PLAIN] is not None or conditions[REPAIR] is None:
        raise InputFileError(
            f"condition {PLAIN!r} is {conditions[PLAIN]} and {REPAIR!r} is {conditions[REPAIR]}: expected "
            "None and a StepFlow"
        )
    is_local = asked.get("engine", "local") == "local"
    writes = loader_of(model)
    if is_local and map_model is None:
        writes = _Once(writes)  # one model for all stages
    maps = writes if map_model is None else loader_of(map_model)
    watch.stage("answers")
    found = evaluate(writes, questions, out, watcher=watch.answers, **{**asked, "conditions": conditions})
    if found.stopped or found.n_missing:
        return StudyReport(out, found, found.stopped, "answers")
    settings = _settings(out, asked.get("shard"))
    stages = Stages(found, out, _Once(maps) if is_local else maps, asked, options or StudyOptions(), watch)
    try:
        findings = stages.findings(command, settings)
        written = (*write_study_report(findings, out), _write_json(findings, out))
        return StudyReport(out, found, "", stages.stage, findings, written)
    except StageStopped as early:
        return StudyReport(out, found, early.reason, stages.stage)
    except KeyboardInterrupt:
        return StudyReport(out, found, "interrupted", stages.stage)
    except DiskFullError:
        return StudyReport(out, found, "disk full", stages.stage)


class _Once:
    """A loader that loads once."""

    def __init__(self, load: Loader) -> None:
        self._load = load

    @cached_property
    def _model(self) -> Any:
        return self._load()

    def __call__(self) -> Any:
        return self._model


def _settings(out: Path, shard: str | Shard | None) -> AnswerSettings:
    """What all answers have in common, from the ledger that this run has written."""
    header = next(read_journal(answers_path(out, Shard.of(shard)), ANSWERS))
    return AnswerSettings.from_json(header.settings or {})


def _write_json(findings: StudyFindings, out: Path) -> Path:
    """The numbers of the report, as plain data."""
    contrasts = [*findings.contrasts, findings.repaired]
    data = {
        "title": findings.title,
        "comparisons": {
            each.name: {
                "notes": list(each.notes),
                "comparison": None if each.comparison is None else each.comparison.to_json(),
            }
            for each in contrasts
        },
        "flow": {"n_traces": findings.n_flow_traces, "layers": findings.flow.to_json()},
        "changed": [{"id": each.question.id, "gained": each.gained} for each in findings.changed],
        "n_changed": findings.n_changed,
        "run": dict(findings.run),
        "exclusions": list(findings.exclusions),
    }
    path = out / "findings.json"
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())
    return path
