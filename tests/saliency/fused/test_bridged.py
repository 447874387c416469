"""The Function under the bridge, against `bridge_hook` on scores written out."""

import pytest
import torch
from bridged_calls import N_HEADS, draw_call, flow_state, written_out
from saliency_oracles import cut_of_pattern, pool_by_loops

from stepflow_tl.models.attention import Call, Visible, attention_with_logsumexp
from stepflow_tl.saliency.fused import steps, sweep
from stepflow_tl.saliency.fused.attention import saliency_attention
from stepflow_tl.saliency.fused.bridged import BRIDGE, OTHER, OWN, Bridging, SequenceGroups
from stepflow_tl.saliency.fused.call import AttentionSpec
from stepflow_tl.saliency.fused.steps import StepSums, StepTiles
from stepflow_tl.stepflow import bridged_attention as bridged_attention_module
from stepflow_tl.stepflow.bridged_attention import Bridge, BridgedRows, bridged_attention
from stepflow_tl.stepflow.report import LayerReport

OPTIONS = {
    "plain": {},
    "window": {"window": 17},
    "softcap": {"softcap": 4.0},
    "softcap, sinks and window": {"softcap": 4.0, "sinks": True, "window": 37},
    "sinks": {"sinks": True},
}
WHOLE = (13, 41, 22)
TAU_MAX, SHARE = 0.5, 0.6


@pytest.fixture(params=["small, one thread", "small, three threads", "default"])
def tiles(request, monkeypatch, threads):
    if request.param != "default":
        monkeypatch.setattr(steps, "KEYS_PER_TILE", 32)
        monkeypatch.setattr(sweep, "ROWS_PER_TILE", 60)
        monkeypatch.setattr(sweep, "SHORTEST_SHARED", 4)
        monkeypatch.setattr(bridged_attention_module, "_KERNEL_KEYS", 1)
        threads(3 if "three" in request.param else 1)


def bridging_of(state, granularity="segment", placebo_seed=None, tau_max=TAU_MAX, share=SHARE, heads=None):
    spans = state.spans(state.current.end, granularity, placebo_seed=placebo_seed)
    n_rows, n_tokens = state.labels.n_rows, state.current.end
    mask = None if heads is None else torch.tensor([[head in heads] for head in range(N_HEADS)])
    groups = tuple(SequenceGroups(spans, row, n_tokens) for row in range(n_rows))
    return Bridging(Bridge(tau_max, share, mask), spans, groups)


def assert_rows_of_every_kind(query, key, value, spec, sinks, bridging):
    """Active ones, capped and not, and others that have both groups."""
    visible = Visible(query.shape[2], key.shape[2], window=spec.window)
    options = dict(scale=spec.scale, softcap=spec.softcap, sinks=sinks)
    with torch.no_grad():
        z, logsumexp = attention_with_logsumexp(query, key, value, visible, **options)
        call = Call(query, key, value, z, logsumexp, visible, **options)
        kept, counts = BridgedRows.nothing(bridging.spans, call), LayerReport(0)
        bridged_attention(call, bridging.spans, bridging.bridge, counts=counts, kept=kept)
    n_active, n_capped = int(kept.active.sum()), int((kept.active & kept.capped).sum())
    assert 0 < n_capped < n_active < counts.rows, (n_capped, n_active, counts.rows)


