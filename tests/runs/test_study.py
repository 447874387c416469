"""A study on the testbed: whole, stopped anywhere and gone on with, widened, sharded, with nothing to map."""

import json
import re
import shutil
from functools import partial

import pytest
import torch

from stepflow_tl import StepFlow, StepSaliency, load_testbed_model
from stepflow_tl.errors import DiskFullError, InputFileError
from stepflow_tl.evaluation import Decoding, Prompting, questions_of, standard_conditions
from stepflow_tl.evaluation.generation import AnswerWriter
from stepflow_tl.runs import StudyOptions, read_answers, study, study_run, worker
from stepflow_tl.testbed import ProblemSpec, make_problems

STANDARD = standard_conditions(StepFlow(tau_max=0.9, alpha=0.5))
ASKED = {
    "conditions": {name: STANDARD[name] for name in ("plain", "StepFlow", "StepFlow control")},
    "decoding": Decoding(max_new_tokens=60, temperature=1.5, n_samples=3, batch_size=64),
    "prompting": Prompting(splitter="line"),
}
OPTIONS = StudyOptions(maps=4, pages=2)
FILES = {"report.md", "report.html", "findings.json", "answers.jsonl", "traces.jsonl", "repaired.jsonl"}


@pytest.fixture(scope="module")
def model():
    return load_testbed_model()


@pytest.fixture(scope="module")
def questions():
    return questions_of(p for n in (3, 4) for p in make_problems(ProblemSpec(n_steps=n), 4, seed=0))


@pytest.fixture(scope="module")
def whole(model, questions, tmp_path_factory):
    """A study that nothing disturbed; tests work on copies of its folder."""
    return study(
        model, questions, tmp_path_factory.mktemp("study"), options=OPTIONS, command="the command", **ASKED
    )


@pytest.fixture
def copied(whole, tmp_path):
    """`copied("answers.jsonl")`: a folder with these parts of the whole study."""

    def copy(*names):
        for name in names:
            source = whole.out / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, tmp_path / name)
        return tmp_path

    return copy


def found_in(folder):
    """The findings, without what differs between equal runs."""
    data = json.loads((folder / "findings.json").read_text())
    return {name: data[name] for name in ("comparisons", "flow", "changed", "n_changed", "exclusions")}


def refuse(*args, **options):
    raise AssertionError("done again, though it was there")


def test_a_study_leaves_answers_maps_pages_and_a_report(whole, questions):
    assert whole.stopped == "" and {path.name for path in whole.out.iterdir()} >= FILES
    findings = whole.findings
    assert len(findings.evaluation.questions) == len(questions)
    everything, matched, within = findings.contrasts
    assert everything.comparison.n_traces == (4, 4)
    assert within.comparison is not None and within.comparison.pairing.n_pairs >= 2
    assert matched.name == "matched on length"
    assert findings.repaired.comparison.pairing.n_pairs == findings.n_flow_traces == 8
    assert findings.flow.adjusted > 0 and findings.flow.injections > 0
    assert findings.n_layers == 6 and len(findings.changed) == 2
    assert ("command", "the command") in findings.run
    assert any("plain answers are not mapped (--maps 4)" in each for each in findings.exclusions)


def test_the_report_links_pages_that_are_there_and_figures(whole):
    page, text = (whole.out / "report.html").read_text(), (whole.out / "report.md").read_text()
    links = re.findall(r'href="(pages/[^"]+)"', page)
    assert len(links) == 4 and all((whole.out / link).is_file() for link in links)
    images = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(images) == 8 and all((whole.out / image).is_file() for image in images)
    assert all(link in text for link in links)


def test_maps_are_of_the_very_tokens_that_were_written_and_the_repaired_of_the_same(whole):
    tokens = {
        f"{question.id}/{name}/{sample}": answer.tokens
        for name, result in read_answers(whole.out).results.items()
        for question, samples in zip(whole.evaluation.questions, result.answers, strict=True)
        for sample, answer in enumerate(samples)
    }
    for folder in ("maps", "repaired"):
        lines = [
            json.loads(line) for line in (whole.out / folder / "manifest.jsonl").read_text().splitlines()
        ]
        done = [line for line in lines if line["kind"] == "done"]
        assert len(done) >= 8
        for line in done:
            saliency = StepSaliency.load(whole.out / folder / line["file"])
            assert tuple(saliency.trace.tokens.tolist()) == tokens[line["id"]]
            assert ("stepflow" in saliency.provenance.notes) == (folder == "repaired")
    assert {line["group"] for line in done} == {True, False, None}


def test_a_study_that_is_done_is_only_written_again(whole, model, questions, copied, monkeypatch):
    folder = copied(*(path.name for path in whole.out.iterdir()))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(AnswerWriter, "write", refuse)
    monkeypatch.setattr(worker, "step_saliency", refuse)
    again = study(model, questions, folder, options=OPTIONS, command="the command", **ASKED)
    assert again.findings is not None
    changed = {path.name for path, data in before.items() if path.read_bytes() != data}
    assert changed == {"summary.csv"}  # whose status says "kept" now


