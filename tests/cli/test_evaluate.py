"""`stepflow-tl evaluate` on a model of random weights: what it prints, writes and refuses."""

import json

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from stepflow_tl.cli import main as command
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
    monkeypatch.setattr(testbed, "load_testbed_model", lambda *_: model)


def test_the_testbed_is_evaluated(untrained, tmp_path, capsys):
    out = tmp_path / "scores.json"
    arguments = ["evaluate", "testbed", "--limit", "9", "--max-new-tokens", "4", "--out", str(out)]
    assert command.main([*arguments, "--conditions", "plain", "bridge", "bridge control"]) == 0
    printed = capsys.readouterr()
    for said in ("difference to plain", "difference to its control", "McNemar", "paired over 9 questions"):
        assert said in " ".join(printed.out.split())
    data = json.loads(out.read_text())
    assert list(data["conditions"]) == ["plain", "bridge", "bridge control"] and len(data["questions"]) == 9


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.jsonl"], "cannot read nothing.jsonl"),
        (
            ["nothing.jsonl", "--grader", "steps"],
            "--grader steps: the right steps are known for 'testbed' alone",
        ),
        (["nothing.jsonl", "--grader", "code"], "cannot read nothing.jsonl"),
        (["testbed", "--grader", "choice"], "--grader choice: 'testbed' has no such questions"),
        (["testbed", "--conditions", "magic"], "--conditions: magic; known are plain, bridge"),
        (["testbed", "--samples", "3"], "3 samples of greedy decoding"),
        (["testbed", "--tau-max", "2"], "tau_max"),
        (["testbed", "--out", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
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
