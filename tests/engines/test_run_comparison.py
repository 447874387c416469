import json

import numpy as np
import pytest

from stepflow_tl.cli.main import main
from stepflow_tl.engines.run_comparison import RunComparison, trace_lines
from stepflow_tl.engines.run_samples import Reading, RunSample, read_samples
from stepflow_tl.errors import ComparisonError, InputFileError
from stepflow_tl.statistics.paired import paired_difference


def line(index, score, *, filter="none", **fields):
    """As lm-eval 0.4.13 writes it, without what is not read."""
    return {
        "doc_id": index,
        "doc": {"question": f"q{index}", "subject": "odd" if index % 2 else "even"},
        "arguments": {"gen_args_0": {"arg_0": f"<|im_start|>user\nq{index}", "arg_1": {"until": []}}},
        "resps": [[f"answer {index}"]],
        "filter": filter,
        "metrics": ["exact_match", "length"],
        "doc_hash": f"hash {index}",
        "exact_match": float(score),
        "length": 7.0,
        **fields,
    }


@pytest.fixture
def write_run(tmp_path):
    def write(name, lines, task="gsm8k"):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"samples_{task}_2026-11-28T08-27-55.123456.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in lines))
        return tmp_path / name

    return write


PLAIN = [0, 0, 0, 0, 1, 1, 0, 0, 1, 0]
REPAIRED = [1, 1, 1, 1, 1, 0, 1, 0, 1, 1]


def test_runs_of_the_harness_are_paired_and_compared_as_by_hand(write_run, tmp_path, capsys):
    plain = write_run("plain", [line(i, s) for i, s in enumerate(PLAIN)])
    repaired = write_run("repaired", [line(i, s) for i, s in reversed([*enumerate(REPAIRED)])])
    control = write_run("control", [line(i, s) for i, s in enumerate(PLAIN)])
    names = [f"plain={plain}", f"StepFlow={repaired}", f"control={control}"]
    out, traces = tmp_path / "out.json", tmp_path / "traces.jsonl"
    words = ["compare-runs", *names, "--subject", "subject", "--out", str(out), "--traces", str(traces)]
    assert main(words) == 0
    text = capsys.readouterr().out
    expected = paired_difference(np.array(REPAIRED, float), np.array(PLAIN, float), binary=True)
    found = json.loads(out.read_text())
    first, second, third = found["differences"]
    assert (first["difference"], first["low"], first["high"], first["p_value"]) == pytest.approx(
        (expected.difference, expected.low, expected.high, expected.p_value)
    )
    assert (first["gained"], first["lost"]) == (6, 1)
    assert (third["run"], third["against"]) == ("StepFlow", "control") and second["p_value"] == 1
    assert "McNemar's exact test" in text and "no answer" in text
    assert "StepFlow minus plain, by subject" in text
    odd = paired_difference(np.array(REPAIRED[1::2], float), np.array(PLAIN[1::2], float), binary=True)
    row = next(each for each in text.splitlines() if each.split()[:1] == ["odd"])
    assert row.split()[1] == "5" and f"{odd.difference:+.4f}" in row
    rows = [json.loads(each) for each in traces.read_text().splitlines()]
    assert len(rows) == 30 and rows[0]["text"] == "<|im_start|>user\nq0answer 0"
    assert rows[10]["is_correct"] is True and rows[10]["condition"] == "StepFlow"
    assert len({each["id"] for each in rows}) == 30 and rows[0]["problem_id"] == "gsm8k/0"


def test_the_traces_are_what_analyze_reads(write_run, tmp_path):
    from stepflow_tl.runs.records import Record, read_records

    samples = read_samples(write_run("plain", [line(0, 1)]))
    path = tmp_path / "t.jsonl"
    path.write_text("".join(trace_lines({"plain": samples})))
    [record] = read_records(path, group_by="is_correct", pair_by="problem_id")
    assert isinstance(record, Record) and record.group is True and record.pair == "gsm8k/0"


def test_several_tasks_are_several_subjects_and_missing_questions_are_counted(write_run):
    plain = write_run("plain", [line(i, 1) for i in range(3)], task="mmlu_law")
    write_run("plain", [line(0, 0)], task="mmlu_art")
    other = write_run("other", [line(i, 0) for i in range(2)], task="mmlu_law")
    write_run("other", [line(0, 0)], task="mmlu_art")
    found = RunComparison.of({"plain": read_samples(plain), "other": read_samples(other)})
    assert set(found.subjects) == {"mmlu_law", "mmlu_art"} and found.n_left_out == (1, 0)
    assert "plain: 1 questions left out" in found.table()


def test_several_samples_of_a_question_are_averaged_and_not_mcnemars():
    def samples(*scores):
        return [RunSample("q", score, "s", "", {}) for score in scores] + [RunSample("r", 0.0, "s", "", {})]

    found = RunComparison.of({"plain": samples(0.0, 1.0), "other": samples(1.0, 1.0)})
    assert not found.is_binary and found.scores.tolist() == [[0.5, 0.0], [1.0, 0.0]]
    assert "sign flips" in found.table()


