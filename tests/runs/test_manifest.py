"""The manifest: what stands in its lines, both ways; old lines, later lines, damaged ones."""

import dataclasses
import json

import pytest
from run_folders import HEADER, done, failed, result, write_manifest

from stepflow_tl.causal.agreement import MEASURES, TraceAgreement
from stepflow_tl.diagnosis import LAYER_METRICS, Diagnosis
from stepflow_tl.errors import ResultFileError
from stepflow_tl.runs import Shard, analyze_dataset, manifest_path, summarize, worker
from stepflow_tl.runs.manifest import (
    Done,
    Failed,
    RunSettings,
    entry_of,
    open_manifest,
    read_manifests,
)

SETTINGS = RunSettings("tiny", "per_token", "torch.float64", (0, 1), 2, "paragraph", "think")

FAILED = Failed("b", 2, "too long", "ModelError", "0123")

# Written by the package before `runs` had one manifest module: a causal run of two lines, one of them broken.
GOLDEN = """\
{"schema": 1, "kind": "header", "settings": {"model_name": "tiny-native", "objective": "per_token", "dtype": \
"torch.float64", "layers": [0, 1, 2, 3], "n_layers": 4, "splitter": "paragraph", "format": "chatml"}, \
"stepflow_tl": "0.1.0"}
{"kind": "failed", "id": "line-3", "line": 3, "reason": "not JSON (Expecting value, column 1)", "error": \
"InputFileError", "input": ""}
{"kind": "done", "id": "b", "line": 2, "file": "b.safetensors", "n_tokens": 66, "seconds": 0.207028, \
"group": false, "pair": "1", "sha256": \
"b2a8341ab143f01b3183603f61333d13fc4b6b0923176a45099ca616054f9e59", "layers": [0, 1, 2, 3], \
"n_layers": 4, "rows_without_mass": [0, 0, 0, 0], "decay_slope": null, "window": 0, "recent": \
1, "pooling": "mean", "model_name": "tiny-native", "objective": "per_token", "n_question": 1, "n_thinking": \
3, "n_summary": 0, "metrics": {"lock_in": [0.2172777476145057, 0.23246546013007102, 0.13424727122660265, \
0.22847572928806248], "context_reach": [0.7827222523854944, 0.7675345398699289, 0.8657527287733973, \
0.7715242707119376], "question_share": [0.3881925110878859, 0.23206532240497088, 0.40791151009334586, \
0.2715956032570005], "thinking_share": [null, null, null, null], "self_share": [null, null, null, null], \
"recency": [null, null, null, null], "template_share": [0.39940908005104303, 0.40777318297429077, \
0.4353365613245135, 0.36249927768985596], "final_block": [null, null, null, null], "analysis_block": \
[0.013010154196959998, 0.007018718757273511, 0.0035547906214034608, 0.003551724727682457], "block_ratio": \
[null, null, null, null]}, "agreement": {"k": 3, "top_k_chance": null, "n_pairs": 6, "values": [{"scores": \
["Step-Saliency", "attention"], "spearman": 0.7142857142857143, "row_spearman": -1.0, "top_k": null}]}}
"""


def done_entry(trace_id="a", **changes):
    diagnosis = Diagnosis.from_json(
        {
            "schema": "stepflow_tl.Diagnosis",
            "version": 1,
            "layers": [0, 1],
            "n_layers": 2,
            **dict.fromkeys(LAYER_METRICS, [0.25, None]),
            "rows_without_mass": [0, 1],
            "decay_slope": None,
            "window": 0,
            "recent": 1,
            "pooling": "mean",
            "model_name": "tiny",
            "objective": "per_token",
            "n_question": 1,
            "n_thinking": 2,
            "n_summary": 1,
            "reasons": {"recency": "why"},
        }
    )
    fields = dict(id=trace_id, line=1, file="a.safetensors", n_tokens=9, seconds=0.5, group=None, pair=None)
    return Done(**{**fields, "sha256": "0" * 64, "diagnosis": diagnosis, **changes})


@pytest.fixture
def path(tmp_path):
    return manifest_path(tmp_path)


@pytest.fixture
def written(path):
    with open_manifest(path, SETTINGS) as manifest:
        manifest.append(done_entry().to_json())
        manifest.append(FAILED.to_json())
    return path


def test_the_first_line_says_what_was_analysed_and_the_others_what_became_of_it(written):
    header, first, second = map(json.loads, written.read_text().splitlines())
    assert (header["schema"], header["kind"]) == (1, "header")
    assert header["settings"] == SETTINGS.to_json()
    assert (first["kind"], first["metrics"]["lock_in"], first["decay_slope"]) == ("done", [0.25, None], None)
    assert set(first["metrics"]) == set(LAYER_METRICS) and not set(first) & set(LAYER_METRICS)
    assert second == {"kind": "failed", **dataclasses.asdict(FAILED)}
    assert entry_of(first).to_json() == done_entry().to_json() and entry_of(second) == FAILED


