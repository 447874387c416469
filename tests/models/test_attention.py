"""Plain attention with the logsumexp of its rows."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stepflow_tl.models import attention
from stepflow_tl.models.attention import Visible, attention_with_logsumexp, scores_of, weighted_values

SCALE = 0.3


def draw(n_queries, n_keys, *, heads=6, kv_heads=2, width=16, value_width=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, n_queries, width), (kv_heads, n_keys, width), (kv_heads, n_keys, value_width or width))
    return [torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def causal_mask(n_queries, n_keys, window=None, padding=(0, 0)):
    queries, keys = torch.arange(n_keys)[-n_queries:, None], torch.arange(n_keys)
    seen = (keys <= queries) & (keys > queries - (window or n_keys))
    return seen[None, None] & (keys >= torch.tensor(padding)[:, None, None, None])


def written_out(query, key, value, seen, softcap=None, sinks=None):
    query, key, value = (x.double() for x in (query, key, value))
    scores = scores_of(query, key, SCALE, softcap).masked_fill(~seen, -torch.inf)
    logsumexp = scores.logsumexp(-1)
    if sinks is not None:
        logsumexp = torch.logaddexp(logsumexp, sinks.double()[:, None])
    return weighted_values((scores - logsumexp[..., None]).exp(), value), logsumexp


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("n_queries", [1, 7, 33], ids=["one query", "a piece", "all"])
@pytest.mark.parametrize("masked", [None, "padding", "additive"])
def test_z_has_the_bits_of_transformers_own_sdpa(dtype, heads, n_queries, masked):
    query, key, value = draw(n_queries, 33, heads=heads[0], kv_heads=heads[1], dtype=dtype)
    mask = None
    if masked is not None or n_queries == 7:
        mask = causal_mask(n_queries, 33, padding=(0, 5) if masked else (0, 0))
        # rows of padding see nothing; transformers lets them see themselves
        mask = mask | (~mask.any(-1, keepdim=True) & (torch.arange(33) == 32))
    if masked == "additive":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    module = SimpleNamespace(num_key_value_groups=heads[0] // heads[1], is_causal=True)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=SCALE)
    ours, logsumexp = attention_with_logsumexp(query, key, value, Visible(n_queries, 33, mask), scale=SCALE)
    assert torch.equal(ours.transpose(1, 2), theirs)
    seen = causal_mask(n_queries, 33) if mask is None else (mask if mask.dtype == torch.bool else mask == 0)
    expected = written_out(query, key, value, seen)[1]
    assert logsumexp.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        logsumexp.double(), expected, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5
    )


@pytest.mark.parametrize("size", [1, 1 << 22], ids=["a query at a time", "one block"])
@pytest.mark.parametrize("by_mask", [False, True], ids=["window", "mask"])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_blocks_equal_a_plain_softmax(monkeypatch, size, by_mask, window, softcap, with_sinks):
    monkeypatch.setattr(attention, "_BLOCK_ELEMENTS", size)
    query, key, value = draw(20, 33, value_width=12)
    sinks = torch.linspace(-2, 3, 6, dtype=torch.float64) if with_sinks else None
    seen = causal_mask(20, 33, window)
    visible = Visible(20, 33, seen) if by_mask else Visible(20, 33, window=window)
    found = attention_with_logsumexp(query, key, value, visible, scale=SCALE, softcap=softcap, sinks=sinks)
    expected = written_out(query, key, value, seen, softcap, sinks)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_gradients_flow_through_z_and_logsumexp():
    inputs = [x.requires_grad_() for x in draw(5, 9, heads=2, kv_heads=1, width=3)]

    def function(*tensors):
        return attention_with_logsumexp(*tensors, Visible(5, 9), scale=SCALE)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_a_row_that_sees_nothing_is_zero():
    query, key, value = draw(3, 3, width=8, value_width=4)
    seen = causal_mask(3, 3) & torch.tensor([False, True, True])[:, None]
    z, logsumexp = attention_with_logsumexp(query, key, value, Visible(3, 3, seen), scale=SCALE)
    assert not z[:, :, 0].any() and (logsumexp[:, :, 0] == -torch.inf).all()
    assert z.isfinite().all()


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("n_queries", [1, 12, 33])
def test_counts_and_blocks_agree_with_the_mask(n_queries, window):
    seen = causal_mask(n_queries, 33, window).expand(2, 1, n_queries, 33)
    groups = torch.rand(2, 2, 1, 1, 33, generator=torch.Generator().manual_seed(0)) < 0.4
    by_mask, by_window = Visible(n_queries, 33, seen), Visible(n_queries, 33, window=window)
    everyone = slice(0, 2)
    for first in range(0, n_queries, 5):
        queries = slice(first, min(first + 5, n_queries))
        expected = (seen[:, :, queries] & groups).sum(-1)
        for visible in (by_mask, by_window):
            assert torch.equal(visible.counts(everyone, queries, groups), expected)
            for keys in (range(0, 4), range(2, 33), range(30, 33)):
                found = torch.as_tensor(visible.block(everyone, queries, keys))
                wanted = seen[:, :, queries, keys.start : keys.stop]
                assert torch.equal(found.expand(wanted.shape), wanted)
