"""`summarize`: the numbers are those of the maps, whatever they are read from; what is wrong is named."""

import json
import os
import re
import sys

import numpy as np
import pyarrow.parquet
import pytest
from run_folders import HEADER, done, failed, make_run, result, write_manifest

import stepflow_tl
from stepflow_tl import StepSaliency, compare, diagnose
from stepflow_tl.errors import ComparisonError, MissingExtraError, ResultFileError
from stepflow_tl.runs import analyze_dataset, layer_table, outcomes
from stepflow_tl.runs.layer_table import LayerTable


def summarize(folder, **options):
    return stepflow_tl.summarize(folder, **{"n_bootstrap": 200, "n_permutations": 99, **options})


def rows_of(path):
    return pyarrow.parquet.read_table(path).to_pylist()


def test_the_means_are_the_means_of_the_maps(tmp_path):
    make_run(tmp_path, 6)
    found = summarize(tmp_path)
    diagnoses = [diagnose(StepSaliency.load(path)) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert found.n_traces == len(diagnoses) == 6 and found.is_whole
    for mean in found.means:
        values = [d.decay_slope if mean.band is None else d.band(mean.band)[mean.metric] for d in diagnoses]
        assert mean.mean == pytest.approx(np.mean(values), rel=1e-12)
        assert mean.low <= mean.mean <= mean.high and mean.n == 6


def test_manifest_and_files_alone_give_the_same_numbers(tmp_path):
    make_run(tmp_path, 6)
    with_manifest = summarize(tmp_path, out=tmp_path / "a.parquet")
    (tmp_path / "manifest.jsonl").unlink()
    without = summarize(tmp_path, out=tmp_path / "b.parquet")
    assert [m.mean for m in without.means] == pytest.approx([m.mean for m in with_manifest.means], rel=1e-12)
    drop = {"group": None, "pair": None}
    first, second = ([{**row, **drop} for row in rows_of(tmp_path / f"{n}.parquet")] for n in "ab")
    assert first == second and len(first) == 6 * 4


def test_no_map_is_read_where_the_manifest_has_the_numbers(tmp_path, monkeypatch):
    make_run(tmp_path, 4)

    def refuse(path):
        raise AssertionError(f"{path} was loaded")

    monkeypatch.setattr(outcomes.StepSaliency, "load", refuse)
    assert summarize(tmp_path).n_traces == 4


def test_the_groups_are_compared_as_compare_does(tmp_path):
    make_run(tmp_path, 8)
    maps = [StepSaliency.load(tmp_path / f"t{i}.safetensors") for i in range(8)]
    options = dict(n_bootstrap=200, n_permutations=99)
    pairs = ([f"p{i}" for i in range(4)],) * 2
    expected = compare(maps[::2], maps[1::2], names=("correct", "not correct"), pair_by=pairs, **options)
    found = summarize(tmp_path, group_by="is_correct").comparison
    assert found == expected
    unpaired = summarize(tmp_path, group_by="is_correct", unpaired=True).comparison
    assert unpaired is not None and unpaired.pairing is None


def test_labels_take_the_place_of_the_manifests(tmp_path):
    make_run(tmp_path, 6)
    labels = {f"t{i}": (i < 3, None) for i in range(5)}
    found = summarize(tmp_path, group_by="is_right", labels=labels)
    assert found.comparison is not None and found.comparison.n_traces == (3, 2)
    assert found.comparison.names == ("right", "not right")
    assert found.notes == ("1 trace has no is_right: left out of the comparison",)


def test_a_group_too_small_is_a_note_not_an_error(tmp_path):
    write_manifest(tmp_path, done(tmp_path, "a", result(0), group=True), done(tmp_path, "b", result(1)))
    found = summarize(tmp_path, group_by="is_correct")
    assert found.comparison is None and "needs at least 2 of each" in found.notes[0]


@pytest.mark.parametrize(("option", "what"), [("group_by", "grouped"), ("pair_by", "paired")])
def test_groups_and_pairs_of_one_field_are_not_summarised_under_another(tmp_path, option, what):
    make_run(tmp_path, 4, group_by="is_correct", pair_by="problem")
    known = {"group_by": "is_correct", "pair_by": "problem"}
    found = summarize(tmp_path, **known)
    assert found.comparison is not None and found.paired_by == "problem"
    table = tmp_path / "t.parquet"
    with pytest.raises(
        ComparisonError, match=f"were {what} by '{known[option]}', not by 'other': pass labels"
    ):
        summarize(tmp_path, out=table, **{**known, option: "other"})
    assert not table.exists()
    labels = {f"t{i}": (i < 2, f"q{i % 2}") for i in range(4)}
    assert summarize(tmp_path, labels=labels, **{**known, option: "other"}).comparison is not None
    named = summarize(tmp_path)
    assert named.comparison.names == ("correct", "not correct") and named.paired_by == "problem"


def test_the_names_of_a_real_run_are_in_its_manifest(tiny_model, write_lines, make_record, out):
    rows = [make_record(f"t{i}", is_correct=i % 2 == 0, is_long=i < 2, p=i // 2) for i in range(4)]
    path, model = write_lines(*rows), tiny_model()
    report = analyze_dataset(model, path, out, group_by="is_correct", pair_by="p")
    assert report.comparison is not None and report.paired_by == "p"
    with pytest.raises(ComparisonError, match="grouped by 'is_correct', not by 'is_long': pass labels"):
        summarize(out, group_by="is_long")
    again = analyze_dataset(model, path, out, group_by="is_long")  # asks for other labels of the same maps
    assert again.counts == {"kept": 4} and again.comparison.names == ("long", "not long")
    assert stepflow_tl.summarize(out, group_by="is_long").comparison == again.comparison


def test_a_run_that_did_not_write_its_fields_down_is_named_as_asked_and_that_is_said(tmp_path):
    make_run(tmp_path, 4)
    found = summarize(tmp_path, group_by="is_long")
    assert found.comparison.names == ("long", "not long")
    assert "the run does not say by which field it was grouped: is_long is believed" in found.notes


def test_traces_of_different_fields_are_not_compared(tmp_path):
    lines = make_run(tmp_path, 6, group_by="is_correct")
    write_manifest(tmp_path, *lines[:3], *({**line, "group_by": "is_long"} for line in lines[3:]))
    found = summarize(tmp_path)
    assert found.n_traces == 6 and found.comparison is None
    assert "grouped by 'is_correct' and 'is_long', not by one field" in found.notes[0]
    with pytest.raises(ComparisonError, match="grouped by 'is_correct' and 'is_long'"):
        summarize(tmp_path, group_by="is_long")


def test_an_unknown_option_is_named_with_those_there_are(tmp_path):
    with pytest.raises(TypeError, match="summarize has no option 'groupby': expected group_by, pair_by"):
        summarize(tmp_path, groupby="x")
    with pytest.raises(TypeError, match="analyze_dataset has no option 'objektive': expected .*objective"):
        analyze_dataset(None, tmp_path, tmp_path, objektive="x")


def test_values_that_do_not_exist_are_nulls_and_left_out_of_the_means(tmp_path):
    lines = [done(tmp_path, f"t{i}", result(i), line=i) for i in range(3)]
    short = done(tmp_path, "short", result(9), line=9)
    short["metrics"]["recency"] = [None] * 4
    short["decay_slope"] = None
    write_manifest(tmp_path, *lines, short)
    found = summarize(tmp_path, out=tmp_path / "t.parquet")
    assert found.mean("recency", "deep").n == 3 and found.mean("lock_in", "deep").n == 4
    assert found.mean("decay_slope").n == 3
    assert [row["recency"] for row in rows_of(tmp_path / "t.parquet") if row["id"] == "short"] == [None] * 4
    json.dumps(found.to_json(), allow_nan=False)


def test_the_last_line_of_an_id_counts(tmp_path):
    first, second = done(tmp_path, "a", result(0), n_tokens=1), done(tmp_path, "b", result(1), line=2)
    write_manifest(tmp_path, failed("a"), first, second, failed("b", line=2), {**first, "n_tokens": 7})
    found = summarize(tmp_path)
    assert (found.n_traces, found.n_tokens) == (1, 7)
    assert [(problem.id, problem.status) for problem in found.problems] == [("b", "failed")]
    assert "failed: ModelError: too long" in str(found)


def test_shards_are_one_run_and_done_beats_failed(tmp_path):
    a, b = done(tmp_path, "a", result(0)), done(tmp_path, "b", result(1))
    write_manifest(tmp_path, a, failed("b"), name="manifest-0-of-2.jsonl")
    write_manifest(tmp_path, b, name="manifest-1-of-2.jsonl")
    for newest in (0, 1):
        os.utime(tmp_path / f"manifest-{newest}-of-2.jsonl", (2e9 + newest, 2e9 + newest))
        found = summarize(tmp_path)
        assert found.n_traces == 2 and not found.problems


def test_a_last_line_that_was_cut_off_is_passed_over(tmp_path):
    lines = make_run(tmp_path, 3)
    path = tmp_path / "manifest.jsonl"
    whole = path.read_bytes()
    last = len(json.dumps(lines[-1])) + 1
    for cut in (2, 10, last - 1):
        path.write_bytes(whole[:-cut])
        found = summarize(tmp_path)
        assert found.n_traces == 3 and found.is_whole  # the third from its file, which has no group
        assert found.seconds == 2 * 0.5, cut
    path.write_bytes(whole[:-1])  # only the newline is missing: the line is whole
    assert summarize(tmp_path).seconds == 3 * 0.5


def test_a_bad_line_inside_is_reported_with_its_number_and_the_others_count(tmp_path):
    write_manifest(tmp_path, '{"kind": "done"', done(tmp_path, "a", result(0)))
    found = summarize(tmp_path)
    assert found.n_traces == 1 and not found.is_whole
    assert "manifest.jsonl, line 2 is not a manifest line that can be read" in found.problems[0].reason


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"group": 1}, "group is a int"),
        ({"layers": [0, 0, 1, 2]}, "must be distinct"),
        ({"layers": [True, 1, 2, 3]}, "whole numbers"),
        ({"n_tokens": -1}, "n_tokens is -1, expected a count"),
        ({"metrics": []}, "metrics is a list, expected an object"),
        ({"metrics": {"lock_in": [0.5]}}, "lock_in has 1 values for 4 layers"),
        ({"metrics": {"lock_in": ["x"] * 4}}, "expected numbers and null only"),
        ({"metrics": {"lock_in": [True] * 4}}, "expected numbers and null only"),
        ({"metrics": {"lock_in": [10**400] * 4}}, "beyond what a float can hold"),
        ({"rows_without_mass": [2**70] * 4}, "is not a manifest line"),
        ({"agreement": {"k": 3}}, "is not a manifest line"),
        ({"file": None}, "file is a NoneType, expected a string"),
        ({"sha256": "x"}, "not a SHA-256"),
        ({"id": 3}, "id is a int"),
        ({"seconds": 10**400}, "is not a manifest line"),
    ],
)
def test_a_line_of_the_wrong_kind_says_what_is_wrong(tmp_path, change, match):
    write_manifest(tmp_path, {**done(tmp_path, "a", result(0)), **change}, done(tmp_path, "b", result(1)))
    found = summarize(tmp_path)
    assert found.n_traces == 2  # a from its file, which no line that can be read names
    (problem,) = found.problems
    assert problem.status == "damaged" and re.search(match, problem.reason)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({**HEADER, "schema": 2}, "manifest schema 2; this stepflow_tl reads up to 1: upgrade"),
        ({**HEADER, "schema": "1"}, "schema is '1'"),
        ({**HEADER, "settings": {}}, "lacks 'model_name'"),
        ({**HEADER, "kind": "done"}, "does not begin with a header: .* is not a manifest line"),
        ({**HEADER, "kind": "from a later version"}, "does not begin with a header"),
    ],
)
def test_a_header_that_cannot_be_read_is_refused(tmp_path, header, match):
    write_manifest(tmp_path, done(tmp_path, "a", result(0)), header=header)
    with pytest.raises(ResultFileError, match=match):
        summarize(tmp_path)


