"""The Function against attention written out: values, gradients and pooled maps."""

import gc
import math
from typing import get_args

import pytest
import torch
from saliency_oracles import cut_of_pattern

from stepflow_tl.saliency.fused import steps, sweep
from stepflow_tl.saliency.fused.attention import saliency_attention
from stepflow_tl.saliency.fused.call import AttentionSpec
from stepflow_tl.saliency.fused.steps import StepSums, StepTiles
from stepflow_tl.saliency.scores import Score

HEADS, KV_HEADS, D = 6, 2, 8


def eager(query, key, value, *, scale, window=None, softcap=None, sinks=None, own_key=None, own_value=None):
    """Attention as on paper; returns z and the pattern. `own_*` replace the diagonal's key and value."""
    groups = query.shape[1] // key.shape[1]
    expand = lambda x: x.repeat_interleave(groups, dim=1)  # noqa: E731
    n = query.shape[2]
    scores = query @ expand(key).mT * scale
    diagonal = torch.eye(n, dtype=torch.bool)
    if own_key is not None:
        own = (query * expand(own_key)).sum(-1) * scale
        scores = torch.where(diagonal, own[..., None].expand_as(scores), scores)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    q, k = torch.arange(n)[:, None], torch.arange(n)[None, :]
    hidden = k > q
    if window is not None:
        hidden = hidden | (k <= q - window)
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    pattern = torch.softmax(scores, dim=-1)[..., :n]
    if pattern.requires_grad:
        pattern.retain_grad()
    z = pattern @ expand(value)
    if own_value is not None:
        z = z + torch.diagonal(pattern, dim1=-2, dim2=-1)[..., None] * (
            expand(own_value) - expand(own_value).detach()
        )
    return z, pattern


