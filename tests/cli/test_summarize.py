"""`stepflow-tl summarize`, in process, on run folders made by hand."""

import json

import pytest
from answer_files import answer, write_answers
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


def test_matched_pairs_stand_beside_all_traces(tmp_path, run_cli):
    make_run(tmp_path, 8)
    done = run_cli("summarize", tmp_path, "--unpaired", "--match", "steps,tokens")
    assert done.code == 0, done.err
    for text in (
        "group (4 traces) minus not group (4 traces): tiny, objective per_token\n",
        "group (4 traces) minus not group (4 traces): tiny, objective per_token, matched pairs",
        "matched on thinking steps (within 1) and tokens (within 10 %): 4 pairs",
    ):
        assert text in done.out
    assert "matched on" not in run_cli("summarize", tmp_path, "--unpaired").out


def test_the_answers_of_an_evaluation_are_labels_too(tmp_path, run_cli, tiny_tokenizer):
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run", 6)
    lines = [answer(tiny_tokenizer, f"q{i % 3}", right=i < 3, id=f"t{i}") for i in range(6)]
    write_answers(tmp_path / "answers.jsonl", *lines)
    done = run_cli(
        "summarize", tmp_path / "run", "--group-by", "right", "--pair-by", "question_id", "--labels", tmp_path
    )
    assert done.code == 0 and "right (3 traces) minus not right (3 traces)" in done.out
    assert "paired over 3 problems" in done.out


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
        ([".", "--match", "length"], "'length' is none of steps, tokens, steps,tokens"),
    ],
)
def test_what_cannot_start_is_exit_code_2(tmp_path, run_cli, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run_cli("summarize", *arguments)
    assert done.code == 2 and message in done.err and len(done.out) == 0
