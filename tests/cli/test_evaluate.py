"""`stepflow-tl evaluate` on a model of random weights: what it prints, writes and refuses."""

import json

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from stepflow_tl.cli import console
from stepflow_tl.cli import main as command
from stepflow_tl.cli.evaluate import questions_of_command
from stepflow_tl.errors import DiskFullError
from stepflow_tl.results.journal import Journal
from stepflow_tl.runs.answer_options import AnswerOptions
from stepflow_tl.testbed import model as testbed
from stepflow_tl.testbed.model import new_model
from stepflow_tl.testbed.vocabulary import build_tokenizer


@pytest.fixture
def untrained(monkeypatch):
    """The testbed model's shape, untrained, in place of the shipped one."""
    tokenizer = build_tokenizer()
    tokenizer.init_kwargs.update(add_bos_token=True, name_or_path="testbed")
    torch.manual_seed(0)
    model = TransformerBridge.boot_transformers(
        "Qwen/Qwen2-0.5B", hf_model=new_model(len(tokenizer)).eval(), tokenizer=tokenizer, device="cpu"
    )
    monkeypatch.setattr(testbed, "load_testbed_model", lambda *_, **__: model)


def test_the_testbed_is_evaluated(untrained, tmp_path, capsys):
    out = tmp_path / "scores.json"
    arguments = ["evaluate", "testbed", "--limit", "9", "--max-new-tokens", "4", "--out", str(out)]
    assert command.main([*arguments, "--conditions", "plain", "bridge", "bridge control"]) == 0
    printed = capsys.readouterr()
    for said in ("difference to plain", "difference to its control", "McNemar", "paired over 9 questions"):
        assert said in " ".join(printed.out.split())
    data = json.loads(out.read_text())
    assert list(data["conditions"]) == ["plain", "bridge", "bridge control"] and len(data["questions"]) == 9


def test_each_testbed_has_problems_in_the_form_that_its_model_solves():
    short, long = (questions_of_command(name, AnswerOptions(limit=4)) for name in ("testbed", "testbed-12"))
    assert [q.problem.spec.n_asked for q in short + long] == [1] * 4 + [2] * 4
    assert [q.problem.spec.long_steps for q in short + long] == [False] * 4 + [True] * 4


def test_a_file_of_questions_is_evaluated(untrained, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "A = 4\\nfind a", "answer": "4"}\n{"question": "find b", "answer": 1}\n')
    arguments = [
        "evaluate",
        str(path),
        "--model",
        "testbed",
        "--conditions",
        "plain",
        "--max-new-tokens",
        "3",
    ]
    assert command.main([*arguments, "--temperature", "1", "--samples", "2"]) == 0
    assert "plain" in capsys.readouterr().out


def test_a_folder_keeps_the_answers_and_the_same_command_goes_on(untrained, tmp_path, capsys):
    out = tmp_path / "answers"
    arguments = ["evaluate", "testbed", "--limit", "5", "--max-new-tokens", "4", "--out", str(out)]
    arguments += ["--conditions", "plain", "StepFlow", "--shallow", "0", "--deep", "3-5", "--heads", "0,1"]
    arguments += ["--granularity", "step", "--window", "2", "--boundaries", "all", "--batch-size", "2"]
    arguments += ["--max-bridge-share", "0.8", "--splitter", "line", "--prompt", "{question}"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr()
    assert "10 answers under 2 conditions, model " in printed.err
    assert (out / "evaluation.txt").read_text() in printed.out and str(out / "evaluation.json") in printed.out
    header, *entries = map(json.loads, (out / "answers.jsonl").read_text().splitlines())
    assert len(entries) == 10 and header["settings"]["splitter"] == "line"
    flow = header["settings"]["conditions"]["StepFlow"]
    for said in ("shallow=(0,)", "deep=(3, 4, 5)", "heads=(0, 1)", "granularity='step'", "window=2"):
        assert said in flow
    assert "boundaries='all'" in flow and "max_bridge_share=0.8" in flow
    assert command.main(arguments) == 0
    assert "10 answers under 2 conditions, 10 of them there already" in capsys.readouterr().err
    assert command.main([*arguments, "--seed", "1"]) == 2
    assert "holds another evaluation" in capsys.readouterr().err
    assert command.main([*arguments, "--seed", "1", "--overwrite"]) == 0


def test_shards_fill_one_folder(untrained, tmp_path, capsys):
    out = tmp_path / "answers"
    arguments = ["evaluate", "testbed", "--limit", "5", "--max-new-tokens", "3", "--out", str(out)]
    arguments += ["--conditions", "plain"]
    assert command.main([*arguments, "--shard", "0/2"]) == 0
    assert "2 of 5 questions are not answered yet" in capsys.readouterr().out
    assert command.main([*arguments, "--shard", "1/2"]) == 0
    assert "not answered yet" not in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "answers-0-of-2.jsonl",
        "answers-1-of-2.jsonl",
        "evaluation.json",
        "evaluation.txt",
    }


