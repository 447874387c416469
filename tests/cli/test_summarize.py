"""`stepflow-tl summarize`, in process, on run folders made by hand."""

import json

import pytest
from run_folders import make_run


def test_a_run_is_summarised_compared_and_written(tmp_path, run_cli):
    make_run(tmp_path, 8)
    done = run_cli("summarize", tmp_path, "--group-by", "is_correct", "--verify")
    assert done.code == 0, done.err
    for text in ("Means over 8 traces", "correct (4 traces) minus not correct (4 traces)", "layers.parquet"):
        assert text in done.out
    assert (tmp_path / "layers.parquet").is_file()


def test_labels_come_from_the_input_of_the_run(tmp_path, run_cli, write_lines, make_record):
    make_run(tmp_path, 6)
    labels = write_lines(
        *(make_record(f"t{i}", is_long=i < 3, problem_id=i % 3) for i in range(6)), "not a record"
    )
    done = run_cli("summarize", tmp_path, "--group-by", "is_long", "--labels", labels)
    assert done.code == 0 and "long (3 traces) minus not long (3 traces)" in done.out
    assert "paired over 3 problems" in done.out and "line 7: not JSON" in done.err


def test_labels_with_an_id_twice_are_refused(tmp_path, run_cli, write_lines, make_record):
    make_run(tmp_path, 2)
    labels = write_lines(make_record("a"), make_record("a"))
    done = run_cli("summarize", tmp_path, "--group-by", "x", "--labels", labels)
    assert done.code == 2 and "line 2: the id 'a' occurs twice" in done.err


def test_a_missing_result_or_comparison_is_exit_code_1(tmp_path, run_cli):
    lines = make_run(tmp_path, 4)
    assert run_cli("summarize", tmp_path).code == 0
    (tmp_path / "t3.safetensors").unlink()
    done = run_cli("summarize", tmp_path)
    assert done.code == 1 and "missing: " in done.out
    ungrouped = [json.dumps({**line, "group": None}) for line in lines[:3]]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join([manifest.read_text().splitlines()[0], *ungrouped]) + "\n")
    done = run_cli("summarize", tmp_path, "--group-by", "is_correct")
    assert done.code == 1 and "no trace has a group" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "is not a folder"),
        ([".", "--labels", "x.jsonl"], "--labels goes with --group-by"),
        ([".", "--pair-by", "x", "--unpaired"], "not allowed with"),
    ],
)
def test_what_cannot_start_is_exit_code_2(tmp_path, run_cli, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run_cli("summarize", *arguments)
    assert done.code == 2 and message in done.err and len(done.out) == 0
