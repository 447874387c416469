"""`analyze_dataset` on a tiny model: resumed, sharded, full disks, equal bits."""

import errno
import gc
import json
import random
import resource
import signal
from collections import Counter
from functools import partial

import pytest
import torch
from dying import interrupted_at
from tiny_architectures import build_bridge

import stepflow_tl
from stepflow_tl.diagnosis import diagnose
from stepflow_tl.errors import DiskFullError, FusedRefusal, InputFileError, ModelError, ResultFileError
from stepflow_tl.results.files import file_digest, write_atomically
from stepflow_tl.runs import DatasetReport, Watcher, analyze_dataset, summary, worker
from stepflow_tl.saliency import StepSaliency, step_saliency
from stepflow_tl.saliency.backends import _checked


class Notes:
    """Keeps what a run says."""

    def __init__(self):
        self.total, self.messages, self.advances = 0, [], []

    def begin(self, total, settings, replicas):
        self.total = total

    def note(self, message):
        self.messages.append(message)

    def advance(self, n_tokens, seconds, tokens_left):
        self.advances.append((n_tokens, seconds, tokens_left))


@pytest.fixture
def analyze(tiny_model, out):
    return partial(run, tiny_model(), out)


def run(model, usual_out, source, **options):
    return analyze_dataset(model, source, options.pop("out", usual_out), **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def lines(folder, name="manifest.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()][1:]


def without_seconds(entries):
    return [{**entry, "seconds": None} for entry in entries]


def test_it_is_a_public_name_and_a_watcher_is_what_it_says(analyze, make_dataset):
    assert stepflow_tl.analyze_dataset is analyze_dataset
    assert isinstance(Notes(), Watcher)
    report = analyze(make_dataset(2))
    assert isinstance(report, DatasetReport) and report.is_complete
    assert report.counts == {"analysed": 2} and "Means over 2 traces" in str(report)


def test_a_line_of_the_manifest_holds_the_measures_of_its_file(analyze, make_dataset, out):
    analyze(make_dataset(2))
    for entry in lines(out):
        result = StepSaliency.load(out / entry["file"])
        diagnosis = diagnose(result)
        assert entry["n_tokens"] == len(result.trace) and entry["n_thinking"] == diagnosis.n_thinking
        assert entry["metrics"]["lock_in"] == diagnosis.lock_in.tolist()
        assert entry["decay_slope"] == diagnosis.decay_slope
        assert entry["sha256"] == file_digest(out / entry["file"]) and entry["seconds"] > 0


def test_two_runs_and_any_order_of_the_input_give_the_same_bytes(analyze, make_dataset, out, tmp_path):
    path = make_dataset(6)
    analyze(path)
    analyze(path, out=tmp_path / "again")
    rows = path.read_text().splitlines()
    random.Random(0).shuffle(rows)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(rows))
    analyze(shuffled, out=tmp_path / "shuffled")
    assert len(contents(out)) == 6
    assert contents(out) == contents(tmp_path / "again") == contents(tmp_path / "shuffled")
    assert without_seconds(lines(out)) == without_seconds(lines(tmp_path / "again"))


def test_the_first_trace_does_not_show_in_the_others(tiny_model, make_dataset, out, tmp_path):
    """The self-check's figure stands in every result; a resumed run begins with another trace."""
    path = make_dataset(3)
    run(tiny_model(), out, path)
    last = tmp_path / "last.jsonl"
    last.write_text(path.read_text().splitlines()[-1])
    _checked.clear()
    run(tiny_model(), tmp_path / "resumed", last)
    for name, data in contents(tmp_path / "resumed").items():
        assert contents(out)[name] == data
    assert b"self_check" in data


def test_shards_together_are_the_whole_run(analyze, make_dataset, out, tmp_path):
    path = make_dataset(7)
    analyze(path)
    reports = [analyze(path, out=tmp_path / "shards", shard=f"{i}/3") for i in range(3)]
    assert [report.total for report in reports] == [3, 2, 2]
    assert contents(tmp_path / "shards") == contents(out)
    names = [f"manifest-{i}-of-3.jsonl" for i in range(3)]
    parts = [entry for name in names for entry in lines(tmp_path / "shards", name)]
    assert sorted(map(repr, without_seconds(parts))) == sorted(map(repr, without_seconds(lines(out))))
    assert {path.name for path in (tmp_path / "shards").glob("*.csv")} == {
        f"summary-{i}-of-3.csv" for i in range(3)
    }


def test_a_result_whose_line_was_lost_is_taken_over(analyze, make_dataset, out, monkeypatch):
    path = make_dataset(3)
    analyze(path)
    whole = lines(out)
    manifest = out / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    monkeypatch.setattr(worker, "step_saliency", None)
    report = analyze(path)
    assert report.counts == {"kept": 3}
    assert without_seconds(lines(out)) == without_seconds(whole) and lines(out)[-1]["seconds"] == 0


def test_a_line_whose_result_is_gone_is_done_again(analyze, make_dataset, out):
    path = make_dataset(3)
    analyze(path)
    before = contents(out)
    (out / "t1.safetensors").unlink()
    assert analyze(path).counts == {"analysed": 1, "kept": 2}
    assert contents(out) == before
    assert Counter(entry["id"] for entry in lines(out)) == {"t0": 1, "t1": 2, "t2": 1}


def test_a_resumed_run_that_finds_all_done_writes_no_line(analyze, make_dataset, out):
    path = make_dataset(3)
    analyze(path)
    before = (out / "manifest.jsonl").read_bytes()
    assert analyze(path).counts == {"kept": 3}
    assert (out / "manifest.jsonl").read_bytes() == before


def test_a_label_that_comes_later_is_added_without_a_second_analysis(
    analyze, write_lines, make_record, out, monkeypatch
):
    path = write_lines(make_record("a", is_correct=True))
    analyze(path)
    monkeypatch.setattr(worker, "step_saliency", None)
    analyze(path, group_by="is_correct")
    assert [entry["group"] for entry in lines(out)] == [None, True]


def test_a_failure_is_remembered_until_it_is_asked_for_again_or_the_row_changes(
    analyze, make_dataset, write_lines, make_record, out, monkeypatch
):
    def fail(model, trace, **options):
        raise ModelError("no")

    path = make_dataset(2)
    monkeypatch.setattr(worker, "step_saliency", fail)
    assert analyze(path).counts == {"failed": 2}
    monkeypatch.setattr(worker, "step_saliency", step_saliency)
    notes = Notes()
    assert analyze(path, watcher=notes).counts == {"failed": 2}
    assert "line 1, id 't0': no (in an earlier run: --retry-failed)" in notes.messages
    assert [entry["error"] for entry in lines(out)] == ["ModelError"] * 2
    mended = write_lines(make_record("t0"), path.read_text().splitlines()[1], name="mended.jsonl")
    assert analyze(mended).counts == {"analysed": 1, "failed": 1}
    assert analyze(mended, retry_failed=True).counts == {"kept": 1, "analysed": 1}
    assert {entry["id"]: entry["kind"] for entry in lines(out)} == {"t0": "done", "t1": "done"}


def test_something_else_in_the_place_of_a_result_does_not_undo_its_line(analyze, make_dataset, out, tmp_path):
    path = make_dataset(2)
    analyze(path)
    analyze(path, out=tmp_path / "other", objective="response")
    (tmp_path / "other" / "t0.safetensors").rename(out / "t0.safetensors")
    report = analyze(path)
    assert report.counts == {"kept": 1, "failed": 1}
    assert all(entry["kind"] == "done" for entry in lines(out))


def test_figures_cost_no_second_diagnosis_and_have_its_reasons(
    analyze, write_lines, make_record, monkeypatch
):
    calls, drawn = [], []
    path = write_lines(make_record("a", summary=""), make_record("b", summary=""))
    monkeypatch.setattr(worker, "diagnose", lambda result: calls.append(result) or diagnose(result))
    monkeypatch.setattr(worker, "_save_figures", lambda result, diagnosis, *rest: drawn.append(diagnosis))
    assert analyze(path, figures=True).counts == {"analysed": 2} and len(calls) == 2
    assert analyze(path, figures=True).counts == {"kept": 2} and len(calls) == 4
    assert len(drawn) == 4 and all("thinking_share" in diagnosis.reasons for diagnosis in drawn)
    assert analyze(path).counts == {"kept": 2} and len(calls) == 4


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(analyze, make_dataset, out):
    out.mkdir()
    (out / ".t0.safetensors.abcd1234.tmp").write_text("half")
    (out / ".someone.safetensors.abcd1234.tmp").write_text("else's")
    analyze(make_dataset(2))
    assert [path.name for path in out.glob(".*")] == [".someone.safetensors.abcd1234.tmp"]


def test_the_time_left_goes_down_to_nothing(analyze, make_dataset):
    notes = Notes()
    analyze(make_dataset(8), watcher=notes)
    left = [tokens_left for *_, tokens_left in notes.advances]
    assert notes.total == len(left) == 8 and left[-1] == 0
    assert left == sorted(left, reverse=True) and left[0] > 0


@pytest.mark.parametrize("what", ["result", "manifest"])
def test_a_full_disk_stops_the_run_and_the_same_call_goes_on(analyze, make_dataset, out, what, tmp_path):
    """A limit on file sizes stands for it: the kernel refuses a write in the middle of a file."""
    path = make_dataset(8)
    expected = tmp_path / "expected"
    analyze(path, out=expected)
    size = max(path.stat().st_size for path in expected.glob("*.safetensors"))
    some_lines = sum(map(len, (expected / "manifest.jsonl").read_bytes().splitlines(keepends=True)[:7]))
    assert some_lines + 100 > size, "the manifest must meet its limit before the results do"
    room = size // 2 if what == "result" else some_lines + 100
    notes = Notes()
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
    try:
        report = analyze(path, watcher=notes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    n_done = 0 if what == "result" else 6
    assert report.stopped == "disk full" and not report.is_complete
    assert "the disk is full" in notes.messages[-2]
    assert notes.messages[-1] == (
        f"stopped after {n_done} of 8 traces; free some space and run the same command again to go on"
    )
    assert len(lines(out)) == n_done and not list(out.glob(".*"))
    report = analyze(path)
    assert report.is_complete and contents(out) == contents(expected)
    assert without_seconds(lines(out)) == without_seconds(lines(expected))


def test_a_disk_that_fills_up_with_a_report_says_so(analyze, make_dataset, out, monkeypatch):
    def full(path, data):
        raise ResultFileError(f"no room to write {path} ({errno.ENOSPC})")

    monkeypatch.setattr(summary, "write_atomically", full)
    report = analyze(make_dataset(1))
    assert not report.is_complete and "no room to write" in report.problems[0]


def test_ctrl_c_returns_what_is_done(analyze, make_dataset, out, monkeypatch):
    monkeypatch.setattr(worker, "step_saliency", interrupted_at(2, step_saliency))
    path = make_dataset(3)
    report = analyze(path)
    assert (report.stopped, report.counts) == ("interrupted", {"analysed": 1})
    assert analyze(path).counts == {"kept": 1, "analysed": 2}


def test_a_second_ctrl_c_ends_it_at_once(analyze, make_dataset, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "step_saliency", interrupted)
    monkeypatch.setattr(summary, "aggregate", interrupted)
    path = make_dataset(1)
    with pytest.raises(KeyboardInterrupt):
        analyze(path)
    monkeypatch.undo()
    assert analyze(path).is_complete  # the lock is free again


def test_the_ladder_is_climbed_down_by_a_run(analyze, make_dataset, out, monkeypatch):
    options_seen = []

    def short_of_memory(model, trace, **options):
        options_seen.append(options.get("backend"))
        if options.get("backend") != "layerwise":
            raise RuntimeError("out of memory") if len(options_seen) == 1 else MemoryError
        return step_saliency(model, trace, **options)

    def refused_by_fused(model, trace, **options):
        if options.get("backend") == "fused":
            options_seen.append("fused")
            raise FusedRefusal("not this model")
        return short_of_memory(model, trace, **options)

    monkeypatch.setattr(worker, "step_saliency", refused_by_fused)
    notes = Notes()
    report = analyze(make_dataset(1), watcher=notes)
    assert report.is_complete and options_seen == [None, "fused", "layerwise"]
    assert StepSaliency.load(out / "t0.safetensors").provenance.backend == "layerwise"
    assert "not enough memory to run it as usual; done layer by layer" in notes.messages[0]


def test_a_trace_beyond_the_memory_costs_that_trace(analyze, make_dataset, out, monkeypatch):
    def never_enough(model, trace, **options):
        raise MemoryError

    monkeypatch.setattr(worker, "step_saliency", never_enough)
    assert analyze(make_dataset(1)).counts == {"failed": 1}
    assert {entry["error"] for entry in lines(out)} == {"OutOfMemoryError"}


def test_what_is_wrong_with_the_call_is_said_before_any_work(analyze, make_dataset, out, tmp_path):
    path = make_dataset(1)
    with pytest.raises(ValueError, match="unknown engine 'spark': expected 'local' or 'ray'"):
        analyze(path, engine="spark")
    with pytest.raises(InputFileError, match="shard 2/2 does not exist"):
        analyze(path, shard="2/2")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(InputFileError, match="holds no line"):
        analyze(empty)
    assert not out.exists()


def test_a_model_can_be_a_function_that_loads_it(tiny_model, make_dataset, out):
    assert run(tiny_model, out, make_dataset(1)).is_complete


def test_no_tensor_outlives_its_trace(analyze, make_dataset):
    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    analyze(make_dataset(3, "warm.jsonl"))
    before = tensors()
    seen = []

    class Counting(Notes):
        def advance(self, n_tokens, seconds, tokens_left):
            seen.append(tensors() - before)

    analyze(make_dataset(6, "more.jsonl"), watcher=Counting())
    assert len(seen) == 6 and max(seen[2:]) <= seen[1]


def test_write_atomically_tells_a_full_disk_from_other_refusals(tmp_path):
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, old[1]))
    try:
        with pytest.raises(DiskFullError, match="no room to write .*: nothing was changed there"):
            write_atomically(tmp_path / "x", b"y" * 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ResultFileError) as found:
        write_atomically(tmp_path / "nowhere" / "x", b"y")
    assert not isinstance(found.value, DiskFullError)