def test_what_a_later_minor_version_adds_is_passed_over(tmp_path):
    line = {**done(tmp_path, "a", result(0)), "mood": "good"}
    line["metrics"]["of tomorrow"] = [1, 2]
    write_manifest(
        tmp_path, {"kind": "note"}, line, HEADER, header={**HEADER, "minor": 3, "machine": "tomorrow's"}
    )
    assert summarize(tmp_path).n_traces == 1


def test_two_analyses_in_one_folder_are_refused(tmp_path):
    result(0).save(tmp_path / "a.safetensors")
    result(1, model_name="other").save(tmp_path / "b.safetensors")
    with pytest.raises(ResultFileError, match="mixes analyses: b.safetensors has model_name 'other'"):
        summarize(tmp_path)


def test_two_headers_of_different_settings_are_refused(tmp_path):
    other = {**HEADER, "settings": {**HEADER["settings"], "objective": "response"}}
    write_manifest(tmp_path, done(tmp_path, "a", result(0)), other)
    with pytest.raises(ResultFileError, match="a header with objective 'response'.*one run at a time"):
        summarize(tmp_path)


def test_two_traces_cannot_share_a_file(tmp_path):
    line = done(tmp_path, "a", result(0))
    write_manifest(tmp_path, line, {**line, "id": "b"})
    with pytest.raises(ResultFileError, match="share the file 'a.safetensors'"):
        summarize(tmp_path)