def draw(n_tokens, *, batch=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    return (
        randn(batch, HEADS, n_tokens, D).mul_(1.5).requires_grad_(),
        randn(batch, KV_HEADS, n_tokens, D).mul_(1.5).requires_grad_(),
        randn(batch, KV_HEADS, n_tokens, D).requires_grad_(),
        randn(batch, HEADS, n_tokens, D),
        randn(HEADS).requires_grad_(),
    )


def ragged_steps(n_tokens, seed=0):
    """Step ids with one-token steps, long steps and TEMPLATE gaps at the start, inside and at the end."""
    generator = torch.Generator().manual_seed(seed)
    ids, step = [], 0
    while len(ids) < n_tokens:
        length = [1, 2, 3, 7, 40][int(torch.randint(5, (1,), generator=generator))]
        if torch.rand((), generator=generator) < 0.3 or not ids:
            ids += [-1] * min(length, 3)
        else:
            ids += [step] * length
            step += 1
    ids = torch.tensor(ids[:n_tokens])
    return ids, int(ids.max()) + 1


def pool_by_loops(saliency, step_ids, n_steps):
    """`[head, query, key]` to `[head, query_step, key_bin]`, one pair of steps at a time."""
    out = saliency.new_zeros(saliency.shape[0], n_steps, n_steps + 1)
    for i in range(n_steps):
        rows = saliency[:, step_ids == i]
        for j in range(n_steps):
            out[:, i, j] = rows[:, :, step_ids == j].sum((1, 2))
        out[:, i, -1] = rows[:, :, step_ids == -1].sum((1, 2))
    return out


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def small_tiles(request, monkeypatch, threads):
    """Tiles so small that a short sequence has many of them, cut at odd places."""
    monkeypatch.setattr(steps, "KEYS_PER_TILE", 32)
    monkeypatch.setattr(sweep, "ROWS_PER_TILE", 60)
    monkeypatch.setattr(sweep, "SHORTEST_SHARED", 4)
    threads(request.param)


CASES = {
    "plain": {},
    "window": {"window": 13},
    "window of one": {"window": 1},
    "window wider than the sequence": {"window": 500},
    "softcap": {"softcap": 2.0},
    "softcap and window": {"softcap": 2.0, "window": 37},
    "sinks": {"sinks": True},
    "sinks and window": {"sinks": True, "window": 37},
}


@pytest.mark.parametrize("diagonal_only", [False, True], ids=["all paths", "diagonal only"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n_tokens", [1, 2, 20, 101])
def test_values_gradients_and_map_equal_attention_written_out(small_tiles, case, n_tokens, diagonal_only):
    options = dict(CASES[case])
    query, key, value, dz, sinks = draw(n_tokens)
    sinks = sinks if options.pop("sinks", False) else None
    step_ids, n_steps = ragged_steps(n_tokens)
    sums = StepSums.zeros(
        StepTiles(step_ids, n_steps), HEADS, dtype=torch.float64, device=torch.device("cpu")
    )
    spec = AttentionSpec(scale=0.3, diagonal_only=diagonal_only, **options)
    leaves = [query, key, value] + ([] if sinks is None else [sinks])

    z = saliency_attention(query, key, value, spec, sums=sums, sinks=sinks)
    grads = torch.autograd.grad(z, leaves, dz)

    detached = {"own_key": key, "own_value": value} if diagonal_only else {}
    key_in, value_in = (key.detach(), value.detach()) if diagonal_only else (key, value)
    expected_z, pattern = eager(query, key_in, value_in, scale=0.3, sinks=sinks, **options, **detached)
    expected = torch.autograd.grad(expected_z, [*leaves, pattern], dz)

    torch.testing.assert_close(z, expected_z, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(grads, expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    saliency = (pattern * expected[-1]).abs().detach()[0]
    torch.testing.assert_close(sums.sums, pool_by_loops(saliency, step_ids, n_steps), rtol=1e-10, atol=1e-13)
    assert n_tokens < 20 or sums.sums[..., :-1].sum() > 0
    assert n_tokens < 20 or options.get("window") == 1 or sums.sums[..., -1].sum() > 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n_tokens", [1, 2, 20, 101])
def test_the_other_scores_equal_loops_and_leave_gradients_alone(small_tiles, case, n_tokens):
    options = dict(CASES[case])
    query, key, value, dz, sinks = draw(n_tokens)
    sinks = sinks if options.pop("sinks", False) else None
    if sinks is None:  # rows that one step has nearly to itself; a sink's mass the loops know as a difference
        query = query.detach().mul(4).requires_grad_()
    step_ids, n_steps = ragged_steps(n_tokens)
    spec = AttentionSpec(scale=0.3, diagonal_only=True, **options)
    found, gradients = {}, {}
    for score in get_args(Score):
        like = dict(dtype=torch.float64, device=torch.device("cpu"))
        sums = StepSums.zeros(StepTiles(step_ids, n_steps), HEADS, score=score, **like)
        z = saliency_attention(query, key, value, spec, sums=sums, sinks=sinks)
        gradients[score] = torch.autograd.grad(z, (query, key, value), dz)
        found[score] = sums.sums
    for one, other in zip(gradients["saliency"], gradients["cut"], strict=True):
        assert torch.equal(one, other)

    z, pattern = eager(query, key, value, scale=0.3, sinks=sinks, **options)
    (gradient,) = torch.autograd.grad(z, pattern, dz)
    signed = pool_by_loops((pattern * gradient).detach()[0], step_ids, n_steps)
    torch.testing.assert_close(found["signed"], signed, rtol=1e-9, atol=1e-11)
    expected = cut_of_pattern(pattern, value, dz, step_ids, with_sink=sinks is not None)
    torch.testing.assert_close(found["cut"], expected, rtol=1e-8, atol=1e-9)
    if n_tokens > 20 and case != "window of one":
        assert (found["cut"] > 0.1).any() and (found["cut"] < -0.1).any()


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_of_the_ordinary_backward(small_tiles, case):
    options = dict(CASES[case])
    with_sinks = options.pop("sinks", False)
    query, key, value, _, sinks = draw(17)
    spec = AttentionSpec(scale=0.3, **options)
    inputs = (query, key, value, sinks) if with_sinks else (query, key, value)
    function = lambda q, k, v, s=None: saliency_attention(q, k, v, spec, sinks=s)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_gradcheck_element_by_element(small_tiles):
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(2, h, 5, 3, generator=generator, dtype=torch.float64).requires_grad_() for h in (4, 2, 2)
    ]
    assert torch.autograd.gradcheck(lambda *x: saliency_attention(*x, AttentionSpec(scale=0.7)), inputs)


def test_rows_of_a_batch_are_added_together(small_tiles):
    step_ids, n_steps = ragged_steps(50)
    tiles = StepTiles(step_ids, n_steps)
    query, key, value, dz, _ = draw(50, batch=2)

    def pooled(rows):
        sums = StepSums.zeros(tiles, HEADS, dtype=torch.float64, device=torch.device("cpu"))
        z = saliency_attention(query[rows], key[rows], value[rows], AttentionSpec(scale=0.3), sums=sums)
        torch.autograd.grad(z, query, dz[rows])
        return sums.sums

    torch.testing.assert_close(pooled(slice(0, 2)), pooled(slice(0, 1)) + pooled(slice(1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_pooled_in_float32(dtype):
    step_ids, n_steps = ragged_steps(300)
    exact, rounded = draw(300), [x.detach().to(dtype) for x in draw(300)]
    cpu = torch.device("cpu")
    maps = []
    for query, key, value, dz, _ in ([x.to(torch.float64) for x in rounded], rounded):
        work = torch.promote_types(query.dtype, torch.float32)
        sums = StepSums.zeros(StepTiles(step_ids, n_steps), HEADS, dtype=work, device=cpu)
        spec = AttentionSpec(scale=0.3, diagonal_only=True)
        query = query.requires_grad_()
        z = saliency_attention(query, key, value, spec, sums=sums)
        grad = torch.autograd.grad(z, query, dz)[0]
        assert grad.dtype == query.dtype
        maps.append(sums.sums.double())
    assert maps[0].sum() > 0 and exact[0].dtype == torch.float64
    error = (maps[0] - maps[1]).abs().sum() / maps[0].sum()
    assert error < (1e-5 if dtype == torch.float32 else 5e-3)


def test_backward_runs_for_the_anchor_alone_and_gives_it_zero():
    step_ids, n_steps = ragged_steps(40)
    query, key, value, dz, _ = (x.detach() for x in draw(40))
    anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)
    sums = StepSums.zeros(
        StepTiles(step_ids, n_steps), HEADS, dtype=torch.float64, device=torch.device("cpu")
    )
    z = saliency_attention(query, key, value, AttentionSpec(scale=0.3), sums=sums, anchor=anchor)
    (grad,) = torch.autograd.grad(z, anchor, dz)
    assert grad == 0 and sums.sums.sum() > 0


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["flash", "tiled forward"])
def test_no_tensor_outlives_a_run_under_a_window(small_tiles, softcap):
    """Masks of tiles lie on the device of their call: a cache beyond the run would pin its memory."""

    def alive():
        gc.collect()
        return {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}

    def run():
        query, key, value, dz, _ = draw(101)
        spec = AttentionSpec(scale=0.3, window=37, softcap=softcap)
        torch.autograd.grad(saliency_attention(query, key, value, spec), (query, key, value), dz)

    before = alive()
    run()
    assert not alive() - before
