"""How one attention call is cut and shared out among threads."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflow_tl.saliency.fused.attention import saliency_attention
from stepflow_tl.saliency.fused.call import AttentionSpec
from stepflow_tl.saliency.fused.steps import StepSums, StepTiles
from stepflow_tl.saliency.fused.sweep import SHORTEST_SHARED, count_workers, cut_into_strips, share_out


@settings(max_examples=300, deadline=None)
@given(
    n_batches=st.integers(1, 2),
    n_kv_heads=st.integers(1, 8),
    n_tokens=st.integers(1, 3000),
    window=st.none() | st.integers(1, 4000),
    n_workers=st.integers(1, 9),
)
def test_strips_tile_the_call(n_batches, n_kv_heads, n_tokens, window, n_workers):
    strips = cut_into_strips(n_batches, n_kv_heads, n_tokens, window, n_workers)
    for batch in range(n_batches):
        for kv_head in range(n_kv_heads):
            own = [(s.start, s.end) for s in strips if (s.batch, s.kv_head) == (batch, kv_head)]
            assert own[0][0] == 0 and own[-1][1] == n_tokens
            assert all(a[1] == b[0] for a, b in zip(own[:-1], own[1:], strict=True))
            assert all(start < end for start, end in own)


@pytest.mark.parametrize(("n_kv_heads", "n_workers"), [(3, 2), (2, 2), (4, 16), (1, 8), (8, 8)])
@pytest.mark.parametrize("window", [None, 100, 5000])
def test_workers_get_equal_work(n_kv_heads, n_workers, window):
    strips = cut_into_strips(1, n_kv_heads, 4096, window, n_workers)
    visible = [sum(min(t + 1, window or 4096) for t in range(s.start, s.end)) for s in strips]
    assert len(strips) % n_workers == 0
    assert max(visible) < 1.02 * min(visible)


def test_results_keep_their_order_and_each_worker_has_one_thread(threads):
    threads(3)
    meet = threading.Barrier(3, timeout=30)

    def work(item):
        if item < 3:
            meet.wait()  # passes only if three workers are here at once
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    assert share_out(work, range(20), 3) == [(item, 1, False) for item in range(20)]
    assert torch.get_num_threads() == 3 and torch.is_grad_enabled()


def test_an_error_in_a_worker_comes_out_and_the_threads_are_put_back(threads):
    threads(2)

    def work(item):
        if item == 3:
            raise InterruptedError("here")
        return item

    with pytest.raises(InterruptedError, match="here"):
        share_out(work, range(6), 2)
    assert torch.get_num_threads() == 2


def test_threads_that_start_later_have_the_callers_setting(threads):
    threads(3)
    share_out(lambda item: item, range(6), 3)
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [3]


def test_what_is_short_or_on_a_gpu_is_not_shared_out(threads):
    threads(3)
    assert count_workers(torch.device("cpu"), SHORTEST_SHARED - 1) == 1
    assert count_workers(torch.device("cpu"), SHORTEST_SHARED) == 3
    assert count_workers(torch.device("cuda"), SHORTEST_SHARED) == 1


@pytest.mark.parametrize("diagonal_only", [True, False])
def test_the_same_call_gives_the_same_bits(threads, diagonal_only):
    threads(3)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 700, 16, generator=generator).requires_grad_() for n in (4, 2, 2))
    dz = torch.randn(1, 4, 700, 16, generator=generator)
    tiles = StepTiles(torch.arange(700) // 31, 23)

    def run():
        sums = StepSums.zeros(tiles, 4, dtype=torch.float32, device=torch.device("cpu"))
        spec = AttentionSpec(0.25, window=300, diagonal_only=diagonal_only)
        z = saliency_attention(query, key, value, spec, sums=sums)
        grads = torch.autograd.grad(z, (query, key, value), dz)
        return [sums.sums, *grads]

    first = run()
    assert first[0].sum() > 0
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
