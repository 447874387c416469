"""`bridge_hook` on a whole pass against the projection of one row at a time."""

from types import SimpleNamespace

import pytest
import torch
from flow_oracle import expected_groups

from stepflow_tl.stepflow import FlowReport, FlowState, bridge, bridge_hook
from stepflow_tl.stepflow.bridge import bridge_scores

HOOK = SimpleNamespace(name="blocks.3.attn.hook_attn_scores")


def causal_scores(n_tokens, *, rows=1, heads=3, seed=0, dtype=torch.float64, mask=None):
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(rows, heads, n_tokens, n_tokens, generator=generator, dtype=torch.float64)
    hidden = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
    return scores.to(dtype).masked_fill(hidden, torch.finfo(dtype).min if mask is None else mask)


def row_by_row(scores, trace, granularity, **options):
    """The definition: for each query the groups known then, for each head one row."""
    result = scores.clone()
    for query in range(len(trace)):
        groups = expected_groups(trace, query, granularity)
        if groups is None:
            continue
        masks = torch.tensor(groups)[:, None, None, None]
        for head in range(scores.shape[1]):
            row = scores[:, head : head + 1, query : query + 1, : query + 1]
            result[:, head : head + 1, query : query + 1, : query + 1] = bridge_scores(row, masks, **options)[
                0
            ]
    return result


@pytest.mark.parametrize("granularity", ["segment", "step"])
@pytest.mark.parametrize("tags", ["added", "plain"])
@pytest.mark.parametrize("block", [1 << 18, 1])
def test_a_whole_pass_equals_one_row_at_a_time(make_trace, tags, granularity, block, monkeypatch):
    monkeypatch.setattr(bridge, "_BLOCK_ELEMENTS", block)
    trace = make_trace(tags=tags)
    scores = causal_scores(len(trace))
    found = bridge_hook(scores, HOOK, state=FlowState.from_trace(trace), granularity=granularity)
    expected = row_by_row(scores, trace, granularity)
    assert not torch.equal(expected, scores)
    assert torch.allclose(found, expected, atol=1e-12)


def test_gradients_do_not_depend_on_the_blocks(trace):
    scores = causal_scores(len(trace), mask=-torch.inf)
    weights = torch.randn_like(scores)
    gradients = []
    for rewrite in (
        lambda s: bridge_hook(s, HOOK, state=FlowState.from_trace(trace)),
        lambda s: row_by_row(s, trace, "segment"),
    ):
        leaf = scores.clone().requires_grad_(True)
        (rewrite(leaf).softmax(-1) * weights).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].isfinite().all() and gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, atol=1e-12)


def test_questions_and_templates_are_left_alone_bit_for_bit(trace):
    scores = causal_scores(len(trace), dtype=torch.float32)
    found = bridge_hook(scores, HOOK, state=FlowState.from_trace(trace))
    for segment in (0, 1):
        rows = trace.segment_ids == segment
        assert rows.any() and torch.equal(found[:, :, rows], scores[:, :, rows])
    changed = (found != scores).any(-1).any(1)[0]
    assert changed.any() and not changed.all()


def test_the_same_tensor_comes_back_when_no_row_changes(trace, make_trace):
    state, scores = FlowState.from_trace(trace), causal_scores(len(trace))
    assert bridge_hook(scores, HOOK, state=state, tau_max=0.0) is scores
    flat = scores.masked_fill(scores > -1e30, 0.0)  # uniform attention gives the bridge more than its floor
    assert bridge_hook(flat, HOOK, state=state, tau_max=0.01) is flat
    assert bridge_hook(scores, HOOK, state=state, heads=[]) is scores


def test_every_row_of_a_batch_has_its_own_steps(make_trace):
    traces = [make_trace(), make_trace("Why?", "It is so.\n\nYes it is.", "So.")]
    longest = max(map(len, traces))
    scores = causal_scores(longest, rows=2)
    found = bridge_hook(scores, HOOK, state=FlowState.from_traces(traces))
    for row, trace in enumerate(traces):
        start = longest - len(trace)
        scores[row, :, :, :start] = torch.finfo(scores.dtype).min
    padded = bridge_hook(scores, HOOK, state=FlowState.from_traces(traces))
    for row, trace in enumerate(traces):
        start = longest - len(trace)
        alone = scores[row : row + 1, :, start:, start:]
        expected = bridge_hook(alone, HOOK, state=FlowState.from_trace(trace))
        assert not torch.equal(expected, alone)
        assert torch.allclose(padded[row : row + 1, :, start:, start:], expected, atol=1e-12)
    assert not torch.equal(found, padded), "padding was visible before it was masked"


