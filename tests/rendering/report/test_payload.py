import base64
import json
import zlib

import numpy as np
import pytest
import torch
from made_maps import make_saliency


def payload_of(saliency, **options):
    from stepflow_tl.rendering.report.payload import report_payload

    return report_payload(saliency, **options)


def unpacked(packed, n_steps):
    from stepflow_tl.rendering.report.quantise import QuantisedMaps

    codes = np.frombuffer(zlib.decompress(base64.b64decode(packed["codes"])), f"<u{packed['bits'] // 8}")
    row_max = np.frombuffer(zlib.decompress(base64.b64decode(packed["row_max"])), "<f4")
    cells = n_steps * (n_steps + 1) // 2
    return QuantisedMaps(packed["bits"], codes.reshape(-1, cells), row_max.reshape(-1, n_steps)).restored()


def test_the_maps_in_the_page_are_the_maps():
    saliency = make_saliency(5, 1, n_heads=3)
    payload = json.loads(json.dumps(payload_of(saliency)))
    np.testing.assert_allclose(unpacked(payload["mean"], 7), saliency.head_mean(), rtol=2e-4)
    heads = unpacked(payload["heads"], 7).reshape(8, 3, 7, 7)
    np.testing.assert_allclose(heads, saliency.pooled(), rtol=2e-4)


def test_pooling_is_what_was_asked_for():
    saliency = make_saliency(3, 1, text=["a", "bcd", "ef", "g", "hi"])
    payload = payload_of(saliency, pooling="sum")
    np.testing.assert_allclose(unpacked(payload["mean"], 5), saliency.head_mean("sum"), rtol=2e-4)
    assert payload["quantity"] == "summed saliency, nats" and ["Pooling", "sum"] in payload["provenance"]
    assert payload["profiles"] != payload_of(saliency)["profiles"]


def test_the_text_is_whole_template_included():
    saliency = make_saliency(3, 1)
    pieces = payload_of(saliency)["pieces"]
    assert "".join(piece["text"] for piece in pieces) == saliency.trace.text
    assert [piece["label"] for piece in pieces if piece["step"] >= 0] == saliency.labels
    assert pieces[0] == {"label": "template", "segment": "template", "step": -1, "text": "^"}


def test_profiles_are_those_of_diagnose():
    from stepflow_tl import diagnose

    saliency = make_saliency(4, 2)
    diagnosis, profiles = diagnose(saliency), payload_of(saliency)["profiles"]
    assert profiles["metrics"]["lock_in"] == diagnosis.lock_in.tolist()
    assert profiles["decay_slope"] == diagnosis.decay_slope
    no_summary = payload_of(make_saliency(4, 0))["profiles"]
    assert no_summary["metrics"]["thinking_share"] == [None] * 8
    assert no_summary["reasons"]["thinking_share"] == "the trace has no summary step"


@pytest.mark.parametrize(
    ("saliency", "reason"),
    [
        (lambda: make_saliency(0, 0), "no thinking or summary step"),
        (lambda: make_saliency(2, 1, sums=torch.zeros(2, 2, 4, 4)), "zero everywhere"),
    ],
)
def test_where_nothing_can_be_diagnosed_the_reason_is_kept(saliency, reason):
    assert reason in payload_of(saliency())["profiles"]["refusal"]


def test_precision_falls_with_size_and_is_stated():
    from stepflow_tl.rendering.report import payload

    assert payload.head_bits(28 * 32, 40) == 16
    assert payload.head_bits(28 * 32, 60) == 16
    assert payload.head_bits(28 * 32, 120) == 8
    assert payload.head_bits(28 * 32, 500) is None
    precision = payload_of(make_saliency(2, 1))["precision"]
    assert precision == (
        "Head means are kept in 16 bits on a logarithmic scale, exact to 0.014 %; a value below 10⁻⁸ of its "
        "row's largest counts as 0. Single heads are kept alike."
    )


@pytest.mark.parametrize(
    ("bits", "said"), [(8, "kept in 8 bits on a logarithmic scale, exact to 1.8 %"), (None, "are left out")]
)
def test_fewer_bits_are_said(bits, said, monkeypatch):
    from stepflow_tl.rendering.report import payload

    monkeypatch.setattr(payload, "head_bits", lambda n_maps, n_steps: bits)
    found = payload_of(make_saliency(2, 1))
    assert said in found["precision"]
    assert (found["heads"] and found["heads"]["bits"]) == bits


def test_a_trace_without_steps_is_refused():
    from stepflow_tl.errors import TraceError
    from stepflow_tl.results.provenance import Provenance
    from stepflow_tl.saliency.result import StepSaliency
    from stepflow_tl.trace import ReasoningTrace

    trace = ReasoningTrace(
        tokens=torch.tensor([0]),
        text="^",
        token_char_spans=torch.tensor([[0, 1]]),
        segment_ids=torch.tensor([0]),
        step_ids=torch.tensor([-1]),
        steps=(),
        format="plain",
    )
    empty = StepSaliency(
        torch.zeros(1, 1, 0, 0), torch.zeros(1, 1, 0), trace, (0,), 1, Provenance("m", "o", "b", "d", "c")
    )
    with pytest.raises(TraceError, match="no steps, so there is nothing to report"):
        payload_of(empty)
