"""The GPU path under the bridge, without a GPU: the kernel in Triton's interpreter."""

from importlib.util import find_spec

import pytest
import torch
from bridged_calls import N_HEADS, draw_call, flow_state

from stepflow_tl.saliency.fused import attention
from stepflow_tl.saliency.fused.bridged import BridgedTerms, Bridging, SequenceGroups
from stepflow_tl.saliency.fused.call import AttentionSpec, BackwardCall
from stepflow_tl.saliency.fused.steps import StepSums, StepTiles
from stepflow_tl.saliency.fused.triton_pooling import pool_on_device
from stepflow_tl.stepflow.bridged_attention import Bridge

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SHAPE = (13, 61, 22)
VARIETIES = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "window": {"window": 37},
    "soft-cap": {"softcap": 2.0},
}


def spans_and_groups(state, granularity="segment", control=None):
    n = state.current.end
    spans = state.spans(n, granularity, placebo_seed=control)
    return spans, tuple(SequenceGroups(spans, row, n) for row in range(state.labels.n_rows))


def written_out(query, key, value, dz, terms, groups, spec):
    """Saliency and dq in float64 from the terms as they are, whatever they are."""
    n = query.shape[1]
    query, key, value, dz = (x.double() for x in (query, key, value, dz))
    key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], 0) for x in (key, value))
    scores, slope = query @ key.mT * spec.scale, 1.0
    if spec.softcap is not None:
        bounded = torch.tanh(scores / spec.softcap)
        scores, slope = bounded * spec.softcap, 1 - bounded.square()
    distance = torch.arange(n)[:, None] - torch.arange(n)
    scores = scores.masked_fill((distance < 0) | (distance >= (spec.window or n)), -torch.inf)
    logsumexp = scores.logsumexp(-1)
    pattern = (scores - logsumexp[..., None]).exp()
    codes = groups.table[groups.line_of].long().expand(len(query), n, n)
    factor, offset = (x.double().gather(-1, codes) for x in (terms.factors, terms.offsets))
    products = factor * pattern * (dz @ value.mT)
    dq = ((products - pattern * offset) * slope) @ key * spec.scale
    return products.abs(), dq, logsumexp


@pytest.mark.parametrize("control", [None, 3], ids=["bridge", "control"])
@pytest.mark.parametrize("granularity", ["segment", "step"])
@pytest.mark.parametrize("variety", VARIETIES)
def test_the_kernel_takes_each_row_and_key_group_its_own_terms(interpreted, variety, granularity, control):
    options = dict(VARIETIES[variety])
    dtype = options.pop("dtype", torch.float32)
    state = flow_state(SHAPE)
    _, (groups,) = spans_and_groups(state, granularity, control)
    query, key, value, _ = (x[0] if x.ndim == 4 else x for x in draw_call(state, dtype=dtype))
    n, generator = state.current.end, torch.Generator().manual_seed(1)
    dz = torch.randn(query.shape, generator=generator).to(dtype)
    terms = torch.rand(2, N_HEADS, n, 3, generator=generator, dtype=torch.float64)
    terms[0, ..., 0] = 1
    terms = BridgedTerms(*terms, (groups,))
    spec = AttentionSpec(0.2, **options)
    saliency, dq, logsumexp = written_out(query, key, value, dz, terms, groups, spec)
    step_ids = torch.from_numpy(state.labels.step[0].copy())
    n_steps = int(step_ids.max()) + 1

    delta = torch.full_like(logsumexp, torch.nan).float()  # E takes its place
    call = BackwardCall(query, key, value, logsumexp.float(), dz, delta, spec, terms)
    sums, ours = interpreted(pool_on_device, call, step_ids, n_steps, with_dq=True)

    one_hot = (step_ids[:, None] == torch.tensor([*range(n_steps), -1])).double()
    expected = one_hot[:, :-1].mT @ saliency @ one_hot
    assert expected[..., -1].sum() > 0
    assert (sums - expected).abs().max() < 1e-5 * expected.max()
    assert (ours - dq).abs().max() < {torch.float32: 1e-5}.get(dtype, 2e-2) * dq.abs().max()


@pytest.mark.parametrize("granularity", ["segment", "step"])
def test_the_device_path_equals_the_tiles(interpreted, monkeypatch, granularity):
    state = flow_state(SHAPE)
    spans, groups = spans_and_groups(state, granularity)
    query, key, value, sinks = draw_call(state, dtype=torch.float32)
    bridging = Bridging(Bridge(0.5, 0.6), spans, groups)
    spec = AttentionSpec(0.3, diagonal_only=True)
    step_ids = torch.from_numpy(state.labels.step[0].copy())
    tiles = StepTiles(step_ids, int(step_ids.max()) + 1)
    dz = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))

    def run():
        sums = StepSums.zeros(tiles, N_HEADS, dtype=torch.float32, device=torch.device("cpu"))
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        z = attention.saliency_attention(*leaves, spec, sums=sums, sinks=sinks, bridging=bridging)
        return [sums.sums, *torch.autograd.grad(z, leaves, dz)]

    expected = run()
    served = []
    monkeypatch.setattr(attention, "pool_on_device", lambda *a, **k: interpreted(pool_on_device, *a, **k))
    monkeypatch.setattr(attention, "kernels_serve", lambda *_, bridged, **__: not served.append(bridged))
    for ours, theirs in zip(run(), expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert served[0] is not None
