"""`stepflow-tl analyze` in process on a tiny random model: what is written, kept, refused and said."""

import csv
import gc
import json
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from answer_files import answer, write_answers
from dying import interrupted_at
from safetensors.torch import save_file

from stepflow_tl.diagnosis import LAYER_METRICS, diagnose
from stepflow_tl.models import loading as models
from stepflow_tl.runs import worker as command
from stepflow_tl.runs.plan import hashed_stem
from stepflow_tl.saliency import StepSaliency, step_saliency
from stepflow_tl.stepflow import StepFlow
from stepflow_tl.trace import ReasoningTrace


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def analyze(run_cli, loaded_model, out):
    """`analyze(path, *options)` on the tiny model, results in `out`."""
    return lambda path, *options: run_cli("analyze", path, "--out", out, *options)


def rows(out):
    with (out / "summary.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def results(out):
    return sorted(path.name for path in out.glob("*.safetensors"))


def grouped_records(make_record, n_problems=4):
    """Pairs of a correct and a wrong trace a problem, all texts different."""
    return [
        make_record(
            f"{problem}-{is_correct}",
            thinking=f"{problem}*4 is {number}.\n\n2+{number} it is.\n\nSo {number}.",
            is_correct=is_correct,
            problem_id=problem,
        )
        for problem in range(n_problems)
        for is_correct, number in ((True, 12 + problem), (False, 70 + 3 * problem))
    ]


def test_a_result_file_is_what_step_saliency_gives(analyze, write_lines, make_record, loaded_model, out):
    found = analyze(write_lines(make_record("a")))
    assert found.code == 0
    result = StepSaliency.load(out / "a.safetensors")
    fields = make_record()
    trace = ReasoningTrace.from_parts(
        loaded_model.tokenizer, fields["question"], fields["thinking"], fields["summary"]
    )
    expected = step_saliency(loaded_model, trace)
    assert result.trace == trace
    assert result.labels == ["Q", "T1", "T2", "T3", "S1"]
    assert torch.equal(result.sums, expected.sums) and bool(result.sums.any())


def test_the_summary_file_holds_the_band_means_of_every_trace(analyze, write_lines, make_record, out):
    analyze(write_lines(make_record("a"), make_record("b", summary="")))
    with_summary, without = rows(out)
    diagnosis = diagnose(StepSaliency.load(out / "a.safetensors"))
    assert (with_summary["line"], with_summary["id"], with_summary["status"]) == ("1", "a", "analysed")
    assert (with_summary["n_question"], with_summary["n_thinking"], with_summary["n_summary"]) == (
        "1",
        "3",
        "1",
    )
    assert int(with_summary["n_tokens"]) == len(StepSaliency.load(out / "a.safetensors").trace)
    for band in ("shallow", "deep"):
        for metric in LAYER_METRICS:
            assert float(with_summary[f"{band}_{metric}"]) == diagnosis.band(band)[metric]
    assert float(with_summary["decay_slope"]) == diagnosis.decay_slope
    assert without["deep_thinking_share"] == "" and without["deep_lock_in"] != ""


def test_the_table_holds_means_over_the_traces_that_have_a_value(analyze, write_lines, make_record, out):
    found = analyze(
        write_lines(make_record("a"), make_record("b", thinking="No.\n\nYes."), make_record("c", summary=""))
    )
    table = {tuple(line.split()[:2]): line.split()[2:] for line in found.out.splitlines() if line}
    lock_in = [float(row["shallow_lock_in"]) for row in rows(out)]
    thinking_share = [float(row["deep_thinking_share"]) for row in rows(out)[:2]]
    assert float(table["lock", "in"][0]) == pytest.approx(math.fsum(lock_in) / 3, abs=1e-4)
    assert table["lock", "in"][-1] == "3"
    assert float(table["thinking", "share"][3]) == pytest.approx(math.fsum(thinking_share) / 2, abs=1e-4)
    assert table["thinking", "share"][-1] == "2"
    assert "3 analysed" in found.out and ", 0 kept, 0 failed" in found.out


def test_one_bad_line_costs_that_line_only(analyze, write_lines, make_record, out):
    found = analyze(
        write_lines(make_record("a"), "{broken", {"id": "x", "question": ["q"]}, make_record("b"))
    )
    assert found.code == 1
    assert results(out) == ["a.safetensors", "b.safetensors"]
    assert "line 2: not JSON" in found.err
    assert "line 3: field 'question' is a list, expected a string" in found.err
    assert "2 analysed" in found.out and "2 failed\n  line 2: not JSON" in found.out
    assert [row["status"] for row in rows(out)] == ["analysed", "failed", "failed", "analysed"]


def test_a_trace_that_fails_is_named_and_the_run_goes_on(analyze, write_lines, make_record, out):
    path = write_lines(
        make_record("long", thinking="word " * 100), make_record("empty", question=" "), make_record("b")
    )
    found = analyze(path)
    assert found.code == 1
    assert "line 1, id 'long': the trace has" in found.err and "context holds 256" in found.err
    assert "line 2, id 'empty': The question is empty" in found.err
    assert results(out) == ["b.safetensors"]


def test_an_objective_that_a_trace_lacks_fails_that_trace(analyze, write_lines, make_record):
    found = analyze(write_lines(make_record("a", summary=""), make_record("b")), "--objective", "summary")
    assert found.code == 1
    assert "id 'a': objective 'summary' touches no token" in found.err
    assert "1 analysed" in found.out


def test_a_fault_that_nobody_foresaw_is_named_with_its_traceback(
    analyze, write_lines, make_record, monkeypatch
):
    def fail(model, trace, **options):
        raise IndexError("index 7 is out of range")

    monkeypatch.setattr(command, "step_saliency", fail)
    found = analyze(write_lines(make_record("a")))
    assert found.code == 1
    assert "line 1, id 'a': unexpected IndexError: index 7 is out of range" in found.err
    assert "Traceback" in found.err


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"),
              RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
)  # fmt: skip
def test_a_trace_too_large_for_the_memory_is_a_failure_of_that_trace(
    error, analyze, write_lines, make_record, monkeypatch
):
    def fail(model, trace, **options):
        raise error

    monkeypatch.setattr(command, "step_saliency", fail)
    found = analyze(write_lines(make_record("a")))
    assert found.code == 1
    assert "id 'a': not enough memory for this trace" in found.err
    assert "Traceback" not in found.err