def test_ctrl_c_ends_with_the_table_so_far_and_code_130(untrained, tmp_path, capsys, monkeypatch):
    append, calls = Journal.append_all, []

    def interrupted(self, entries):
        append(self, entries)
        calls.append(len(entries))
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append_all", interrupted)
    arguments = ["evaluate", "testbed", "--limit", "8", "--max-new-tokens", "3", "--out", str(tmp_path)]
    arguments += ["--conditions", "plain", "bridge", "--batch-size", "2"]
    assert command.main(arguments) == 130
    printed = capsys.readouterr()
    assert "6 of 8 questions are not answered yet under every condition" in printed.out
    assert "interrupted: 6 of 16 answers are written; run the same command again" in printed.err
    assert command.main(arguments) == 0


def test_a_full_disk_is_code_1(untrained, tmp_path, capsys, monkeypatch):
    def full(self, entries):
        raise DiskFullError("cannot write answers.jsonl (No space left on device)")

    monkeypatch.setattr(Journal, "append_all", full)
    arguments = ["evaluate", "testbed", "--limit", "4", "--max-new-tokens", "3", "--out", str(tmp_path)]
    assert command.main([*arguments, "--conditions", "plain"]) == 1
    assert "the disk is full" in capsys.readouterr().err


def test_progress_is_counted_in_answers(untrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0.0)
    arguments = ["evaluate", "testbed", "--limit", "4", "--max-new-tokens", "3", "--conditions", "plain"]
    assert command.main([*arguments, "--batch-size", "2"]) == 0
    first, second = [line for line in capsys.readouterr().err.splitlines() if "tokens/s" in line]
    assert first.startswith("2 of 4 answers, ") and " s per answer, about 0:0" in first
    assert second.startswith("4 of 4 answers, ") and second.endswith("about 0:00 left")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.jsonl"], "cannot read nothing.jsonl"),
        (
            ["nothing.jsonl", "--grader", "steps"],
            "--grader steps: the right steps are known for testbed and testbed-12 alone",
        ),
        (["nothing.jsonl", "--grader", "code"], "cannot read nothing.jsonl"),
        (["testbed", "--grader", "choice"], "--grader choice: 'testbed' has no such questions"),
        (["testbed", "--conditions", "magic"], "--conditions: magic; known are plain, bridge"),
        (["testbed", "--samples", "3"], "3 samples of greedy decoding"),
        (["testbed", "--tau-max", "2"], "tau_max"),
        (["testbed", "--out", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["testbed", "--prompt", "Think hard."], "expected a text with {question} in it"),
        (["testbed", "--alpha", "0"], "expected both halves on"),
        (["testbed", "--boundaries", "never"], "boundaries is 'never'"),
        (["testbed", "--top-p", "0"], "top_p 0.0"),
        (["testbed", "--shard", "2/2"], "shard 2/2 does not exist"),
        (["testbed", "--shard", "half"], "'half' is not a shard"),
        (["testbed", "--device", "cuda:9"], "there is no CUDA device here"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(arguments, said, capsys):
    assert command.main(["evaluate", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_code_is_not_run_without_leave(tmp_path, capsys, untrained):
    path = tmp_path / "q.jsonl"
    line = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(c):\n    assert c(1)"}
    path.write_text(json.dumps(line))
    assert command.main(["evaluate", str(path), "--grader", "code", "--model", "testbed"]) == 2
    assert "--allow-code-execution" in capsys.readouterr().err
