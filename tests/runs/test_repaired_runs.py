"""Runs under StepFlow: the maps are those of the repaired flow, and are never taken for the plain ones."""

import json

import pytest
import torch
from run_folders import HEADER, done, result, write_manifest

from stepflow_tl.causal import StepKnockout, step_knockout
from stepflow_tl.causal.agreement import score_maps, trace_agreement
from stepflow_tl.errors import ResultFileError
from stepflow_tl.models.passes import attached
from stepflow_tl.runs import analyze_dataset, summarize
from stepflow_tl.runs.manifest import RunSettings, read_manifests
from stepflow_tl.saliency import StepSaliency, step_saliency
from stepflow_tl.stepflow import StepFlow

FLOW = StepFlow(tau_max=0.4, alpha=0.3)


@pytest.fixture
def analyze(tiny_model, out):
    return lambda path, **options: analyze_dataset(tiny_model(), path, out, **options)


def header(folder):
    return json.loads((folder / "manifest.jsonl").read_text().splitlines()[0])["settings"]


def test_the_maps_are_those_of_the_repaired_flow(analyze, make_dataset, tiny_model, out):
    report = analyze(make_dataset(2), stepflow=FLOW)
    assert report.is_complete
    found = StepSaliency.load(out / "t0.safetensors")
    expected = step_saliency(tiny_model(), found.trace, stepflow=FLOW)
    assert torch.equal(found.sums, expected.sums)
    plain = step_saliency(tiny_model(), found.trace)
    assert not torch.allclose(found.sums, plain.sums, rtol=0.01)
    assert found.provenance.notes["stepflow"] == repr(FLOW) == header(out)["stepflow"]
    assert report.aggregate.stepflow == repr(FLOW) and f"under {FLOW!r}" in str(report.aggregate)
    assert summarize(out).stepflow == repr(FLOW) == summarize(out).to_json()["stepflow"]


def test_a_plain_run_says_nothing_of_stepflow_as_before(analyze, make_dataset, out):
    report = analyze(make_dataset(1))
    assert "stepflow" not in header(out)
    assert report.aggregate.stepflow is None and "under" not in str(report.aggregate).splitlines()[0]
    assert RunSettings.from_json(header(out)).stepflow is None


@pytest.mark.parametrize(("first", "then"), [(FLOW, None), (None, FLOW), (FLOW, StepFlow())])
def test_a_run_goes_on_under_the_same_stepflow_alone(first, then, analyze, make_dataset, out):
    path = make_dataset(1)
    analyze(path, stepflow=first)
    assert analyze(path, stepflow=first).counts == {"kept": 1}
    before = (out / "t0.safetensors").read_bytes()
    with pytest.raises(ResultFileError, match="holds another analysis, with stepflow .*choose another --out"):
        analyze(path, stepflow=then)
    (out / "manifest.jsonl").unlink()
    report = analyze(path, stepflow=then)
    assert "is kept from an analysis with stepflow" in report.aggregate.problems[0].reason
    assert (out / "t0.safetensors").read_bytes() == before
    assert analyze(path, stepflow=then, overwrite=True).counts == {"analysed": 1}


def test_a_folder_of_plain_and_repaired_maps_is_refused(tmp_path):
    line = done(tmp_path, "a", result(0))
    write_manifest(tmp_path, line)
    repaired = {**HEADER, "settings": {**HEADER["settings"], "stepflow": repr(FLOW)}}
    write_manifest(tmp_path, header=repaired, name="manifest-1-of-2.jsonl")
    with pytest.raises(ResultFileError, match=r"a header with stepflow .*, another header .* has"):
        read_manifests(tmp_path)
    (tmp_path / "manifest.jsonl").unlink()
    write_manifest(tmp_path, line, header=repaired)
    (tmp_path / "manifest-1-of-2.jsonl").unlink()
    with pytest.raises(ResultFileError, match=r"has stepflow None, the manifest .StepFlow\("):
        summarize(tmp_path)


def test_the_knockout_and_the_attention_are_those_of_the_repaired_flow_too(
    analyze, make_dataset, tiny_model, out
):
    report = analyze(make_dataset(1), stepflow=FLOW, causal=True)
    cut = StepKnockout.load(out / "knockout" / "t0.safetensors")
    saliency = StepSaliency.load(out / "t0.safetensors")
    expected = step_knockout(tiny_model(), saliency.trace, stepflow=FLOW)
    assert torch.equal(cut.effects, expected.effects) and cut.provenance.notes["stepflow"] == repr(FLOW)
    with attached(tiny_model(), last=FLOW.hooks(tiny_model(), saliency.trace)):
        maps = score_maps(tiny_model(), saliency, cut)
    plain = score_maps(tiny_model(), saliency, cut)
    assert (maps["attention"] != plain["attention"]).any()
    found = json.loads((out / "manifest.jsonl").read_text().splitlines()[1])["agreement"]
    assert found == trace_agreement(maps, cut.measured.numpy()).to_json()
    assert report.is_complete
    assert analyze(make_dataset(1), stepflow=FLOW, causal=True).counts == {"kept": 1}