def test_a_duplicate_id_is_refused_and_the_first_result_stays(analyze, write_lines, make_record, out):
    found = analyze(write_lines(make_record(5), make_record("5", thinking="Other.\n\nText.")))
    assert found.code == 1
    assert "line 2, id '5': duplicate id, first on line 1: ids must differ" in found.err
    assert StepSaliency.load(out / "5.safetensors").trace.steps[1].text == "3*4 is 12.\n\n"


def test_hostile_ids_stay_in_the_folder_and_on_one_line(analyze, write_lines, make_record, out, tmp_path):
    ids = [
        "../escape",
        str(tmp_path / "absolute"),
        "nul\x00byte",
        "x" * 3000,
        "bell\x1b[2J\n",
        "Case",
        "case",
    ]
    found = analyze(write_lines(*(make_record(trace_id) for trace_id in ids), "{"))
    assert "7 analysed" in found.out
    assert {path.name for path in tmp_path.iterdir()} == {"traces.jsonl", "out"}
    expected = [hashed_stem(trace_id) for trace_id in ids if trace_id != "Case"] + ["Case"]
    assert results(out) == sorted(f"{stem}.safetensors" for stem in expected)
    assert [row["id"] for row in rows(out)] == [*ids, ""]
    assert "\x1b" not in found.out + found.err


def test_existing_results_are_kept_and_give_the_same_numbers(
    analyze, write_lines, make_record, out, monkeypatch
):
    path = write_lines(make_record("a"), make_record("b", thinking="Other.\n\nText."))
    analyze(path)
    first = [{k: v for k, v in row.items() if k not in ("status", "seconds")} for row in rows(out)]
    written = {name: (out / name).stat().st_mtime_ns for name in results(out)}

    def refuse(model, trace, **options):
        raise AssertionError("analysed again")

    monkeypatch.setattr(command, "step_saliency", refuse)
    found = analyze(path)
    assert found.code == 0 and "0 analysed, 2 kept, 0 failed" in found.out
    assert {name: (out / name).stat().st_mtime_ns for name in results(out)} == written
    assert [{k: v for k, v in row.items() if k not in ("status", "seconds")} for row in rows(out)] == first


