"""`momentum_hook` against loops over steps and heads."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stepflow_tl.errors import ModelError
from stepflow_tl.stepflow import FlowReport, FlowState, capture_values_hook, momentum_hook
from stepflow_tl.stepflow.columns import ValueStore

V_HOOK = SimpleNamespace(name="blocks.5.attn.hook_v")
Z_HOOK = SimpleNamespace(name="blocks.5.attn.hook_z")


def activations(n_tokens, *, rows=1, heads=4, kv_heads=2, d_head=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, n_tokens, heads, d_head, generator=generator, dtype=torch.float64)
    v = torch.randn(rows, n_tokens, kv_heads, d_head, generator=generator, dtype=torch.float64)
    return z, v


def by_loops(z, v, trace, alpha, window=None):
    """The definition for a batch of one."""
    result, repeats = z.clone(), z.shape[2] // v.shape[2]
    for before, step in zip(trace.steps, trace.steps[1:], strict=False):
        columns = list(range(*before.token_span))[-(window or len(trace)) :]
        for head in range(z.shape[2]):
            mean = sum(v[0, column, head // repeats] for column in columns) / len(columns)
            result[0, step.token_start, head] += alpha * mean
    return result


def inject(z, v, state, **options):
    assert capture_values_hook(v, V_HOOK, state=state) is None
    return momentum_hook(z, Z_HOOK, state=state, **options)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_each_new_step_gets_the_mean_value_of_the_step_before(trace, kv_heads, window):
    z, v = activations(len(trace), kv_heads=kv_heads)
    found = inject(z, v, FlowState.from_trace(trace), alpha=0.3, window=window)
    expected = by_loops(z, v, trace, 0.3, window)
    assert not torch.equal(expected, z)
    assert torch.allclose(found, expected, atol=1e-14)


def test_all_other_positions_keep_every_bit_and_z_itself_is_not_written(trace):
    z, v = activations(len(trace))
    copy = z.clone()
    found = inject(z, v, FlowState.from_trace(trace))
    starts = [step.token_start for step in trace.steps[1:]]
    others = [t for t in range(len(trace)) if t not in starts]
    assert torch.equal(found[:, others], z[:, others]) and torch.equal(z, copy)
    assert (found[:, starts] != z[:, starts]).any(-1).all()


def test_nothing_to_inject_returns_the_same_tensor(trace, make_trace):
    z, v = activations(len(trace))
    assert inject(z, v, FlowState.from_trace(trace), alpha=0.0) is z
    no_summary = make_trace(summary="")
    z, v = activations(len(no_summary))
    assert inject(z, v, FlowState.from_trace(no_summary), boundaries="summary") is z


def test_rows_of_a_batch_get_their_own(make_trace):
    traces = [make_trace(), make_trace("Why?", "It is so.\n\nYes.", "So.")]
    longest = max(map(len, traces))
    z, v = activations(longest, rows=2)
    found = inject(z, v, FlowState.from_traces(traces), alpha=0.3)
    for row, trace in enumerate(traces):
        start = longest - len(trace)
        expected = by_loops(z[row : row + 1, start:], v[row : row + 1, start:], trace, 0.3)
        assert torch.allclose(found[row, start:], expected[0], atol=1e-14)
        assert torch.equal(found[row, :start], z[row, :start])


def test_only_the_chosen_heads_get_it(trace):
    z, v = activations(len(trace))
    found = inject(z, v, FlowState.from_trace(trace), heads=[2])
    every = inject(z, v, FlowState.from_trace(trace))
    assert torch.equal(found[:, :, [0, 1, 3]], z[:, :, [0, 1, 3]])
    assert torch.equal(found[:, :, 2], every[:, :, 2]) and not torch.equal(found[:, :, 2], z[:, :, 2])


def test_a_placebo_has_the_same_norm_and_another_direction(trace):
    z, v = activations(len(trace))
    added = {seed: inject(z, v, FlowState.from_trace(trace), placebo_seed=seed) - z for seed in (None, 1, 2)}
    starts = [step.token_start for step in trace.steps[1:]]
    true, one, two = (added[seed][0, starts] for seed in (None, 1, 2))
    assert torch.allclose(true.norm(dim=-1), one.norm(dim=-1))
    assert not torch.allclose(true, one, atol=1e-3) and not torch.allclose(one, two, atol=1e-3)
    assert torch.allclose(one[:, 0], one[:, 1]), "query heads of one KV head share the direction"
    again = inject(z, v, FlowState.from_trace(trace), placebo_seed=1) - z
    assert torch.equal(again[0, starts], one)
    flat = one.flatten(1) / one.flatten(1).norm(dim=-1, keepdim=True)
    assert (flat @ flat.T - torch.eye(len(starts))).abs().max() < 0.999, "each step draws its own"


def test_the_report_counts_injections_and_their_norms(trace):
    z, v = activations(len(trace))
    report = FlowReport()
    found = inject(z, v, FlowState.from_trace(trace), report=report)
    counts = report.of(5)
    assert counts.injections == len(trace.steps) - 1
    assert counts.total_norm == pytest.approx(float((found - z).flatten(2).norm(dim=-1).sum()))
    assert counts.mean_norm == pytest.approx(counts.total_norm / counts.injections)


def test_values_that_were_never_captured_are_an_error_that_says_what_to_attach(trace):
    z, _ = activations(len(trace))
    with pytest.raises(
        ModelError, match="layer 5: the values of tokens .* not captured: attach capture_values_hook"
    ):
        momentum_hook(z, Z_HOOK, state=FlowState.from_trace(trace))


def test_heads_that_cannot_be_shared_evenly_are_refused(trace):
    z, v = activations(len(trace), heads=4, kv_heads=3)
    with pytest.raises(ModelError, match="4 query heads cannot share 3 KV heads evenly"):
        inject(z, v, FlowState.from_trace(trace))


def test_the_store_gathers_over_chunks_and_forgets_what_is_run_again():
    _, v = activations(20, rows=2)
    store = ValueStore()
    for start, end in ((0, 7), (7, 8), (8, 20)):
        store.add(3, start, v[:, start:end])
    assert torch.equal(store.gather(3, 1, np.arange(4, 15)), v[1, 4:15])
    assert torch.equal(store.gather(3, 0, np.array([2, 9])), v[0, [2, 9]])
    _, other = activations(20, rows=2, seed=1)
    store.add(3, 5, other[:, 5:6])
    assert torch.equal(store.gather(3, 0, np.arange(3, 6)), torch.cat([v[0, 3:5], other[0, 5:6]]))
    with pytest.raises(Exception, match="not captured"):
        store.gather(3, 0, np.arange(3, 8))


def test_detached_values_pass_no_gradient_back(trace):
    for detach in (False, True):
        z, v = activations(len(trace))
        v.requires_grad_(True)
        state = FlowState.from_trace(trace)
        capture_values_hook(v, V_HOOK, state=state, detach=detach)
        moved = momentum_hook(z, Z_HOOK, state=state)
        assert moved.requires_grad is not detach
