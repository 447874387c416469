"""The bridge from z and the logsumexp, against `bridge_hook` on scores written out."""

import pytest
import torch
from bridged_calls import draw_call, flow_state, visible_keys, written_out

from stepflow_tl.models.attention import Call, Visible, attention_with_logsumexp
from stepflow_tl.stepflow import bridged_attention as module
from stepflow_tl.stepflow.bridged_attention import Bridge, BridgedRows, bridged_attention
from stepflow_tl.stepflow.report import FlowReport, LayerReport

SCALE, TAU_MAX, SHARE = 0.3, 0.5, 0.6
PADDED = ((13, 41, 22), (6, 29, 8))  # the second row is padded on the left
VARIETIES = {
    "plain": {},
    "window": {"window": 17},
    "soft-cap": {"softcap": 4.0},
    "sinks": {"sinks": True},
    "all": {"window": 37, "softcap": 4.0, "sinks": True},
}


def plain_call(state, dtype, *, window=None, softcap=None, sinks=False, as_mask=True):
    query, key, value, sink_logits = draw_call(state, dtype=dtype)
    mask = visible_keys(state, window) if as_mask else None
    visible = Visible(query.shape[2], key.shape[2], mask, None if as_mask else window)
    options = dict(scale=SCALE, softcap=softcap, sinks=sink_logits if sinks else None)
    z, logsumexp = attention_with_logsumexp(query, key, value, visible, **options)
    return Call(query, key, value, z, logsumexp, visible, **options)


def under_hook(state, call, **options):
    """The oracle in float64, on the call's own rounded numbers; what it counted; which rows it changed."""
    wide = [x.double() for x in (call.query, call.key, call.value)]
    window, report = options.pop("window", None), FlowReport()
    sinks = None if call.sinks is None else call.sinks.double()
    shared = dict(scale=SCALE, window=window, softcap=call.softcap, sinks=sinks)
    expected, pattern = written_out(
        state, *wide, **shared, tau_max=TAU_MAX, max_bridge_share=SHARE, report=report, **options
    )
    before = written_out(state, *wide, **shared, tau_max=0.0)[1]
    return expected, report.of(0), (pattern != before).any(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last_only", [False, True], ids=["whole pass", "one query"])
@pytest.mark.parametrize("control", [None, 3], ids=["bridge", "control"])
@pytest.mark.parametrize("granularity", ["segment", "step"])
@pytest.mark.parametrize("variety", VARIETIES)
def test_equals_the_hook_on_scores(variety, granularity, control, last_only, dtype):
    options = VARIETIES[variety]
    state = flow_state(*PADDED, last_only=last_only)
    call = plain_call(state, dtype, **options)
    spans = state.spans(state.current.end, granularity, placebo_seed=control)
    counts = LayerReport(0)
    found = bridged_attention(call, spans, Bridge(TAU_MAX, SHARE), counts=counts)
    expected, hook_counts, changed = under_hook(
        state, call, granularity=granularity, placebo_seed=control, window=options.get("window")
    )

    error = (found.double() - expected).abs().max()
    assert error < {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 6e-2}[dtype]
    assert found.dtype == dtype
    if dtype == torch.float64:  # rounding of z and of the masses may tip a row elsewhere
        assert torch.equal(found[~changed], call.z[~changed])
        assert (counts.rows, counts.adjusted) == (hook_counts.rows, hook_counts.adjusted)
        assert counts.capped == hook_counts.capped
        assert counts.total_shift == pytest.approx(hook_counts.total_shift, rel=1e-9)
    assert counts.rows > 0
    if not last_only:
        assert 0 < counts.adjusted < counts.rows
        assert (found.double() - call.z.double()).abs().max() > 0.1


@pytest.mark.parametrize("window", [None, 17])
def test_a_causal_call_without_a_mask_equals_the_same_with_one(window):
    state = flow_state((13, 41, 22))
    spans = state.spans(state.current.end, "segment")
    found = [
        bridged_attention(
            plain_call(state, torch.float64, window=window, as_mask=as_mask), spans, Bridge(0.5, 0.6)
        )
        for as_mask in (True, False)
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("control", [None, 3], ids=["bridge", "control"])
@pytest.mark.parametrize("granularity", ["segment", "step"])
def test_a_long_bridge_goes_through_a_kernel(monkeypatch, granularity, control, sinks, dtype):
    state = flow_state((13, 41, 22))
    call = plain_call(state, dtype, sinks=sinks, as_mask=False)
    spans = state.spans(state.current.end, granularity, placebo_seed=control)
    by_scores = bridged_attention(call, spans, Bridge(TAU_MAX, SHARE))
    calls, kernel = [], module.by_kernel
    monkeypatch.setattr(module, "_KERNEL_KEYS", 1)
    monkeypatch.setattr(module, "by_kernel", lambda *a, **k: calls.append(a) or kernel(*a, **k))
    found = bridged_attention(call, spans, Bridge(TAU_MAX, SHARE))
    assert len(calls) >= len(spans) // 2 and not torch.equal(found, call.z)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, by_scores, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("granularity", ["segment", "step"])
def test_blocks_of_queries_change_nothing(monkeypatch, granularity):
    state = flow_state(*PADDED)
    call = plain_call(state, torch.float64)
    spans = state.spans(state.current.end, granularity)
    whole = bridged_attention(call, spans, Bridge(TAU_MAX, SHARE))
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 1)
    torch.testing.assert_close(
        bridged_attention(call, spans, Bridge(TAU_MAX, SHARE)), whole, rtol=1e-13, atol=1e-13
    )


def test_only_the_heads_asked_for_change_and_a_call_without_an_active_row_is_returned_as_it_is():
    state = flow_state(*PADDED)
    call = plain_call(state, torch.float32)
    spans = state.spans(state.current.end, "segment")
    heads = torch.tensor([[head == 4] for head in range(6)])
    found = bridged_attention(call, spans, Bridge(TAU_MAX, SHARE, heads))
    assert not torch.equal(found[:, 4], call.z[:, 4])
    assert torch.equal(found[:, [0, 1, 2, 3, 5]], call.z[:, [0, 1, 2, 3, 5]])
    assert bridged_attention(call, spans, Bridge(1e-9, SHARE)) is call.z


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("granularity", ["segment", "step"])
def test_what_is_kept_makes_up_the_output(granularity, sinks):
    """z' = f_S p(S) z_S + f_B p(B) z_B + p(O) z_O, and masses move from S to B."""
    state = flow_state(*PADDED)
    call = plain_call(state, torch.float64, sinks=sinks)
    spans = state.spans(state.current.end, granularity)
    kept = BridgedRows.nothing(spans, call)
    found = bridged_attention(call, spans, Bridge(TAU_MAX, SHARE), kept=kept)
    active = kept.active
    own, bridge = kept.own.exp(), kept.bridge.exp()
    assert active.any() and kept.capped.any() and not kept.capped[~active].any()
    assert (own[active] < 1).all() and (bridge[active] > 1).all()
    assert (own[~active] == 1).all() and (bridge[~active] == 1).all()
    moved = own * kept.own_mass + bridge * kept.bridge_mass
    torch.testing.assert_close(moved[active], (kept.own_mass + kept.bridge_mass)[active])
    bridge_part = kept.bridge_mass[..., None] * kept.z_bridge
    rest = call.z - kept.z_own - bridge_part
    made_up = own[..., None] * kept.z_own + bridge[..., None] * bridge_part + rest
    torch.testing.assert_close(made_up[active], found[active], rtol=1e-10, atol=1e-12)
