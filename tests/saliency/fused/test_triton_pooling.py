"""The GPU path without a GPU: kernels in Triton's interpreter, flash attention's two calls by stand-ins.

The interpreter must be on before Triton is first imported, so kernels run in a process of their own.
"""

import inspect
import math
from importlib.util import find_spec

import pytest
import torch

from stepflow_tl.errors import FusedRefusal
from stepflow_tl.models.attention import flash_forward
from stepflow_tl.saliency.fused import attention, triton_pooling
from stepflow_tl.saliency.fused.attention import saliency_attention
from stepflow_tl.saliency.fused.call import AttentionSpec, BackwardCall
from stepflow_tl.saliency.fused.steps import StepRuns, StepSums, StepTiles
from stepflow_tl.saliency.fused.triton_pooling import _check, available, pool_on_device

HAS_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
HEADS, KV_HEADS, SCALE = 4, 2, 0.2


def draw(n_tokens, d_head, *, d_value=None, dtype=torch.float32, batch=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)
    randn = lambda *shape: torch.randn(*lead, *shape, generator=generator).to(dtype)  # noqa: E731
    d_value = d_value or d_head
    return (
        randn(HEADS, n_tokens, d_head),
        randn(KV_HEADS, n_tokens, d_head),
        randn(KV_HEADS, n_tokens, d_value),
        randn(HEADS, n_tokens, d_value),
    )


def backward_call(query, key, value, dz, logsumexp, delta=None, **options):
    """What a backward pass has to work with; delta is of no account where no dq is asked for."""
    logsumexp = logsumexp.float()
    delta = torch.zeros_like(logsumexp) if delta is None else delta.float()
    return BackwardCall(query, key, value, logsumexp, dz, delta, AttentionSpec(SCALE, **options))


def ragged_steps(n_tokens):
    """One-token steps in a row, long steps, and TEMPLATE at the start, between steps and inside none."""
    ids, step = [-1] if n_tokens > 1 else [], 0
    while len(ids) < n_tokens:
        ids += [step] * [1, 1, 1, 9, 40, 2][step % 6] + [-1] * [0, 0, 2][step % 3]
        step += 1
    ids = torch.tensor(ids[:n_tokens])
    return ids, int(ids.max()) + 1


def dense(query, key, value, dz, *, scale=SCALE, window=None, softcap=None, sinks=None):
    """Attention written out in float64: token saliency, dq, logsumexp and delta."""
    query, key, value, dz = (x.double() for x in (query, key, value, dz))
    groups, n = query.shape[-3] // key.shape[-3], query.shape[-2]
    key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    query = query.detach().requires_grad_()
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    hidden = (distance < 0) | (distance >= (window or n))
    scores = scores.masked_fill(hidden, -math.inf)
    logsumexp = scores.logsumexp(-1)
    if sinks is not None:
        logsumexp = torch.logaddexp(logsumexp, sinks.double()[:, None])
    pattern = torch.exp(scores - logsumexp[..., None])
    z = pattern @ value
    (dq,) = torch.autograd.grad(z, query, dz)
    saliency = (pattern * (dz @ value.mT)).abs()
    return saliency.detach(), dq, logsumexp.detach(), (dz * z).sum(-1).detach()


def pooled(saliency, step_ids, n_steps):
    bins = torch.cat([torch.arange(n_steps), torch.tensor([-1])])
    one_hot = (step_ids[:, None] == bins).double()
    return one_hot[:, :-1].mT @ saliency @ one_hot


def relative_error(ours, theirs):
    """The largest relative error of a pooled map; what is zero must be zero.

    A cell of one query and one key is a single product `dz . v`, which can cancel to almost nothing: numbers
    under a hundredth of their row's largest count as that.
    """
    assert not ours[theirs == 0].any()
    floor = theirs.amax(-1, keepdim=True) / 100
    return ((ours - theirs).abs() / theirs.maximum(floor).clamp_min(1e-30)).max().item()