class Interrupting:
    """Presses Ctrl-C at the n-th thing that it is told."""

    def __init__(self, stage, n):
        self.answers = None
        self.maps = self
        self._stage, self._left = stage, n

    def _count(self):
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt

    def stage(self, words):
        if self._stage in words:
            self._count()

    def begin(self, total, settings, replicas):
        pass

    def note(self, message):
        pass

    def advance(self, n_tokens, seconds, tokens_left):
        if self._stage == "advance":
            self._count()


@pytest.mark.parametrize(
    ("kept", "stage", "n", "at_work"),
    [
        (["answers.jsonl"], "advance", 3, "maps of plain answers"),
        (["answers.jsonl", "maps"], "advance", 12, "maps of the same answers under StepFlow"),
        (["answers.jsonl", "maps", "repaired"], "what StepFlow", 1, "what StepFlow does on these answers"),
    ],
)
def test_a_study_goes_on_where_it_was_stopped(whole, model, questions, copied, kept, stage, n, at_work):
    folder = copied(*kept)
    stopped = study(model, questions, folder, options=OPTIONS, watcher=Interrupting(stage, n), **ASKED)
    assert (stopped.stopped, stopped.stage, stopped.findings) == ("interrupted", at_work, None)
    assert not (folder / "report.html").exists()
    study(model, questions, folder, options=OPTIONS, **ASKED)
    assert found_in(folder) == found_in(whole.out)


def test_a_full_disk_ends_a_study_in_order(model, questions, copied, monkeypatch):
    def no_room(*args):
        raise DiskFullError("no room")

    monkeypatch.setattr(study_run, "write_study_report", no_room)
    folder = copied("answers.jsonl", "maps", "repaired")
    found = study(model, questions, folder, options=OPTIONS, **ASKED)
    assert (found.stopped, found.stage, found.written) == ("disk full", "comparisons and report", ())


def test_more_maps_and_pages_add_to_what_is_there(whole, model, questions, copied, monkeypatch):
    folder = copied("answers.jsonl", "maps", "repaired")
    before, computed = set(folder.rglob("*.safetensors")), []
    original = worker.step_saliency
    monkeypatch.setattr(worker, "step_saliency", lambda *a, **o: computed.append(1) or original(*a, **o))
    more = study(model, questions, folder, options=StudyOptions(maps=6, pages=3), **ASKED)
    assert len(computed) == len(set(folder.rglob("*.safetensors")) - before) > 0
    assert sum(more.findings.contrasts[0].comparison.n_traces) > 8 and len(more.findings.changed) == 3
    fewer = study(model, questions, folder, options=OPTIONS, **ASKED)
    assert fewer.findings.contrasts[0].comparison.n_traces == (4, 4)
    assert found_in(folder) == found_in(whole.out)


def test_the_shard_that_finishes_last_goes_on(whole, model, questions, tmp_path):
    first = study(model, questions, tmp_path, options=OPTIONS, shard="0/2", **ASKED)
    assert (first.stopped, first.stage, first.findings) == ("", "answers", None)
    assert first.evaluation.n_missing == 4 and not (tmp_path / "maps").exists()
    second = study(model, questions, tmp_path, options=OPTIONS, shard="1/2", **ASKED)
    assert found_in(tmp_path)["comparisons"].keys() == found_in(whole.out)["comparisons"].keys()
    assert second.findings.contrasts[0].comparison is not None


def test_maps_of_another_precision_come_from_a_model_of_their_own(model, questions, copied):
    loaded = []

    def load(dtype):
        loaded.append(dtype)
        return load_testbed_model(dtype=dtype)

    found = study(
        partial(load, torch.float32),
        questions,
        copied("answers.jsonl"),
        options=StudyOptions(maps=2, pages=1),
        map_model=partial(load, torch.float64),
        **ASKED,
    )
    assert loaded == [torch.float32, torch.float64]
    assert dict(found.findings.run)["weights that answered"] == "torch.float32"
    assert "torch.float64" in dict(found.findings.run)["maps/"]


def test_with_nothing_to_map_the_report_says_so(model, questions, tmp_path):
    asked = {**ASKED, "decoding": Decoding(max_new_tokens=3)}
    found = study(model, questions[:3], tmp_path, options=OPTIONS, **asked)
    assert [contrast.comparison for contrast in found.findings.contrasts] == [None] * 3
    assert found.findings.exclusions == ("3 plain answers were cut off by the token limit",)
    text = (tmp_path / "report.md").read_text()
    assert "All traces: group 'right' is empty" in text and "No trace was read under it" in text
    assert found.findings.changed == () and "No question has another score under StepFlow" in text


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (
            {"plain": None},
            "the conditions are plain: a study compares 'plain' with 'StepFlow', add 'StepFlow'",
        ),
        ({"bridge": StepFlow()}, "add 'plain' and 'StepFlow'"),
        ({"plain": None, "StepFlow": None}, "'StepFlow' is None: expected None and a StepFlow"),
        ({"plain": StepFlow(), "StepFlow": StepFlow()}, "condition 'plain' is StepFlow"),
    ],
)
def test_a_study_without_its_two_conditions_is_refused(tmp_path, conditions, message):
    with pytest.raises(InputFileError, match=re.escape(message)):
        study(refuse, [], tmp_path, conditions=conditions)
