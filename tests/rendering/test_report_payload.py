import base64
import json
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_maps import make_knockout, make_saliency

from stepflow_tl import diagnose
from stepflow_tl.causal import spot_check
from stepflow_tl.errors import ComparisonError, TraceError
from stepflow_tl.rendering import report_page as payload
from stepflow_tl.rendering.report_page import QuantisedMaps, quantise, report_payload
from stepflow_tl.results.provenance import Provenance
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.trace import ReasoningTrace


def maps_of(found):
    """The maps that the codes stand for, as the page's script computes them."""
    n_maps, n_steps = found.row_max.shape
    highest = 2**found.bits - 1
    queries, keys = np.tril_indices(n_steps)
    below = (highest - found.codes.astype(np.float64)) / (highest - 1)
    values = found.row_max[:, queries] * 10.0 ** (-found.decades * below)
    maps = np.zeros((n_maps, n_steps, n_steps))
    maps[:, queries, keys] = np.where(found.codes == 0, 0.0, values)
    return maps


def unpacked(packed, n_steps):
    codes = np.frombuffer(zlib.decompress(base64.b64decode(packed["codes"])), f"<u{packed['bits'] // 8}")
    row_max = np.frombuffer(zlib.decompress(base64.b64decode(packed["row_max"])), "<f4")
    cells = n_steps * (n_steps + 1) // 2
    return maps_of(QuantisedMaps(packed["bits"], codes.reshape(-1, cells), row_max.reshape(-1, n_steps)))


def test_the_maps_in_the_page_are_the_maps():
    saliency = make_saliency(5, 1, n_heads=3)
    payload = json.loads(json.dumps(report_payload(saliency)))
    np.testing.assert_allclose(unpacked(payload["mean"], 7), saliency.head_mean(), rtol=2e-4)
    heads = unpacked(payload["heads"], 7).reshape(8, 3, 7, 7)
    np.testing.assert_allclose(heads, saliency.pooled(), rtol=2e-4)


def test_pooling_is_what_was_asked_for():
    saliency = make_saliency(3, 1, text=["a", "bcd", "ef", "g", "hi"])
    payload = report_payload(saliency, pooling="sum")
    np.testing.assert_allclose(unpacked(payload["mean"], 5), saliency.head_mean("sum"), rtol=2e-4)
    assert payload["quantity"] == "summed saliency, nats" and ["Pooling", "sum"] in payload["provenance"]
    assert payload["profiles"] != report_payload(saliency)["profiles"]


def test_the_text_is_whole_template_included():
    saliency = make_saliency(3, 1)
    pieces = report_payload(saliency)["pieces"]
    assert "".join(piece["text"] for piece in pieces) == saliency.trace.text
    assert [piece["label"] for piece in pieces if piece["step"] >= 0] == saliency.labels
    assert pieces[0] == {"label": "template", "segment": "template", "step": -1, "text": "^"}


def test_profiles_are_those_of_diagnose():
    saliency = make_saliency(4, 2)
    diagnosis, profiles = diagnose(saliency), report_payload(saliency)["profiles"]
    assert profiles["metrics"]["lock_in"] == diagnosis.lock_in.tolist()
    assert profiles["decay_slope"] == diagnosis.decay_slope
    no_summary = report_payload(make_saliency(4, 0))["profiles"]
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
    assert reason in report_payload(saliency())["profiles"]["refusal"]


def test_precision_falls_with_size_and_is_stated():
    assert payload.head_bits(28 * 32, 40) == 16
    assert payload.head_bits(28 * 32, 60) == 16
    assert payload.head_bits(28 * 32, 120) == 8
    assert payload.head_bits(28 * 32, 500) is None
    precision = report_payload(make_saliency(2, 1))["precision"]
    assert precision == (
        "Head means are kept in 16 bits on a logarithmic scale, exact to 0.014 %; a value below 10⁻⁸ of its "
        "row's largest counts as 0. Single heads are kept alike."
    )


@pytest.mark.parametrize(
    ("bits", "said"), [(8, "kept in 8 bits on a logarithmic scale, exact to 1.8 %"), (None, "are left out")]
)
def test_fewer_bits_are_said(bits, said, monkeypatch):
    monkeypatch.setattr(payload, "head_bits", lambda n_maps, n_steps: bits)
    found = report_payload(make_saliency(2, 1))
    assert said in found["precision"]
    assert (found["heads"] and found["heads"]["bits"]) == bits


def test_a_trace_without_steps_is_refused():
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
        report_payload(empty)


@pytest.mark.parametrize(("bits", "stated"), [(16, 0.00015), (8, 0.0185)])
@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 12), level=st.floats(-20, 20), n=st.integers(1, 9))
def test_no_cell_errs_by_more_than_stated(bits, stated, seed, spread, level, n):
    generator = torch.Generator().manual_seed(seed)
    decades = spread * torch.rand(3, n, n, generator=generator, dtype=torch.float64)
    maps = (10.0 ** (level - decades)).tril()
    found = quantise(maps, bits)
    assert found.relative_error <= stated
    restored = torch.from_numpy(maps_of(found))
    floor = maps.amax(-1, keepdim=True) * 10.0**-found.decades
    # float32 and rounding at the last decade's end
    kept = maps > floor * 1.05
    error = (restored / maps - 1).abs()[kept]
    assert error.numel() >= 3 * n and float(error.max()) <= found.relative_error + 1e-6
    assert bool((restored[maps < floor * 0.9] == 0).all())


@pytest.mark.parametrize("bits", [8, 16])
def test_a_row_s_largest_value_is_exact_and_zero_stays_zero(bits):
    maps = torch.tensor([[[0.0, 9.0, 9.0], [3.0, 0.0, 9.0], [0.125, 0.0, 1e-30]]], dtype=torch.float64)
    restored = maps_of(quantise(maps, bits))[0]
    np.testing.assert_array_equal(restored, [[0, 0, 0], [3, 0, 0], [0.125, 0, 0]])


def test_codes_take_the_bytes_they_say_and_cells_go_row_by_row():
    maps = make_saliency(1, 1).head_mean()
    for bits in (8, 16):
        found = quantise(maps, bits)
        assert found.codes.dtype.itemsize * 8 == bits and found.codes.shape == (8, 6)
        assert found.row_max.dtype == np.dtype("<f4")
    assert found.codes[0, 0] == 2**16 - 1  # the only cell of its row
    assert [int(codes.max()) for codes in (found.codes[0, 1:3], found.codes[0, 3:])] == [2**16 - 1] * 2


def test_a_spot_check_stands_on_the_page_and_only_beside_its_own_map():
    saliency = make_saliency(5, 1)
    check = spot_check(saliency, make_knockout(saliency))
    assert report_payload(saliency, check=check)["check"] == check.line
    assert report_payload(saliency)["check"] is None
    with pytest.raises(ComparisonError, match="of another map .* run spot_check on the map that is shown"):
        report_payload(make_saliency(4, 1), check=check)