@pytest.mark.parametrize(
    ("lines", "reading", "words"),
    [
        (
            [line(0, 1), line(0, 0, filter="strict-match")],
            {},
            "several filters: name one of none, strict-match",
        ),
        ([line(0, 1)], {"filter": "flexible"}, "no filter 'flexible': expected none"),
        ([line(0, 1)], {"metric": "bleu"}, "no metric 'bleu': expected exact_match, length"),
        ([line(0, 1)], {"subject": "field"}, "line 1 .*'field'"),
        ([{"id": 3}], {}, "line 1 is not a scored sample"),
    ],
)
def test_a_file_that_does_not_say_what_is_asked_for_is_refused(write_run, lines, reading, words):
    with pytest.raises(InputFileError, match=words):
        read_samples(write_run("run", lines), Reading(**reading))


def test_a_filter_and_a_metric_can_be_named(write_run):
    path = write_run("run", [line(0, 1), line(0, 0, filter="strict-match")])
    [sample] = read_samples(path, Reading(filter="strict-match"))
    assert sample.score == 0
    [sample] = read_samples(path, Reading(filter="none", metric="length"))
    assert sample.score == 7
    with pytest.raises(ComparisonError, match="expected 0 to 1; name another metric"):
        RunComparison.of({"a": [sample], "b": [sample]})


def test_folders_without_or_with_several_runs_are_refused(write_run, tmp_path):
    with pytest.raises(InputFileError, match="has no samples: expected samples_"):
        read_samples(tmp_path)
    path = write_run("run", [line(0, 1)])
    (path / "model" / "samples_gsm8k_2026-11-29T00-00-00.000000.jsonl").write_text("{}")
    with pytest.raises(InputFileError, match="holds several runs"):
        read_samples(path)


def test_different_questions_under_one_id_are_refused(write_run):
    plain = read_samples(write_run("plain", [line(0, 1)]))
    other = read_samples(write_run("other", [line(0, 1, doc_hash="another")]))
    with pytest.raises(ComparisonError, match="gsm8k/0 is not the same question"):
        RunComparison.of({"plain": plain, "other": other})
    with pytest.raises(ComparisonError, match="1 runs: expected two or three"):
        RunComparison.of({"plain": plain})
    strange = [RunSample("x/0", 1.0, "x", "", {})]
    with pytest.raises(ComparisonError, match="share no question.*'gsm8k/0', 'x/0'"):
        RunComparison.of({"plain": plain, "other": strange})
    with pytest.raises(ComparisonError, match="no generated text"):
        list(trace_lines({"other": strange}))


def test_names_are_needed_and_runs_must_differ(write_run, capsys):
    path = write_run("run", [line(0, 1)])
    assert main(["compare-runs", str(path), f"b={path}"]) == 2
    assert "is not NAME=PATH" in capsys.readouterr().err
    assert main(["compare-runs", f"a={path}", f"b={path}"]) == 2
    assert "these runs must differ" in capsys.readouterr().err


def test_runs_of_one_name_are_samples_of_the_same_questions(write_run, tmp_path, capsys):
    runs = [
        f"{name}={write_run(f'{name}{seed}', [line(i, (i + seed) % 2 or up) for i in range(4)])}"
        for name, up in (("plain", 0), ("StepFlow", 1))
        for seed in range(2)
    ]
    out, traces = tmp_path / "out.json", tmp_path / "traces.jsonl"
    assert main(["compare-runs", *runs, "--out", str(out), "--traces", str(traces)]) == 0
    assert json.loads(out.read_text())["scores"] == {"plain": [0.5] * 4, "StepFlow": [1.0] * 4}
    assert "sign flips" in capsys.readouterr().out
    ids = [json.loads(each)["id"] for each in traces.read_text().splitlines()]
    assert len(set(ids)) == 16 and {"plain/gsm8k/0/0", "plain/gsm8k/0/1"} <= set(ids)


def test_a_filter_and_a_metric_are_left_aside_where_a_task_has_them_not(write_run):
    write_run("run", [line(0, 1)], task="aime24")
    write_run("run", [line(0, 0, metrics=["exact_match", "math_verify"], math_verify=1)], task="math")
    path = write_run("run", [line(0, 1), line(0, 0, filter="strict-match")], task="gpqa")
    found = read_samples(path, Reading(filter="strict-match", metric="math_verify"))
    assert {each.question: each.score for each in found} == {"aime24/0": 1, "gpqa/0": 0, "math/0": 1}
    write_run("run", [line(0, 1), line(0, 0, filter="loose")], task="mmlu")
    with pytest.raises(InputFileError, match="several filters: name one of loose, none"):
        read_samples(path, Reading(filter="strict-match"))