@pytest.mark.parametrize("diagonal_only", [False, True], ids=["all paths", "diagonal only"])
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("control", [None, 3], ids=["bridge", "control"])
@pytest.mark.parametrize("granularity", ["segment", "step"])
def test_values_gradients_and_map_equal_the_hook(tiles, case, granularity, control, diagonal_only):
    options = dict(OPTIONS[case])
    state = flow_state(WHOLE)
    query, key, value, sinks = (x.requires_grad_() for x in draw_call(state))
    sinks = sinks if options.pop("sinks", False) else None
    leaves = [query, key, value]  # the hook cuts the sinks' own gradient, which gradcheck looks at below
    dz = torch.randn(query.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step_ids = torch.from_numpy(state.labels.step[0].copy())
    n_steps, cpu = int(step_ids.max()) + 1, torch.device("cpu")
    sums = StepSums.zeros(StepTiles(step_ids, n_steps), N_HEADS, dtype=torch.float64, device=cpu)
    spec = AttentionSpec(scale=0.3, diagonal_only=diagonal_only, **options)
    bridging = bridging_of(state, granularity, control, heads=(0, 1, 2, 4, 5))

    z = saliency_attention(query, key, value, spec, sums=sums, sinks=sinks, bridging=bridging)
    grads = torch.autograd.grad(z, leaves, dz)

    diagonal = {"own_key": key, "own_value": value} if diagonal_only else {}
    key_in, value_in = (key.detach(), value.detach()) if diagonal_only else (key, value)
    expected_z, pattern = written_out(
        state,
        query,
        key_in,
        value_in,
        scale=0.3,
        sinks=sinks,
        **options,
        **diagonal,
        tau_max=TAU_MAX,
        max_bridge_share=SHARE,
        heads=(0, 1, 2, 4, 5),
        granularity=granularity,
        placebo_seed=control,
    )
    expected = torch.autograd.grad(expected_z, [*leaves, pattern], dz)

    assert_rows_of_every_kind(query, key, value, spec, sinks, bridging)
    torch.testing.assert_close(z, expected_z, rtol=1e-11, atol=1e-11)
    for ours, theirs in zip(grads, expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    saliency = (pattern * expected[-1]).abs().detach()[0]
    torch.testing.assert_close(sums.sums, pool_by_loops(saliency, step_ids), rtol=1e-9, atol=1e-11)
    plain = saliency_attention(query, key, value, spec, sinks=sinks)
    assert (plain - z).abs().max() > 1e-2


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("granularity", ["segment", "step"])
def test_the_cut_score_of_bridged_rows_equals_loops(tiles, case, granularity):
    options = dict(OPTIONS[case])
    state = flow_state(WHOLE)
    query, key, value, sinks = draw_call(state)
    sinks = sinks if options.pop("sinks", False) else None
    dz = torch.randn(query.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step_ids = torch.from_numpy(state.labels.step[0].copy())
    like = dict(dtype=torch.float64, device=torch.device("cpu"), score="cut")
    sums = StepSums.zeros(StepTiles(step_ids, int(step_ids.max()) + 1), N_HEADS, **like)
    heads = (0, 1, 2, 4, 5)
    bridging, spec = bridging_of(state, granularity, heads=heads), AttentionSpec(scale=0.3, **options)
    query.requires_grad_()
    saliency_attention(query, key, value, spec, sums=sums, sinks=sinks, bridging=bridging).backward(dz)
    how = dict(tau_max=TAU_MAX, max_bridge_share=SHARE, granularity=granularity)
    _, pattern = written_out(state, query, key, value, scale=0.3, sinks=sinks, heads=heads, **options, **how)
    expected = cut_of_pattern(pattern, value, dz, step_ids, with_sink=sinks is not None)
    torch.testing.assert_close(sums.sums, expected, rtol=1e-8, atol=1e-9)
    plain = StepSums.zeros(StepTiles(step_ids, int(step_ids.max()) + 1), N_HEADS, **like)
    saliency_attention(query, key, value, spec, sums=plain, sinks=sinks).backward(dz)
    assert (plain.sums - sums.sums).abs().max() > 1e-2


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("granularity", ["segment", "step"])
def test_gradcheck_with_active_inactive_and_capped_rows(tiles, case, granularity):
    options = dict(OPTIONS[case])
    state = flow_state((4, 9, 5), (7, 8, 3))
    state.padding = [0, 0]  # the backend takes no padding: let the shorter row's be keys like any other
    query, key, value, sinks = (x.requires_grad_() for x in draw_call(state, seed=2))
    inputs = (query, key, value, sinks) if options.pop("sinks", False) else (query, key, value)
    bridging, spec = bridging_of(state, granularity), AttentionSpec(scale=0.3, **options)
    assert_rows_of_every_kind(query, key, value, spec, inputs[3] if len(inputs) > 3 else None, bridging)

    def function(query, key, value, sinks=None):
        return saliency_attention(query, key, value, spec, sinks=sinks, bridging=bridging)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("granularity", ["segment", "step"])
def test_scores_gradients_of_a_row_sum_to_zero(granularity):
    """A number added to all of a row's scores changes nothing: with equal keys, dq is zero."""
    state = flow_state(WHOLE)
    query, key, value, _ = draw_call(state)
    key = key.clone()
    key[..., -1] = 1.0  # a part of the score that all keys share
    query.requires_grad_()
    z = saliency_attention(
        query, key, value, AttentionSpec(scale=0.3), bridging=bridging_of(state, granularity)
    )
    (dq,) = torch.autograd.grad(z, query, torch.randn_like(z))
    assert dq[..., -1].abs().max() < 1e-12 < dq[..., 0].abs().max()


def test_rows_left_alone_keep_their_bits_and_without_an_active_row_nothing_is_kept():
    state = flow_state(WHOLE)
    query, key, value, _ = (x.float() for x in draw_call(state))
    query.requires_grad_()
    spec = AttentionSpec(scale=0.3)
    plain = saliency_attention(query, key, value, spec)
    few = saliency_attention(query, key, value, spec, bridging=bridging_of(state, heads=(4,)))
    assert torch.equal(few[:, :4], plain[:, :4]) and not torch.equal(few[:, 4], plain[:, 4])
    none = saliency_attention(query, key, value, spec, bridging=bridging_of(state, tau_max=1e-9))
    assert torch.equal(none, plain)
    assert (
        len(few.grad_fn.saved_tensors) > len(none.grad_fn.saved_tensors) == len(plain.grad_fn.saved_tensors)
    )


@pytest.mark.parametrize("control", [None, 3])
@pytest.mark.parametrize("granularity", ["segment", "step"])
def test_groups_of_every_tile_are_those_of_the_labels(granularity, control):
    state = flow_state(WHOLE)
    n = state.current.end
    spans = state.spans(n, granularity, placebo_seed=control)
    groups = SequenceGroups(spans, 0, n)
    expected, in_span = torch.zeros(n, n, dtype=torch.long), torch.zeros(n, dtype=torch.bool)
    for span in spans:
        own, bridge = span.groups[:, 0, 0, 0]
        expected[span.queries, : len(own)] = own * OWN + bridge * BRIDGE
        in_span[span.queries] = True
    kinds = set()
    for start in range(0, n, 7):
        for end in range(start + 1, min(start + 20, n) + 1):
            for first, last in ((first, min(first + 3, end)) for first in range(0, end, 11)):
                found = groups.of((start, end), (first, last))
                kinds.add("one" if isinstance(found, int) else tuple(size == 1 for size in found.shape))
                found = torch.as_tensor(found).expand(end - start, last - first)
                seen = torch.arange(first, last) <= torch.arange(start, end)[:, None]
                mine = in_span[start:end, None] & seen
                assert torch.equal(found[mine], expected[start:end, first:last][mine])
    assert {"one", (False, True)} <= kinds and kinds & {(True, False), (False, False)}
    assert torch.equal(groups.own()[in_span], expected.diagonal()[in_span])
    assert OTHER in expected[in_span]
