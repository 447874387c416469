"""The same inputs on the same machine give the same bits, for every kind of stored result.

Each run starts from models built afresh, so nothing that the first run left behind can help the second.
"""

import json
import platform
from importlib.metadata import version

import pytest
import torch
from tiny_architectures import build_bridge, tiny_tokenizer
from tiny_models import TL_GENERATION, build_tiny_model

import stepflow_tl
from stepflow_tl import StepFlow, StepKnockout, StepSaliency, step_knockout, step_saliency
from stepflow_tl.causal import StepPatching, step_patching
from stepflow_tl.results.plain_data import to_plain
from stepflow_tl.trace import ReasoningTrace

KINDS = ("bridge", "hooked") if TL_GENERATION < 4 else ("bridge",)
SALIENCY = [("hooks", {}), ("layerwise", {}), ("fused", {}), ("fused", {"checkpoint": True})]


def fresh(kind="bridge"):
    """float32, as most models are run: rounding shows every change of order."""
    if kind == "hooked":
        return build_tiny_model("hooked", n_ctx=512, dtype=torch.float32, tokenizer=tiny_tokenizer())
    return build_bridge("gemma2", dtype=torch.float32)


@pytest.fixture(scope="module")
def traces():
    def make(thinking, summary):
        ids = ReasoningTrace.from_parts(tiny_tokenizer(), "Is 7 odd?", thinking, summary).tokens
        return ReasoningTrace.from_tokens(tiny_tokenizer(), ids)

    # Longer than `sweep.SHORTEST_SHARED`, so that the fused backend's work is shared out among threads.
    long = "7 = 2*3 + 1.\n\nSo yes.\n\nOdd it is" + ", and odd it stays" * 20 + "."
    return make(long, "Yes, odd."), make(long.replace("yes", "no.").replace("+ 1", "+ 0"), "No., odd.")


def same_bits(one, other):
    """Equal to the last bit, and not by being empty."""
    assert one.dtype == other.dtype and one.abs().max() > 0
    assert torch.equal(one, other)


@pytest.mark.parametrize("objective", ["per_token", "response"])
@pytest.mark.parametrize(("backend", "options"), SALIENCY)
def test_saliency(backend, options, objective, traces):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one, other = (
            step_saliency(fresh(), traces[0], backend=backend, objective=objective, **options) for _ in "ab"
        )
    finally:
        torch.set_num_threads(before)
    same_bits(one.sums, other.sums)
    same_bits(one.template_sums, other.template_sums)
    assert one.provenance == other.provenance


@pytest.mark.parametrize("method", ["cached", "full"])
@pytest.mark.parametrize("measure", ["nll", "kl"])
def test_knockout(method, measure, traces):
    options = dict(method=method, measure=measure, pairs=[("T2", "Q"), ("T2", "T1"), ("S1", "T3")])
    one, other = (step_knockout(fresh(), traces[0], **options) for _ in "ab")
    same_bits(one.effects, other.effects)
    assert one.provenance == other.provenance


@pytest.mark.parametrize("placebo_seed", [None, 3])
def test_patching(placebo_seed, traces):
    options = dict(metric="summary", layers=[1], steps=["T1", "T2"], placebo_seed=placebo_seed)
    one, other = (step_patching(fresh(), *traces, **options) for _ in "ab")
    same_bits(one.effects, other.effects)


def test_a_placebo_of_another_seed_differs(traces):
    """The guard of the test above: the seed is used."""
    options = dict(metric="summary", layers=[1], steps=["T1"])
    one, other = (step_patching(fresh(), *traces, placebo_seed=seed, **options) for seed in (3, 4))
    assert not torch.equal(one.effects, other.effects)


@pytest.mark.parametrize("placebo", [None, "both"])
def test_maps_under_stepflow(placebo, traces):
    def run():
        flow = StepFlow(tau_max=0.3, alpha=0.5, placebo=placebo, seed=5)
        return step_saliency(fresh(), traces[0], stepflow=flow)

    one, other = run(), run()
    same_bits(one.sums, other.sums)
    assert not torch.equal(one.sums, step_saliency(fresh(), traces[0]).sums), "StepFlow must matter"


@pytest.mark.parametrize("kind", KINDS)
def test_provenance_of_stored_results_names_what_made_them(kind, traces, tmp_path):
    model = fresh(kind)
    made = {
        StepSaliency: step_saliency(model, traces[0]),
        StepKnockout: step_knockout(model, traces[0], pairs=[("T2", "Q")]),
        StepPatching: step_patching(model, *traces, metric="summary", layers=[1], steps=["T1"]),
    }
    for place, (kind_of_result, result) in enumerate(made.items()):
        result.save(tmp_path / str(place))
        kept = kind_of_result.load(tmp_path / str(place)).provenance
        assert kept == result.provenance
        assert kept.dtype == "torch.float32" and kept.device == "cpu"
        assert kept.backend and kept.model_name and kept.objective
        for package in ("torch", "transformers", "transformer-lens", "safetensors"):
            assert kept.versions[package] == version(package)
        assert kept.versions["stepflow-tl"] == stepflow_tl.__version__
        assert kept.versions["python"] == platform.python_version()
        json.dumps(to_plain(kept))