def test_overwrite_analyses_again(analyze, write_lines, make_record, out):
    path = write_lines(make_record("a"))
    analyze(path, "--layers", "0")
    found = analyze(path, "--overwrite")
    assert "1 analysed" in found.out and "0 kept" in found.out
    assert StepSaliency.load(out / "a.safetensors").layers == (0, 1, 2, 3)


@pytest.mark.parametrize("damage", ["truncated", "empty", "not safetensors"])
def test_a_damaged_result_is_analysed_again_and_that_is_said(damage, analyze, write_lines, make_record, out):
    path = write_lines(make_record("a"), make_record("b"))
    analyze(path)
    target = out / "a.safetensors"
    whole = target.read_bytes()
    target.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "not safetensors": b"x" * 500}[damage]
    )
    found = analyze(path)
    assert found.code == 0
    assert "line 1, id 'a': analysed again, because" in found.err and "a.safetensors" in found.err
    assert "1 analysed" in found.out and "1 kept" in found.out
    assert torch.equal(StepSaliency.load(target).sums, StepSaliency.load(out / "b.safetensors").sums)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--objective", "response"], "objective per_token, this one has response"),
        (["--layers", "1,2"], "layers [0, 1, 2, 3], this one has [1, 2]"),
        (["--splitter", "whole"], "from another trace (text, format or splitter differ)"),
    ],
)
def test_a_result_of_another_analysis_is_neither_kept_nor_replaced(
    options, said, analyze, write_lines, make_record, out
):
    path = write_lines(make_record("a"))
    analyze(path)
    before = (out / "a.safetensors").read_bytes()
    (out / "manifest.jsonl").unlink()
    found = analyze(path, *options)
    assert found.code == 1
    assert said in found.err and "--overwrite" in found.err
    assert (out / "a.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--objective", "response"], "objective per_token, this one has response"),
        (["--layers", "1,2"], "layers [0, 1, 2, 3], this one has [1, 2]"),
        (["--splitter", "whole"], "splitter paragraph, this one has whole"),
    ],
)
def test_a_folder_holds_one_analysis(options, said, analyze, write_lines, make_record, out):
    analyze(write_lines(make_record("a")))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    found = analyze(write_lines(make_record("b")), *options)
    assert found.code == 2
    assert said in found.err and "--overwrite" in found.err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_tensors_of_someone_else_are_left_alone(analyze, write_lines, make_record, out):
    out.mkdir()
    save_file({"weight": torch.ones(3)}, out / "model.safetensors")
    before = (out / "model.safetensors").read_bytes()
    found = analyze(write_lines(make_record("model")))
    assert found.code == 1
    assert "not a step-saliency result" in found.err and "It was left alone" in found.err
    assert (out / "model.safetensors").read_bytes() == before


def test_layers_and_limit_and_splitter_reach_the_analysis(analyze, write_lines, make_record, out):
    path = write_lines(make_record("a", thinking="One.\nTwo.\nThree."), make_record("b"))
    found = analyze(path, "--layers", "0,2-3", "--limit", "1", "--splitter", "line")
    assert found.code == 0 and results(out) == ["a.safetensors"]
    result = StepSaliency.load(out / "a.safetensors")
    assert result.layers == (0, 2, 3)
    assert result.labels == ["Q", "T1", "T2", "T3", "S1"]


def test_a_full_transcript_is_read_by_its_markers(analyze, write_lines, out):
    text = (
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n<think>\nA.\n\nB.\n</think>\nC.<|im_end|>"
    )
    assert analyze(write_lines({"id": "t", "text": text})).code == 0
    result = StepSaliency.load(out / "t.safetensors")
    assert result.labels == ["Q", "T1", "T2", "S1"]
    assert result.trace.text == text


def test_plain_text_takes_the_question_from_its_field(analyze, write_lines, out):
    record = {"id": "t", "text": "What? First this.\n\nThen that.", "question": "What?"}
    assert analyze(write_lines(record), "--format", "plain").code == 0
    assert StepSaliency.load(out / "t.safetensors").labels == ["Q", "T1", "T2"]


