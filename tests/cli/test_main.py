"""The command itself: help at once, usage errors with code 2, errors in one line."""

import subprocess
import sys

import pytest

import stepflow_tl
from stepflow_tl.cli import arguments as command
from stepflow_tl.errors import ModelError
from stepflow_tl.models import loading as models
from stepflow_tl.models.loading import DEFAULT_MODEL
from stepflow_tl.runs.options import parse_numbers


def run_fresh(*arguments, python=None):
    """The command in a process of its own."""
    call = (
        [sys.executable, "-m", "stepflow_tl", *arguments]
        if python is None
        else [sys.executable, "-c", python]
    )
    return subprocess.run(call, capture_output=True, text=True, encoding="utf-8", timeout=120)


def test_help_shows_an_example_of_each_command():
    found = run_fresh("--help")
    assert (found.returncode, found.stderr) == (0, "")
    assert "stepflow-tl demo\n" in found.stdout and "stepflow-tl analyze traces.jsonl" in found.stdout


def test_help_of_analyze_shows_the_input_and_the_exit_codes():
    found = run_fresh("analyze", "--help")
    assert found.returncode == 0
    for word in ("question, thinking, summary", '"is_correct": true', "--group-by", "exit code", "130"):
        assert word in found.stdout


def test_version_is_the_package_version():
    assert run_fresh("--version").stdout == f"stepflow-tl {stepflow_tl.__version__}\n"


def test_help_imports_nothing_heavy():
    run = "import sys; from stepflow_tl.cli.main import main; main(['analyze', '--help'])"
    modules = run_fresh(python=f"{run}; print(sorted(sys.modules))").stdout
    assert "'argparse'" in modules
    for heavy in ("torch", "transformers", "transformer_lens", "numpy", "matplotlib"):
        assert f"'{heavy}'" not in modules


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: demo | analyze | evaluate | study | report"),
        (["analyse"], "invalid choice: 'analyse'"),
        (["analyze", "x.jsonl"], "the following arguments are required: --out"),
        (["analyze", "x", "--out", "y", "--layers", "0-"], "expected numbers and ranges such as 0-6,23-29"),
        (["analyze", "x", "--out", "y", "--layers", "6-2"], "'6-2' runs backwards: write 2-6"),
        (["analyze", "x", "--out", "y", "--layers", "1,0-3"], "names a number twice"),
        (
            ["analyze", "x", "--out", "y", "--objective", "loss"],
            "'loss' is none of per_token, log_odds",
        ),
        (["analyze", "x", "--out", "y", "--limit", "0"], "'0' is not a whole number from 1 on"),
        (["analyze", "x", "--out", "y", "--device", "gpu"], "'gpu' is none of cpu, cuda, cuda:N, mps"),
        (["analyze", "x", "--out", "y", "--splitter", "word"], "invalid choice: 'word'"),
        (
            ["analyze", "x", "--out", "y", "--pair-by", "p"],
            "--pair-by, --unpaired and --match go with --group-by",
        ),
        (
            ["analyze", "x", "--out", "y", "--group-by", "g", "--pair-by", "p", "--unpaired"],
            "not allowed with",
        ),
    ],
)
def test_a_usage_error_says_what_is_expected_and_ends_with_2(arguments, said, run_cli):
    found = run_cli(*arguments)
    assert found.code == 2
    assert said in found.err


def test_layers_are_read_as_numbers_and_ranges():
    assert parse_numbers("0-2, 7,9-9") == (0, 1, 2, 7, 9)


def test_the_default_model_is_the_embedded_one():
    assert command.DEFAULT_MODEL == DEFAULT_MODEL


def test_an_error_of_the_package_is_one_line_and_code_2(
    run_cli, write_lines, make_record, tmp_path, monkeypatch
):
    def refuse(name, device, dtype):
        raise ModelError(f"no model {name!r}: name another")

    monkeypatch.setattr(models, "load_model", refuse)
    found = run_cli("analyze", write_lines(make_record()), "--out", tmp_path / "out", "--model", "nothing")
    assert (found.code, found.out) == (2, "")
    assert found.err == "stepflow-tl: error: no model 'nothing': name another\n"


def test_ctrl_c_before_the_first_trace_ends_with_130(
    run_cli, write_lines, make_record, tmp_path, monkeypatch
):
    def interrupt(name, device, dtype):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load_model", interrupt)
    found = run_cli("analyze", write_lines(make_record()), "--out", tmp_path / "out")
    assert (found.code, found.err) == (130, "stepflow-tl: interrupted\n")
