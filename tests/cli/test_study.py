"""`stepflow-tl study` on the testbed: one command, its folder, its words, and what it refuses."""

import json

import pytest

from stepflow_tl.cli import study as command
from stepflow_tl.testbed import model as testbed

SHORT = ["--limit", "4", "--max-new-tokens", "60", "--splitter", "line", "--maps", "2", "--pages", "1"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Small problems in a file, the last two with a right answer that nobody gives."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"question": f"a = {i} + 1\nfind a", "answer": str(i + 1 if i < 3 else 9)} for i in range(1, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_command_goes_from_questions_to_a_report(run_cli, questions, tmp_path):
    out = tmp_path / "study"
    arguments = ["study", questions, "--model", "testbed", "--out", out, *SHORT]
    done = run_cli(*arguments)
    assert done.code == 0, done.err
    stages = [line for line in done.err.splitlines() if line.startswith("== ")]
    assert stages == [
        "== answers",
        "== maps of plain answers",
        "== maps of the same answers under StepFlow",
        "== what StepFlow does on these answers",
        "== comparisons and report",
    ]
    assert "12 answers under 3 conditions" in done.err
    assert "In short:\n- StepFlow" in done.out and str(out / "report.html") in done.out
    run = json.loads((out / "findings.json").read_text())["run"]
    assert run["command"].startswith("stepflow-tl study ") and "--maps 2" in run["command"]
    assert list(name for name in run if name.startswith("condition")) == [
        "condition plain",
        "condition StepFlow",
        "condition StepFlow control",
    ]
    again = run_cli(*arguments)
    assert again.code == 0 and "12 of them there already" in again.err


def test_maps_in_another_precision_load_a_second_model(run_cli, questions, tmp_path, monkeypatch):
    loaded, original = [], testbed.load_testbed_model

    def load(device, dtype, **depth):
        loaded.append(str(dtype))
        return original(device, dtype, **depth)

    monkeypatch.setattr(testbed, "load_testbed_model", load)
    arguments = [questions, "--model", "testbed", "--out", tmp_path, *SHORT]
    done = run_cli("study", *arguments, "--dtype", "float64", "--conditions", "plain", "StepFlow")
    assert done.code == 0 and loaded == ["torch.float64", "torch.float32"]


def test_ctrl_c_says_where_it_was_and_how_to_go_on(run_cli, questions, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command._MapsWatcher, "advance", interrupt)
    done = run_cli("study", questions, "--model", "testbed", "--out", tmp_path, *SHORT)
    assert done.code == 130
    said = "stopped (interrupted) in the stage: maps of plain answers; run the same command again to go on"
    assert said in done.err and "Right answers by difficulty" in done.out


def test_a_shard_that_is_not_the_last_says_so(run_cli, questions, tmp_path):
    arguments = ["study", questions, "--model", "testbed", "--out", tmp_path, *SHORT, "--shard", "0/2"]
    done = run_cli(*arguments)
    assert done.code == 0 and "the shard that finishes last goes on" in done.err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["testbed", "--out", "x", "--conditions", "plain"], "a study compares 'plain' with 'StepFlow'"),
        (["testbed", "--out", "x", "--conditions", "magic"], "--conditions: magic; known are plain, bridge"),
        (["nothing.jsonl", "--out", "x"], "cannot read nothing.jsonl"),
        (["testbed"], "the following arguments are required: --out"),
        (["testbed", "--out", "x", "--maps", "0"], "'0' is not a whole number from 1 on"),
        (["testbed", "--out", "x", "--tau-max", "0"], "expected both halves on"),
    ],
)
def test_what_cannot_be_studied_is_one_line_and_code_2(run_cli, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_cli("study", *arguments)
    assert done.code == 2 and said in done.err
    assert list(tmp_path.iterdir()) == []