def error_of_scale(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


CASES = {
    "one token": {"n_tokens": 1},
    "two tokens": {"n_tokens": 2},
    "not a multiple of the block": {"n_tokens": 70},
    "a multiple of the block": {"n_tokens": 128},
    "128 wide": {"n_tokens": 70, "d_head": 128},
    "padded from 80": {"n_tokens": 40, "d_head": 80},
    "padded from 96": {"n_tokens": 40, "d_head": 96, "dtype": torch.float16},
    "256 wide": {"n_tokens": 40, "d_head": 256},
    "narrower values": {"n_tokens": 70, "d_value": 24},
    "bfloat16": {"n_tokens": 70, "dtype": torch.bfloat16},
    "bfloat16, 256 wide": {"n_tokens": 70, "d_head": 256, "dtype": torch.bfloat16},
    "float16, soft-cap": {"n_tokens": 70, "dtype": torch.float16, "softcap": 2.0},
    "window": {"n_tokens": 150, "window": 67},
    "window of one": {"n_tokens": 70, "window": 1},
    "window wider than the sequence": {"n_tokens": 40, "window": 500},
    "soft-cap": {"n_tokens": 70, "softcap": 2.0},
    "sinks": {"n_tokens": 70, "sinks": True},
    "all at once": {"n_tokens": 150, "window": 70, "softcap": 2.0, "sinks": True},
}


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_attention_written_out(interpreted, case):
    options = dict(CASES[case])
    n_tokens, d_head = options.pop("n_tokens"), options.pop("d_head", 64)
    dtype = options.pop("dtype", torch.float32)
    sinks = torch.linspace(-2, 6, HEADS) if options.pop("sinks", False) else None
    tensors = draw(n_tokens, d_head, d_value=options.pop("d_value", None), dtype=dtype)
    step_ids, n_steps = ragged_steps(n_tokens)
    saliency, dq, logsumexp, delta = dense(*tensors, sinks=sinks, **options)

    call = backward_call(*tensors, logsumexp, delta, **options)
    sums, ours = interpreted(pool_on_device, call, step_ids, n_steps, with_dq=True)

    expected = pooled(saliency, step_ids, n_steps)
    assert sums.dtype == torch.float32 and ours.dtype == dtype
    assert expected.sum() > 0 and (n_tokens == 1 or options.get("window") == 1 or expected[..., -1].sum() > 0)
    # bfloat16 and float16 products are exact in float32: only dq, which is rounded, is less precise.
    assert relative_error(sums, expected) < 1e-4
    if n_tokens > 1 and options.get("window") != 1:  # else a row has one key, and dq is zero
        assert error_of_scale(ours, dq) < {torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 2e-2)
    else:
        torch.testing.assert_close(ours.double(), dq, rtol=0, atol=1e-4)


@needs_triton
def test_every_token_a_step_and_every_token_one_step_and_no_step_at_all(interpreted):
    tensors = draw(40, 16)
    saliency, _, logsumexp, _ = dense(*tensors)
    for step_ids, n_steps in [
        (torch.arange(40), 40),
        (torch.zeros(40, dtype=torch.long), 1),
        (torch.full((40,), -1), 3),
        (torch.arange(40).flip(0) // 8, 6),  # steps out of order, and one that has no token
    ]:
        sums, dq = interpreted(pool_on_device, backward_call(*tensors, logsumexp), step_ids, n_steps)
        assert dq is None and sums.shape == (HEADS, n_steps, n_steps + 1)
        assert relative_error(sums, pooled(saliency, step_ids, n_steps)) < 1e-4


@needs_triton
def test_strides_and_launches_by_kv_group_do_not_matter_and_equal_inputs_give_equal_bits(interpreted):
    tensors = draw(70, 32)
    step_ids, n_steps = ragged_steps(70)
    _, _, logsumexp, delta = dense(*tensors)
    call = backward_call(*tensors, logsumexp, delta)
    first = interpreted(pool_on_device, call, step_ids, n_steps, with_dq=True)
    query, key, value, dz = tensors
    strided = (
        query.transpose(0, 1).contiguous().transpose(0, 1),
        key.mT.contiguous().mT,
        torch.cat([value, value], -1)[..., :32],
        dz.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not any(x.is_contiguous() for x in strided)
    call = backward_call(*strided, logsumexp.float().mT.contiguous().mT, delta)
    again = interpreted(pool_on_device, call, step_ids, n_steps, with_dq=True, line_bytes=1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize("n_tokens", [1, 64, 150])
def test_runs_tile_the_sequence_and_pairs_are_what_blocks_meet(n_tokens, block):
    step_ids, _ = ragged_steps(n_tokens)
    runs = StepRuns.of(step_ids, block)
    pairs = []
    for start in range(0, n_tokens, block):
        assert runs.first_pair[start // block] == len(pairs)
        met = list(dict.fromkeys(runs.run_of[start : start + block].tolist()))
        assert len(met) <= runs.runs_per_block
        pairs += met
    assert runs.n_pairs == len(pairs) == runs.first_pair[-1] and runs.n_pairs >= runs.n_runs
    for step, run, (first, last) in zip(runs.steps, runs.step_runs, runs.step_pairs, strict=True):
        assert set(pairs[first:last]) == {int(run)} and pairs.count(int(run)) == last - first
        assert torch.equal(runs.run_of == run, step_ids == step)
    in_template = torch.isin(runs.run_of, runs.template_runs.int())
    assert torch.equal(in_template, step_ids == -1)


def test_the_example_of_the_docstring_holds():
    runs = StepRuns.of(torch.tensor([0, 0, -1, 1, 1, 1, 1, 1, 2]), 4)
    assert runs.run_of.tolist() == [0, 0, 1, 2, 2, 2, 2, 2, 3]
    assert runs.first_pair.tolist() == [0, 3, 4, 5]
    assert runs.step_pairs.tolist() == [[0, 1], [2, 4], [4, 5]]


def test_a_step_in_two_places_is_refused():
    with pytest.raises(FusedRefusal, match="step 1 occurs in two places"):
        StepRuns.of(torch.tensor([0, 1, 1, -1, 1]), 16)


def test_a_cpu_without_the_interpreter_and_float64_are_not_available_and_say_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not available(torch.device("cpu"), torch.float32)
    tensors = draw(5, 8)
    with pytest.raises(FusedRefusal, match="float32 on cpu: it needs Triton, an Ampere or later NVIDIA GPU"):
        pool_on_device(backward_call(*tensors, torch.zeros(HEADS, 5)), torch.zeros(5, dtype=torch.long), 1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available(torch.device("cpu"), torch.float32) == HAS_TRITON
    assert not available(torch.device("cpu"), torch.float64)
    assert not available(torch.device("meta"), torch.float32)


def test_without_triton_nothing_is_available(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_pooling, "_has_triton", lambda: False)
    assert not triton_pooling.available(torch.device("cpu"), torch.float32)


@needs_triton
def test_tensors_that_do_not_fit_together_are_refused_by_name(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    query, key, value, dz = draw(5, 8)
    lse, ids = torch.zeros(HEADS, 5), torch.zeros(5, dtype=torch.long)
    _check(backward_call(query, key, value, dz, lse), ids)
    for name, arguments in {
        "`value` has shape": (query, key, value[:1], dz, lse, None, ids),
        "`dz` has shape": (query, key, value, dz[:, :4], lse, None, ids),
        "`logsumexp` has shape": (query, key, value, dz, lse[:, :4], lse, ids),
        "`delta` has shape": (query, key, value, dz, lse, lse[:2], ids),
        "`step_ids` has shape": (query, key, value, dz, lse, None, ids[:4]),
        "4 query heads cannot share 3 KV heads": (query, query[:3], query[:3], dz, lse, None, ids),
        "`dz` is torch.float16 and query torch.float32": (query, key, value, dz.half(), lse, None, ids),
    }.items():
        with pytest.raises(FusedRefusal, match=name):
            _check(backward_call(*arguments[:-1]), arguments[-1])


def written_out_flash_forward(query, key, value, dropout_p, is_causal, *, scale):
    """What PyTorch's flash forward returns on CUDA, in the order of its schema."""
    assert is_causal and dropout_p == 0.0
    groups, n = query.shape[1] // key.shape[1], query.shape[2]
    scores = query.float() @ key.float().repeat_interleave(groups, 1).mT * scale
    scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
    z = torch.softmax(scores, -1) @ value.float().repeat_interleave(groups, 1)
    return z.to(query.dtype), scores.logsumexp(-1), None, None, n, n, torch.zeros(2), torch.zeros(()), z[:0]


def written_out_flash_backward(
    dz, query, key, value, z, logsumexp, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, *state, scale
):
    """The flash backward as published: all it knows of the softmax is z and the logsumexp."""
    assert is_causal and dropout_p == 0.0 and cum_q is cum_k is None
    assert torch.are_deterministic_algorithms_enabled()
    assert (max_q, max_k) == (query.shape[2], key.shape[2]) and len(state) == 2
    groups = query.shape[1] // key.shape[1]
    wide_key, wide_value = (x.float().repeat_interleave(groups, 1) for x in (key, value))
    fold = lambda x: x.unflatten(1, (key.shape[1], groups)).sum(2)  # noqa: E731
    pattern = torch.exp(query.float() @ wide_key.mT * scale - logsumexp[..., None]).tril()
    dscores = pattern * (dz @ wide_value.mT - (dz * z).sum(-1, keepdim=True))
    return (
        dscores @ wide_key * scale,
        fold(dscores.mT @ query) * scale,
        fold(pattern.mT @ dz),
    )


@pytest.fixture
def stand_ins(monkeypatch, interpreted):
    """The device path on a CPU: kernels interpreted, flash attention's two calls written out."""
    aten = torch.ops.aten
    monkeypatch.setattr(aten, "_scaled_dot_product_flash_attention", written_out_flash_forward)
    monkeypatch.setattr(aten, "_scaled_dot_product_flash_attention_backward", written_out_flash_backward)
    monkeypatch.setattr(attention, "pool_on_device", lambda *a, **k: interpreted(pool_on_device, *a, **k))
    return attention


def step_sums(n_tokens):
    tiles = StepTiles(*ragged_steps(n_tokens))
    return StepSums.zeros(tiles, HEADS, dtype=torch.float32, device=torch.device("cpu"))


@needs_triton
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sinks": True},
        {"diagonal_only": True},
        {"diagonal_only": True, "sinks": True, "window": 13, "softcap": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("wanted", [True, False], ids=["pooled", "not pooled"])
def test_device_path_equals_the_tiles(stand_ins, options, wanted):
    options = dict(options)
    query, key, value, dz = draw(45, 16, batch=2)
    sinks = torch.linspace(-2, 3, HEADS) if options.pop("sinks", False) else None
    ours, theirs = (step_sums(45), step_sums(45)) if wanted else (None, None)
    spec = AttentionSpec(SCALE, **options)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    z = saliency_attention(*leaves, spec, sums=theirs, sinks=sinks)
    expected = torch.autograd.grad(z, leaves, dz)

    if spec.window is None and spec.softcap is None:
        z, logsumexp = flash_forward(query, key, value, SCALE)
        if sinks is not None:
            with_sink = torch.logaddexp(logsumexp, sinks[:, None])
            z, logsumexp = z * torch.exp(logsumexp - with_sink)[..., None], with_sink
    else:
        logsumexp = dense(query, key, value, dz, sinks=sinks, window=13, softcap=2.0)[2].float()
    delta = (dz * z.detach()).sum(-1)
    call = BackwardCall(query, key, value, logsumexp, dz, delta, spec)
    got = stand_ins.kernel_backward(call, z.detach(), ours)

    assert not torch.are_deterministic_algorithms_enabled()
    for mine, other in zip(got, expected, strict=True):
        assert mine.shape == other.shape and other.abs().sum() > 0
        assert error_of_scale(mine, other) < 1e-5
    if ours is not None and theirs is not None:
        assert ours.reached
        assert relative_error(ours.sums, theirs.sums) < 1e-4


def test_flash_attentions_real_signatures_take_what_is_passed():
    query, key, value, dz = (x.to("meta") for x in draw(45, 16, batch=1, dtype=torch.bfloat16))
    z, logsumexp = flash_forward(query, key, value, SCALE)
    assert z.shape == query.shape and logsumexp.shape == query.shape[:-1]
    assert logsumexp.dtype == torch.float32
    call = BackwardCall(query, key, value, logsumexp, dz, logsumexp, AttentionSpec(SCALE))
    grads = attention.kernel_backward(call, z, None)
    assert [x.shape for x in grads] == [x.shape for x in (query, key, value)]


def test_nothing_off_a_gpu_is_served_by_the_device_path():
    query, key, value, _ = draw(5, 8, batch=1)
    for diagonal_only in (True, False):
        spec = AttentionSpec(SCALE, diagonal_only=diagonal_only)
        assert not attention.kernels_serve(query, key, value, spec, pooling=True)
        assert not attention.kernels_serve(query, key, value, spec, pooling=False)
    assert not attention.flash_serves(query, key, value, AttentionSpec(SCALE))


@pytest.mark.parametrize("score", ["saliency", "signed", "cut"])
def test_kernels_are_asked_for_the_papers_score_alone(monkeypatch, score):
    asked = []
    monkeypatch.setattr(attention, "kernels_serve", lambda *_, **__: asked.append(score) is not None)
    query, key, value, dz = draw(20, 8, batch=1)
    step_ids, n_steps = ragged_steps(20)
    like = dict(dtype=torch.float32, device=torch.device("cpu"), score=score)
    sums = StepSums.zeros(StepTiles(step_ids, n_steps), HEADS, **like)
    spec = AttentionSpec(SCALE, diagonal_only=True)
    saliency_attention(query.requires_grad_(), key, value, spec, sums=sums).backward(dz)
    assert asked == (["saliency"] if score == "saliency" else []) and sums.sums.any()


class OnCuda:
    """A tensor that claims to be on a GPU; only what the selection reads."""

    def __init__(self, *shape, dtype=torch.bfloat16):
        self.shape, self.dtype, self.is_cuda, self.device = shape, dtype, True, torch.device("cuda")


@pytest.mark.parametrize(
    ("options", "kernel", "flash", "served"),
    [
        ({}, True, True, True),
        ({}, True, False, False),
        ({}, False, True, False),
        ({"pooling": False}, False, True, True),
        ({"window": 3}, True, True, False),
        ({"window": 5}, True, True, True),
        ({"softcap": 2.0}, True, True, False),
        ({"diagonal_only": True, "window": 3, "softcap": 2.0}, True, False, True),
        ({"diagonal_only": True}, False, True, False),
    ],
)
def test_the_device_path_is_taken_where_its_kernels_serve(monkeypatch, options, kernel, flash, served):

    monkeypatch.setattr(attention, "available", lambda *_: kernel)
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *_: None)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _: flash)
    pooling = options.get("pooling", True)
    spec = AttentionSpec(SCALE, **{name: value for name, value in options.items() if name != "pooling"})
    query, key = OnCuda(1, HEADS, 5, 8), OnCuda(1, KV_HEADS, 5, 8)
    selection = inspect.unwrap(attention.kernels_serve)  # the stand-ins are not tensors
    monkeypatch.setattr(attention, "flash_takes", inspect.unwrap(attention.flash_takes))
    monkeypatch.setattr(attention, "_is_plain", inspect.unwrap(attention._is_plain))
    monkeypatch.setattr(attention, "flash_serves", inspect.unwrap(attention.flash_serves))
    assert selection(query, key, key, spec, pooling=pooling) == served