def test_a_result_that_is_gone_at_the_end_is_not_counted(analyze, make_dataset, out):
    class Removing(Notes):
        def advance(self, n_tokens, seconds, tokens_left):
            (out / "t1.safetensors").unlink(missing_ok=True)

    report = analyze(make_dataset(3), watcher=Removing())
    assert report.counts == {"analysed": 2, "missing": 1} and not report.is_complete
    assert "1 missing, 0 failed\n  line 2, id 't1': " in report.table


@pytest.mark.parametrize("n_shards", [1, 2])
def test_the_agreement_of_a_run_is_that_of_its_summary(analyze, make_dataset, out, n_shards):
    source = make_dataset(4)
    for index in range(n_shards):
        report = analyze(source, shard=f"{index}/{n_shards}", causal=True)
        assert (report.agreement is None) == (n_shards > 1)
    found = stepflow_tl.summarize(out, n_bootstrap=50).agreement
    assert found is not None and found.n_traces == 4
    if n_shards == 1:
        assert found == report.agreement
        assert json.loads((out / "agreement.json").read_text()) == found.to_json()


@pytest.mark.parametrize("n_shards", [1, 2])
def test_summarize_reads_what_a_run_wrote(analyze, make_dataset, out, n_shards):
    source = make_dataset(6)
    for index in range(n_shards):
        assert analyze(source, shard=f"{index}/{n_shards}").is_complete
    found = stepflow_tl.summarize(out, out=out / "layers.parquet", verify=True, n_bootstrap=50)
    assert found.n_traces == 6 and found.is_whole and not found.problems
    diagnoses = [stepflow_tl.diagnose(StepSaliency.load(path)) for path in sorted(out.glob("*.safetensors"))]
    for metric in ("lock_in", "context_reach"):
        values = [diagnosis.band("shallow")[metric] for diagnosis in diagnoses]
        assert found.mean(metric, "shallow").mean == pytest.approx(sum(values) / 6, rel=1e-9)
    for path in out.glob("manifest*.jsonl"):
        path.unlink()
    assert stepflow_tl.summarize(out, out=out / "again.parquet", n_bootstrap=50).means == found.means


def test_a_hybrid_is_analysed_in_its_attention_layers(make_dataset, out):
    model = build_bridge("lfm2", dtype=torch.float32)
    with pytest.raises(ModelError, match="layer 0"):
        analyze_dataset(model, make_dataset(2), out, objective="response")
    report = analyze_dataset(model, make_dataset(2), out, objective="response", layers=[1, 3])
    assert report.is_complete and len(contents(out)) == 2
    assert StepSaliency.load(out / "t0.safetensors").layers == (1, 3)
    with pytest.raises(ModelError, match="layer 0"):
        analyze_dataset(model, make_dataset(2), out, layers=[1, 3])
