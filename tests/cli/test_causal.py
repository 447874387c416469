"""`stepflow-tl analyze --causal`: a knockout a trace, kept where it is the same, and the table."""

import csv
import json

import pytest
import torch

from stepflow_tl.causal import StepKnockout, step_knockout
from stepflow_tl.runs import worker as command
from stepflow_tl.saliency import StepSaliency

THINKING = "3*4 is 12.\n\n2+12 is 14.\n\nThat is it.\n\nSo 14."


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def analyze(run_cli, loaded_model, out):
    return lambda path, *options: run_cli("analyze", path, "--out", out, "--causal", *options)


@pytest.fixture
def two_traces(write_lines, make_record):
    return write_lines(
        make_record("a", thinking=THINKING), make_record("b", thinking=THINKING.replace("12", "15"))
    )


def test_every_trace_gets_its_knockout_and_the_run_a_table(analyze, two_traces, out, loaded_model):
    found = analyze(two_traces, "--layers", "1-3")
    assert found.code == 0, found.err
    saliency = StepSaliency.load(out / "a.safetensors")
    knockout = StepKnockout.load(out / "knockout" / "a.safetensors")
    assert knockout.trace == saliency.trace and knockout.layers == (1, 2, 3)
    expected = step_knockout(loaded_model, saliency.trace, layers=[1, 2, 3])
    assert torch.equal(knockout.effects, expected.effects) and knockout.effects.any()
    assert "Agreement over 2 traces" in found.out and "Step-Saliency ~ knockout" in found.out
    with (out / "agreement.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    mine = [row for row in rows if (row["score"], row["other_score"]) == ("attention", "knockout")]
    assert [row["id"] for row in mine] == ["a", "b"] and all(row["n_pairs"] == "15" for row in mine)
    data = json.loads((out / "agreement.json").read_text())
    (cell,) = [
        row
        for row in data["rows"]
        if row["scores"] == ["attention", "knockout"] and row["measure"] == "spearman"
    ]
    assert cell["mean"] == pytest.approx(sum(float(row["spearman"]) for row in mine) / 2)
    assert cell["low"] <= cell["mean"] <= cell["high"]


def test_a_knockout_of_an_earlier_run_is_kept_and_a_damaged_one_is_not(analyze, two_traces, out, monkeypatch):
    first = analyze(two_traces)
    calls, original = [], command.step_knockout

    def counted(model, trace, **options):
        calls.append(trace)
        return original(model, trace, **options)

    monkeypatch.setattr(command, "step_knockout", counted)
    again = analyze(two_traces)
    assert not calls and "0 analysed, 2 kept, 0 failed" in again.out
    assert first.out.split("Agreement")[1] == again.out.split("Agreement")[1]
    path = out / "knockout" / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    mended = analyze(two_traces)
    assert mended.code == 0 and len(calls) == 1
    assert "id 'b': knockout measured again, because" in mended.err


def test_a_knockout_of_another_analysis_is_left_alone(analyze, two_traces, out):
    analyze(two_traces)
    other = StepKnockout.load(out / "knockout" / "a.safetensors")
    (out / "a.safetensors").unlink()
    (out / "manifest.jsonl").unlink()
    found = analyze(two_traces, "--layers", "2", "--limit", "1")
    assert found.code == 1 and "layers [0, 1, 2, 3], this one has [2]" in found.err
    assert StepKnockout.load(out / "knockout" / "a.safetensors").layers == other.layers


def test_screened_cuts_what_the_map_ranks_first_and_says_so(
    analyze, two_traces, out, loaded_model, monkeypatch
):
    monkeypatch.setattr(command, "TOP", 1)
    monkeypatch.setattr(command, "TOLERANCE", 0.5)
    found = analyze(two_traces, "screened")
    assert found.code == 0, found.err
    saliency = StepSaliency.load(out / "a.safetensors")
    knockout = StepKnockout.load(out / "knockout" / "a.safetensors")
    expected = step_knockout(
        loaded_model, saliency.trace, pairs="screened", ranking=saliency, top=1, tolerance=0.5
    )
    assert torch.equal(knockout.effects, expected.effects) and knockout.groups == expected.groups
    n_alone, n_grouped = int(knockout.measured.sum()), int(knockout.bounds.isfinite().sum())
    assert n_alone + n_grouped == 15 and n_grouped > 0
    with (out / "agreement.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["id"] == "a"]
    assert {(row["n_pairs"], row["n_grouped"]) for row in rows} == {(str(n_alone), str(n_grouped))}
    assert "Screened: only pairs that were cut alone, which Step-Saliency chose" in found.out
    (line,) = [line for line in (out / "manifest.jsonl").read_text().splitlines() if '"id": "a"' in line]
    assert json.loads(line)["agreement"]["n_grouped"] == n_grouped
    assert json.loads((out / "agreement.json").read_text())["n_grouped"] > 0
    again = analyze(two_traces, "screened")
    assert "0 analysed, 2 kept, 0 failed" in again.out
    assert found.out.split("Agreement")[1] == again.out.split("Agreement")[1]
    mixed = analyze(two_traces)
    assert mixed.code == 1 and "screening top 1, tolerance 0.5, this one has None" in mixed.err


def test_cuts_of_another_name_are_refused(run_cli, out, two_traces):
    found = run_cli("analyze", two_traces, "--out", out, "--causal", "some")
    assert found.code == 2 and "invalid choice: 'some'" in found.err


def test_without_causal_nothing_is_cut(run_cli, loaded_model, out, two_traces):
    assert run_cli("analyze", two_traces, "--out", out).code == 0
    assert not (out / "knockout").exists() and not (out / "agreement.csv").exists()