@pytest.mark.parametrize("content", [None, "manifest only", "failures only"])
def test_a_folder_without_a_result_is_refused_and_no_table_is_written(tmp_path, content):
    if content:
        write_manifest(tmp_path, *([failed("a")] if "fail" in content else []))
    with pytest.raises(
        ResultFileError, match="too long" if content == "failures only" else "holds no result"
    ):
        summarize(tmp_path, out=tmp_path / "t.parquet")
    assert not list(tmp_path.glob("*parquet*"))
    with pytest.raises(ResultFileError, match="is not a folder"):
        summarize(tmp_path / "nowhere")


def test_missing_short_and_exchanged_files_are_named_and_left_out(tmp_path):
    make_run(tmp_path, 6)
    (tmp_path / "t0.safetensors").unlink()
    short = tmp_path / "t1.safetensors"
    short.write_bytes(short.read_bytes()[:-8])
    result(50).save(tmp_path / "t2.safetensors")  # whole, but not the one that was written
    found = summarize(tmp_path)
    assert [(p.id, p.status) for p in found.problems] == [("t0", "missing"), ("t1", "damaged")]
    found = summarize(tmp_path, verify=True)
    assert [(p.id, p.status) for p in found.problems][2:] == [("t2", "damaged")]
    assert "SHA-256 differs" in found.problems[2].reason and not found.is_whole
    assert found.n_traces == 3 and "1 missing, 2 damaged:" in str(found)