def test_groups_are_compared_paired_by_problem(analyze, write_lines, make_record, out):
    found = analyze(write_lines(*grouped_records(make_record)), "--group-by", "is_correct")
    assert found.code == 0
    assert "By is_correct, paired by problem_id\ncorrect (4 traces) minus not correct (4 traces)" in found.out
    assert "paired over 4 problems" in found.out
    data = json.loads((out / "comparison.json").read_text())
    assert data["names"] == ["correct", "not correct"] and data["pairing"]["n_pairs"] == 4
    lock_in = [float(row["shallow_lock_in"]) for row in rows(out) if row["group"] == "true"]
    assert data["headline"][0]["mean"] == pytest.approx(math.fsum(lock_in) / 4)
    assert "layer 3" in (out / "comparison.txt").read_text()


def test_unpaired_compares_independent_groups(analyze, write_lines, make_record):
    found = analyze(write_lines(*grouped_records(make_record)), "--group-by", "is_correct", "--unpaired")
    assert found.code == 0
    assert "By is_correct\n" in found.out and "independent groups" in found.out


def test_traces_without_group_or_problem_are_left_out_and_counted(analyze, write_lines, make_record):
    records = [*grouped_records(make_record), make_record("x"), make_record("y", is_correct=True)]
    found = analyze(write_lines(*records), "--group-by", "is_correct")
    assert found.code == 0
    assert "1 trace has no is_correct: left out of the comparison" in found.out
    assert "1 trace has no problem_id: left out of the comparison" in found.out


def test_another_field_can_pair(analyze, write_lines, make_record):
    records = [{**record, "pair": record.pop("problem_id") // 2} for record in grouped_records(make_record)]
    found = analyze(write_lines(*records), "--group-by", "is_correct", "--pair-by", "pair")
    assert found.code == 0
    assert "paired over 2 problems" in found.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"is_correct": True}, "is_correct is true in 8 and false in 0 traces with a result"),
        ({"problem_id": None, "other": 1}, "is_correct is true in 0 and false in 0"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_a_failure_with_its_reason(
    change, said, analyze, write_lines, make_record, out
):
    path = write_lines(*({**record, **change} for record in grouped_records(make_record)))
    found = analyze(path, "--group-by", "is_correct", "--pair-by", "problem_id")
    assert found.code == 1
    assert f"no comparison by is_correct: {said}" in found.err and "--unpaired" in found.err
    assert "8 analysed" in found.out and (out / "summary.csv").exists()


def test_ctrl_c_ends_with_the_summary_so_far_and_code_130(
    analyze, write_lines, make_record, out, monkeypatch
):
    monkeypatch.setattr(command, "step_saliency", interrupted_at(3, step_saliency))
    path = write_lines(*(make_record(name) for name in "abcde"))
    found = analyze(path)
    assert found.code == 130
    assert "interrupted after 2 of 5 traces; run the same command again to go on" in found.err
    assert "2 analysed" in found.out and [row["id"] for row in rows(out)] == ["a", "b"]
    assert results(out) == ["a.safetensors", "b.safetensors"]
    monkeypatch.setattr(command, "step_saliency", step_saliency)
    assert "3 analysed" in analyze(path).out


def test_figures_are_drawn_beside_the_results(analyze, write_lines, make_record, out):
    pytest.importorskip("matplotlib")
    assert analyze(write_lines(make_record("a_$1^b")), "--figures").code == 0
    stem = hashed_stem("a_$1^b")
    for ending in ("maps", "profile"):
        assert (out / f"{stem}.{ending}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "2-4"], "layers=[2, 3, 4]: the model has layers 0..3; [4] are outside it"),
        (["--format", "nothing"], "Unknown reasoning format 'nothing'"),
    ],
)
def test_what_no_trace_could_survive_stops_the_run_before_it_starts(
    options, said, analyze, write_lines, make_record, out
):
    found = analyze(write_lines(make_record("a")), *options)
    assert found.code == 2 and found.out == ""
    assert said in found.err
    assert results(out) == []