def test_heads_and_sinks_reach_the_projection(trace):
    state, scores = FlowState.from_trace(trace), causal_scores(len(trace))
    one = bridge_hook(scores, HOOK, state=state, heads=[1])
    every = bridge_hook(scores, HOOK, state=state)
    assert torch.equal(one[:, 1], every[:, 1]) and not torch.equal(one[:, 1], scores[:, 1])
    assert torch.equal(one[:, [0, 2]], scores[:, [0, 2]])
    sinks = torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64)
    expected = row_by_row(scores[:, 2:], trace, "segment", sinks=sinks[2:])
    assert torch.allclose(bridge_hook(scores, HOOK, state=state, sinks=sinks)[:, 2:], expected, atol=1e-12)
    assert not torch.allclose(expected, every[:, 2:])
    with pytest.raises(ValueError, match=r"heads \[3\] do not exist: the layer has query heads 0..2"):
        bridge_hook(scores, HOOK, state=state, heads=[3])


def test_the_report_counts_what_changed(trace):
    scores, report = causal_scores(len(trace)), FlowReport()
    found = bridge_hook(scores, HOOK, state=FlowState.from_trace(trace), report=report)
    counts = report.of(3)
    # An adjusted row moves by more than rounding; a row without B has no floor.
    assert counts.adjusted == int((found != scores).any(-1).sum())
    n_queries = int(((trace.causal.segment_ids == 2) | (trace.causal.segment_ids == 3)).sum())
    assert counts.rows <= 3 * n_queries and counts.rows >= counts.adjusted > 0
    q, p = found.softmax(-1), scores.softmax(-1)
    thinking = (trace.segment_ids == 2).nonzero()[:, 0]
    question = trace.segment_ids == 1
    summary = (trace.segment_ids == 3).nonzero()[:, 0]
    gained = (q - p)[:, :, thinking][..., question].sum() + (q - p)[:, :, summary][
        ..., trace.segment_ids == 2
    ].sum()
    assert counts.total_shift == pytest.approx(float(gained), rel=1e-6)
    assert counts.mean_shift == pytest.approx(counts.total_shift / counts.adjusted)
    assert "adjusted" in str(report) and report.to_json()[0]["layer"] == 3


def test_a_placebo_raises_a_random_region_of_equal_size_to_the_same_floor(trace):
    state, scores = FlowState.from_trace(trace), causal_scores(len(trace))
    (first, *_) = state.spans(len(trace), "segment", placebo_seed=1)
    assert int(first.groups[1].sum()) == int(first.counted[1].sum())
    assert torch.equal(first.groups.any(0), first.counted.any(0)), "O is the same"
    placebo = bridge_hook(scores, HOOK, state=state, placebo_seed=1)
    assert torch.equal(placebo, bridge_hook(scores, HOOK, state=state, placebo_seed=1))
    assert not torch.allclose(placebo, bridge_hook(scores, HOOK, state=state, placebo_seed=2))
    assert not torch.allclose(placebo, bridge_hook(scores, HOOK, state=state))
    template = trace.segment_ids == 0
    rows = trace.segment_ids == 2
    before, after = (s.softmax(-1)[:, :, rows][..., template].sum(-1) for s in (scores, placebo))
    assert torch.allclose(before, after, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_max": 1.0}, "tau_max is 1.0: expected 0 <= tau_max < 1"),
        ({"tau_max": -0.1}, "tau_max is -0.1"),
        ({"max_bridge_share": 1.0}, "max_bridge_share is 1.0: .* would be emptied"),
        ({"max_bridge_share": 0.0}, "max_bridge_share is 0.0"),
    ],
)
def test_parameters_out_of_range_are_refused(trace, options, message):
    with pytest.raises(ValueError, match=message):
        bridge_hook(causal_scores(len(trace)), HOOK, state=FlowState.from_trace(trace), **options)