def test_a_file_that_is_no_result_is_named(tmp_path):
    result(0).save(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"not one")
    found = summarize(tmp_path)
    assert [(p.id, p.status) for p in found.problems] == [("b", "damaged")] and found.n_traces == 1


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a\\b", "C:a", "", "..", ".a", "a\0b", "a/../b", "a\nb"]
)
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    result(0).save(tmp_path / "a.safetensors")
    good = done(folder, "good", result(1))
    for ending in ("", ".safetensors"):
        write_manifest(folder, good, {**good, "id": "bad", "file": name + ending})
        found = summarize(folder)
        assert [(p.id, p.status) for p in found.problems] == [("bad", "unsafe")]
        assert "not the bare name" in found.problems[0].reason and found.n_traces == 1


def test_a_link_is_where_it_points(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    outside = result(0).save(tmp_path / "outside.safetensors")
    lines = [
        done(folder, name, result(i), line=i) for i, name in enumerate(("real", "within", "out", "loop"))
    ]
    for name, target in (("within", "real.safetensors"), ("out", outside), ("loop", "loop.safetensors")):
        (folder / f"{name}.safetensors").unlink()
        (folder / f"{name}.safetensors").symlink_to(target)
    write_manifest(folder, *lines)
    found = summarize(folder)
    assert found.n_traces == 2
    assert {p.id for p in found.problems} == {"out", "loop"}
    assert "leads out of its folder" in next(p.reason for p in found.problems if p.id == "out")
    (folder / "manifest.jsonl").unlink()
    assert {p.id for p in summarize(folder).problems} == {"out", "loop"}


def test_an_unfinished_table_leaves_the_old_one(tmp_path, monkeypatch):
    make_run(tmp_path, 3)
    table = tmp_path / "t.parquet"
    table.write_text("the old one")

    def disk_full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LayerTable, "flush", disk_full)
    with pytest.raises(ResultFileError, match="No space left on device"):
        summarize(tmp_path, out=table)
    assert table.read_text() == "the old one"
    assert not list(tmp_path.glob(".*tmp"))


def test_more_traces_than_a_row_group_are_all_there(tmp_path, monkeypatch):
    make_run(tmp_path, 7)
    monkeypatch.setattr(layer_table, "_TRACES_A_GROUP", 3)
    summarize(tmp_path, out=tmp_path / "t.parquet")
    rows = rows_of(tmp_path / "t.parquet")
    assert [(row["id"], row["layer"]) for row in rows] == [(f"t{i}", k) for i in range(7) for k in range(4)]
    assert rows[0]["group"] is True and rows[4]["group"] is False and rows[0]["pair"] == "p0"
    assert {row["backend"] for row in rows} == {"hooks"} and {row["dtype"] for row in rows} == {
        "torch.float64"
    }


def test_without_pyarrow_the_install_command_is_given_and_the_rest_works(tmp_path, monkeypatch):
    make_run(tmp_path, 3)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'stepflow-tl\[datasets\]'"):
        summarize(tmp_path, out=tmp_path / "t.parquet")
    assert summarize(tmp_path).n_traces == 3


@pytest.mark.parametrize("bad", [{"confidence": 1.0}, {"n_bootstrap": 0}, {"n_permutations": 0}])
def test_levels_and_counts_out_of_range_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="expected a level between 0 and 1"):
        summarize(tmp_path, **bad)


def test_no_mean_of_an_unknown_metric(tmp_path):
    make_run(tmp_path, 2)
    with pytest.raises(ComparisonError, match="no mean of 'mood' in band 'deep'"):
        summarize(tmp_path).mean("mood", "deep")