def test_an_entry_gives_its_diagnosis_and_agreement_back():
    values = dict.fromkeys(MEASURES, 0.1) | {"top_k": float("nan")}
    agreement = TraceAgreement({("a", "b"): values}, 3, 0.5, 12)
    entry = entry_of(json.loads(json.dumps(done_entry(agreement=agreement).to_json())))
    assert entry.diagnosis.layers == (0, 1) and float(entry.diagnosis.lock_in[0]) == 0.25
    assert entry.diagnosis.lock_in.isnan().tolist() == [False, True]
    assert entry.diagnosis.rows_without_mass.tolist() == [0, 1]
    assert repr(entry.agreement) == repr(agreement)


def test_a_run_that_goes_on_finds_the_last_line_of_each_id(written):
    with open_manifest(written, SETTINGS) as manifest:
        assert manifest.last("b") == FAILED and manifest.last("c") is None
        manifest.append(done_entry("b", line=2).to_json())
        assert manifest.last("b").to_json() == done_entry("b", line=2).to_json()
    with open_manifest(written, SETTINGS) as manifest:
        assert len(manifest) == 2 and manifest.last("b").line == 2


def test_a_second_run_in_the_folder_is_refused_and_another_shard_is_not(written, tmp_path):
    with open_manifest(written, SETTINGS):
        with pytest.raises(ResultFileError, match="another run works in this folder.*--shard i/n"):
            open_manifest(written, SETTINGS)
        open_manifest(manifest_path(tmp_path, Shard(1, 2)), SETTINGS).close()
    open_manifest(written, SETTINGS).close()
    assert (tmp_path / "manifest-1-of-2.jsonl").exists()


def test_a_folder_holds_one_analysis_unless_it_is_overwritten(written):
    other = dataclasses.replace(SETTINGS, layers=(1,))
    with pytest.raises(ResultFileError, match=r"with layers \[0, 1\], this one has \[1\].*--overwrite"):
        open_manifest(written, other)
    with open_manifest(written, other, overwrite=True) as manifest:
        assert len(manifest) == 0


def test_lines_of_the_version_before_are_read_and_written_again_as_they_were(tmp_path):
    write_manifest(tmp_path, *GOLDEN.splitlines()[1:], header=GOLDEN.splitlines()[0])
    index = read_manifests(tmp_path)
    assert not index.damaged and index.files == {"b.safetensors"}
    assert index.settings.to_json() == json.loads(GOLDEN.splitlines()[0])["settings"]
    for line, entry in zip(GOLDEN.splitlines()[1:], index.entries, strict=True):
        again = entry.to_json()
        assert again.pop("group_by", None) is None and again.pop("pair_by", None) is None
        assert json.dumps(again) == line


def test_a_run_of_the_version_before_goes_on(tiny_model, make_dataset, out, monkeypatch):
    """Its lines have no fields `group_by` and `pair_by`."""
    path = make_dataset(3)
    analyze_dataset(tiny_model(), path, out)
    manifest = out / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    old = [{key: value for key, value in line.items() if not key.endswith("_by")} for line in lines]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in old))
    before = manifest.read_bytes()
    monkeypatch.setattr(worker, "step_saliency", None)
    assert analyze_dataset(tiny_model(), path, out).counts == {"kept": 3}
    assert manifest.read_bytes() == before


def test_a_metric_added_to_the_diagnosis_later_is_nan_in_older_lines(tmp_path):
    old = done(tmp_path, "old", result(0))
    del old["metrics"]["recency"]
    write_manifest(tmp_path, old, done(tmp_path, "new", result(1), line=2))
    found = summarize(tmp_path, n_bootstrap=50)
    assert found.is_whole and found.n_traces == 2
    assert found.mean("recency", "deep").n == 1 and found.mean("lock_in", "deep").n == 2
    assert read_manifests(tmp_path).entries[0].diagnosis.recency.isnan().all()


@pytest.mark.parametrize(
    ("setting", "other"),
    [
        ("splitter", "line"),
        ("format", "harmony"),
        ("n_layers", 8),
        ("layers", [0, 1]),
        ("dtype", "torch.bfloat16"),
    ],
)
def test_shards_of_different_settings_are_not_one_run(tmp_path, setting, other):
    header = {**HEADER, "settings": {**HEADER["settings"], setting: other}}
    write_manifest(tmp_path, done(tmp_path, "a", result(0)), name="manifest-0-of-2.jsonl")
    write_manifest(tmp_path, failed("b"), name="manifest-1-of-2.jsonl", header=header)
    with pytest.raises(ResultFileError, match=f"a header with {setting} .*one run at a time"):
        summarize(tmp_path)


def test_shards_cut_by_different_splitters_are_not_one_run(tiny_model, make_dataset, out):
    path, model = make_dataset(4), tiny_model()
    for index, splitter in enumerate(("paragraph", "line")):
        assert analyze_dataset(model, path, out, shard=f"{index}/2", splitter=splitter).is_complete
    with pytest.raises(ResultFileError, match="a header with splitter 'line', another .* has 'paragraph'"):
        summarize(out)
