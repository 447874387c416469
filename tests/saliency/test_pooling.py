"""Pooling: laws over random step layouts, and the worked example of the docstring."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflow_tl.saliency.pooling import normalise, pair_counts, pool_tokens, step_bins


def step_layouts():
    """Contiguous runs (length, is_template), at least one of them a step."""
    run = st.tuples(st.integers(1, 5), st.booleans())
    return st.lists(run, min_size=1, max_size=8).filter(
        lambda runs: any(not template for _, template in runs)
    )


def step_ids_of(runs):
    ids, step = [], 0
    for length, template in runs:
        ids += [-1 if template else step] * length
        step += not template
    return torch.tensor(ids)


def pooled_sums(step_ids, seed=0, n_heads=2):
    generator = torch.Generator().manual_seed(seed)
    n = len(step_ids)
    pattern = torch.tril(torch.rand(n_heads, n, n, generator=generator, dtype=torch.float64))
    grad = torch.randn(n_heads, n, n, generator=generator, dtype=torch.float64)
    bins = step_bins(step_ids, dtype=torch.float64, device=torch.device("cpu"))
    return (pattern * grad).abs(), pool_tokens(pattern, grad, bins)


@given(step_layouts(), st.integers(0, 1000))
@settings(max_examples=1000, deadline=None)
def test_pooled_sums_equal_the_loops_of_the_definition(runs, seed):
    ids = step_ids_of(runs)
    saliency, pooled = pooled_sums(ids, seed)
    n_steps = int(ids.max()) + 1
    for i in range(n_steps):
        for j in range(n_steps + 1):
            keys = ids == (j if j < n_steps else -1)
            expected = saliency[:, ids == i][:, :, keys].sum((-1, -2))
            assert torch.allclose(pooled[:, i, j], expected, atol=1e-12)


def test_blocks_of_queries_do_not_change_the_sums(monkeypatch):
    ids = step_ids_of([(2, True), (9, False), (3, False), (1, True), (6, False)])
    _, whole = pooled_sums(ids)
    monkeypatch.setattr("stepflow_tl.saliency.pooling._QUERY_BLOCK", 4)
    _, in_blocks = pooled_sums(ids)
    assert torch.allclose(whole, in_blocks, atol=1e-13)


@given(step_layouts(), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_means_times_their_pair_counts_give_back_the_mass(runs, seed):
    ids = step_ids_of(runs)
    _, pooled = pooled_sums(ids, seed)
    sums = pooled[..., :-1]
    lengths = torch.bincount(ids[ids >= 0])
    for pooling in ("mean", "causal_mean", "sum"):
        again = normalise(sums, lengths, pooling) * pair_counts(lengths, pooling)
        assert torch.allclose(again, sums, atol=1e-12)


@given(step_layouts())
@settings(max_examples=200, deadline=None)
def test_pair_counts_count_token_pairs(runs):
    ids = step_ids_of(runs)
    lengths = torch.bincount(ids[ids >= 0])
    everywhere = torch.ones(len(ids), len(ids), dtype=torch.float64)
    for pooling, mask in (("mean", everywhere), ("causal_mean", torch.tril(everywhere))):
        for i in range(len(lengths)):
            for j in range(len(lengths)):
                assert pair_counts(lengths, pooling)[i, j] == mask[ids == i][:, ids == j].sum()


def test_the_docstring_example_holds():
    lengths = torch.tensor([2, 3])
    assert pair_counts(lengths, "mean").tolist() == [[4, 6], [6, 9]]
    assert pair_counts(lengths, "causal_mean").tolist() == [[3, 0], [6, 6]]


def test_an_unknown_pooling_is_named():
    with pytest.raises(Exception, match="median"):
        normalise(torch.zeros(1, 1, 1, 1), torch.tensor([1]), "median")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_patterns_are_accumulated_in_float32(dtype):
    n = 2000  # in bfloat16 a running sum of ones stops at 256
    bins = step_bins(torch.zeros(n, dtype=torch.int64), dtype=torch.float32, device=torch.device("cpu"))
    ones = torch.ones(1, n, n, dtype=dtype)
    assert pool_tokens(ones, ones, bins)[0, 0, 0] == n * n