def test_a_model_without_hook_points_stops_the_run(run_cli, write_lines, make_record, tmp_path, monkeypatch):
    config = SimpleNamespace(n_layers=2, model_name="bare")
    bare = SimpleNamespace(tokenizer=object(), hook_dict={}, hooks=None, blocks=[], cfg=config)
    monkeypatch.setattr(models, "load_model", lambda name, device, dtype: bare)
    found = run_cli("analyze", write_lines(make_record("a")), "--out", tmp_path / "out")
    assert found.code == 2
    assert "the model has no `hook_embed`" in found.err


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that this machine has")
def test_a_device_that_is_not_there_is_named(device, analyze, write_lines, make_record):
    found = analyze(write_lines(make_record("a")), "--device", device)
    assert found.code == 2
    assert f"--device {device}: there is no CUDA device here" in found.err


def test_an_empty_file_and_a_folder_that_is_a_file_are_refused(analyze, write_lines, make_record, out):
    assert "holds no line" in analyze(write_lines("", " ", name="empty.jsonl")).err
    out.write_text("in the way")
    found = analyze(write_lines(make_record("a")))
    assert found.code == 2 and f"--out {out} cannot be made" in found.err


def test_memory_holds_numbers_only(analyze, write_lines, make_record, monkeypatch):
    """No step map outlives its trace: at most one is alive whenever the next is made."""
    alive = weakref.WeakSet()
    most = []

    def watched(model, trace, **options):
        gc.collect()
        most.append(len(alive))
        result = step_saliency(model, trace, **options)
        alive.add(result.sums)
        return result

    monkeypatch.setattr(command, "step_saliency", watched)
    assert analyze(write_lines(*(make_record(name) for name in "abcd")), "--group-by", "x").code == 1
    assert len(most) == 4 and max(most) == 0


def test_stepflow_on_the_command_line(analyze, write_lines, make_record, loaded_model, out):
    found = analyze(
        write_lines(make_record("a")), "--stepflow", "--tau-max", "0.4", "--alpha", "0", "--shallow", "0-1"
    )
    flow = StepFlow(tau_max=0.4, alpha=0, shallow=(0, 1))
    assert found.code == 0 and f"under {flow!r}" in found.out
    result = StepSaliency.load(out / "a.safetensors")
    assert torch.equal(result.sums, step_saliency(loaded_model, result.trace, stepflow=flow).sums)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tau-max", "0.4"], "the options of StepFlow go with --stepflow"),
        (["--stepflow", "--tau-max", "1.5"], "StepFlow cannot be made from these options: tau_max is 1.5"),
        (["--where", "condition"], "'condition' is not FIELD=VALUE"),
    ],
)
def test_options_that_mean_nothing_stop_before_the_model_is_loaded(
    options, said, analyze, write_lines, make_record, out
):
    found = analyze(write_lines(make_record("a")), *options)
    assert found.code == 2 and said in found.err and not out.exists()


def test_answers_are_chosen_grouped_and_paired_on_the_command_line(analyze, tiny_tokenizer, tmp_path, out):
    lines = [
        answer(tiny_tokenizer, f"q{i}", right=right, condition=condition, sample=int(right))
        for i in range(3)
        for condition in ("plain", "StepFlow")
        for right in (True, False)
    ]
    write_answers(tmp_path / "answers.jsonl", *lines)
    found = analyze(tmp_path, "--where", "condition=plain", "--group-by", "right", "--pair-by", "question_id")
    assert found.code == 0 and "6 analysed" in found.out and "By right, paired by question_id" in found.out
    assert len(results(out)) == 6


def test_matched_pairs_are_written_beside_the_raw_comparison(analyze, write_lines, make_record, out):
    records = [{**record, "problem_id": None} for record in grouped_records(make_record)]
    path = write_lines(*records)
    found = analyze(path, "--group-by", "is_correct", "--match", "steps,tokens")
    assert found.code == 0 and "matched on thinking steps (within 1) and tokens (within 10 %)" in found.out
    written = json.loads((out / "comparison.json").read_text())
    assert written["matching"] is None and written["matched"]["matching"]["n_pairs"] == 4
    assert (out / "comparison.txt").read_text().count("matched pairs") == 2  # headline and full table
    longer = [{**record, "thinking": "So.\n\n" * 9} if record["is_correct"] else record for record in records]
    found = analyze(write_lines(*longer), "--group-by", "is_correct", "--match", "steps", "--overwrite")
    assert (
        found.code == 0
        and "no matched comparison: matching on thinking steps (within 1) leaves 0" in found.out
    )
    assert json.loads((out / "comparison.json").read_text())["matched"] is None
