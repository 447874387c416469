"""`stepflow-tl demo`: in process on a tiny model, and once for real."""

import re

import pytest

from stepflow_tl import rendering
from stepflow_tl.cli.demo import bundled_question, bundled_record
from stepflow_tl.errors import MissingExtraError
from stepflow_tl.models import loading as models
from stepflow_tl.saliency import StepSaliency
from stepflow_tl.trace import ReasoningTrace, Segment

FILES = ("txt", "safetensors", "maps.png", "profile.png", "html", "report.html")


@pytest.fixture
def tiny_default_model(monkeypatch, tiny_model, tiny_tokenizer):
    """`load_default_model` returns a tiny model whose context holds the written trace, a token a byte."""
    model = tiny_model(n_ctx=2560, d_head=4, d_mlp=16, d_vocab=len(tiny_tokenizer))
    monkeypatch.setattr(models, "load_default_model", lambda: model)
    return model


def test_the_demo_writes_and_explains_two_traces(run_cli, tiny_default_model, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "made" / "demo"
    found = run_cli("demo", "--out", out, "--thinking-budget", "30", "--answer-budget", "8")
    assert found.code == 0, found.err
    expected = {f"{name}.{ending}" for name in ("generated", "written") for ending in FILES}
    assert {path.name for path in out.iterdir()} == expected
    assert all(str(out / name) in found.out for name in expected)
    assert found.out.count("decay_slope ") == 2, "a table each"
    for word in ("Budget forcing", "One trace gives numbers, not verdicts", bundled_question()[:40]):
        assert word in found.out
    assert len(found.out.split("How to read it\n")[1].splitlines()) == 5
    assert "\x1b" not in found.out


def test_the_generated_trace_is_read_from_the_tokens_the_model_produced(
    run_cli, tiny_default_model, tmp_path
):
    run_cli("demo", "--out", tmp_path, "--thinking-budget", "30", "--answer-budget", "8")
    trace = StepSaliency.load(tmp_path / "generated.safetensors").trace
    assert trace == ReasoningTrace.from_tokens(tiny_default_model.tokenizer, trace.tokens, splitter="line")
    assert trace.steps_in(Segment.QUESTION)[0].text == bundled_question()
    assert (tmp_path / "generated.txt").read_text(encoding="utf-8", errors="strict") == trace.text


def test_without_matplotlib_the_demo_says_so_and_does_the_rest(
    run_cli, tiny_default_model, tmp_path, monkeypatch
):
    def refuse(saliency, **options):
        raise MissingExtraError("Drawing needs matplotlib: pip install 'stepflow-tl[plots]'")

    monkeypatch.setattr(rendering, "step_map_figure", refuse)
    found = run_cli("demo", "--out", tmp_path, "--thinking-budget", "10", "--answer-budget", "4")
    assert found.code == 0
    assert "no figures: Drawing needs matplotlib: pip install 'stepflow-tl[plots]'\n" in found.err
    assert not list(tmp_path.glob("*.png"))
    assert (tmp_path / "written.html").exists()


def test_a_folder_that_cannot_be_made_is_named(run_cli, tmp_path):
    (tmp_path / "file").write_text("in the way")
    found = run_cli("demo", "--out", tmp_path / "file" / "demo")
    assert found.code == 2 and "cannot be made" in found.err


def test_the_bundled_trace_has_a_dozen_steps_and_its_arithmetic_is_right():
    record = bundled_record()
    assert 12 <= len(record.thinking.split("\n\n")) <= 24
    equations = re.findall(r"((?:\d[\d.]* [-+*/] )+\d[\d.]*) = (\d+)", record.thinking + record.summary)
    assert len(equations) >= 10
    for left, right in equations:
        assert eval(left) == float(right), f"{left} = {right}"


@pytest.mark.slow
def test_the_real_demo_runs_offline(run_cli, default_model, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load_default_model", lambda: default_model)
    found = run_cli("demo", "--out", tmp_path, "--thinking-budget", "24", "--answer-budget", "8")
    assert found.code == 0
    written = StepSaliency.load(tmp_path / "written.safetensors")
    assert written.provenance.model_name.endswith("SmolLM2-135M-Instruct")
    assert len(written.trace.steps_in(Segment.THINKING)) == 15
    assert len(written.layers) == 30
