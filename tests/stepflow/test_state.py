"""Positions: groups and boundaries against a reading of the labels one query at a time."""

import numpy as np
import pytest
import torch
from flow_oracle import expected_groups

from stepflow_tl.errors import ModelError
from stepflow_tl.stepflow.columns import LabelTable
from stepflow_tl.stepflow.state import FlowState, Pass


def groups_by_query(state, n_keys, granularity):
    found = {}
    for span in state.spans(n_keys, granularity):
        for query in range(span.queries.start, span.queries.stop):
            for row in range(span.rows.start, span.rows.stop):
                own, bridge = span.groups[:, row - span.rows.start, 0, 0].tolist()
                found[row, query] = (own, bridge)
    return found


@pytest.mark.parametrize("tags", ["added", "special", "plain"])
@pytest.mark.parametrize("granularity", ["segment", "step"])
def test_every_query_gets_the_groups_that_were_known_when_it_arrived(make_trace, tags, granularity):
    trace = make_trace(tags=tags)
    state = FlowState.from_trace(trace)
    found = groups_by_query(state, len(trace), granularity)
    n_checked = 0
    for query in range(len(trace)):
        expected = expected_groups(trace, query, granularity)
        if expected is None:
            assert (0, query) not in found
        else:
            own, bridge = (group[: query + 1] for group in found[0, query])
            assert (own, bridge) == expected, query
            n_checked += 1
    assert n_checked > 50


def test_a_marker_of_several_tokens_is_template_only_once_complete(make_trace):
    trace = make_trace(tags="plain")
    late = (trace.causal.resolved_at > torch.arange(len(trace))) & (trace.segment_ids == 0)
    late &= trace.causal.segment_ids == 2  # "</think>": thinking until its last character
    assert int(late.sum()) >= 5, "the trace must have such a marker"
    first = int(late.nonzero()[0])
    found = groups_by_query(FlowState.from_trace(trace), len(trace), "segment")
    assert found[0, first + 2][0][first], "while it comes in, it is part of the thinking"
    n_summary = int((trace.segment_ids == 3).nonzero()[-1])
    assert not found[0, n_summary][1][first], "afterwards it is not"


def test_a_window_of_keys_is_the_end_of_the_columns(make_trace):
    trace = make_trace()
    last = len(trace) - 2
    state = FlowState(LabelTable.from_traces([trace]), Pass(last, 1))
    state.labels.crop(last + 1)
    (full,) = state.spans(last + 1, "segment")
    (window,) = state.spans(16, "segment")
    assert torch.equal(window.groups, full.groups[..., -16:])
    assert full.groups[1].any(), "the summary bridges to the thinking"


def test_more_keys_than_tokens_is_a_static_cache_and_refused(trace):
    state = FlowState.from_trace(trace)
    with pytest.raises(
        ModelError, match=rf"{len(trace) + 5} key columns, but only {len(trace)} .*preallocated"
    ):
        state.spans(len(trace) + 5, "segment")


def test_rows_of_a_batch_are_read_at_their_own_padding(make_trace):
    traces = [make_trace(), make_trace("Why?", "It is so.\n\nYes.", "So.")]
    longest = max(map(len, traces))
    for side in ("left", "right"):
        batch = groups_by_query(FlowState.from_traces(traces, side), longest, "step")
        for row, trace in enumerate(traces):
            alone = groups_by_query(FlowState.from_trace(trace), len(trace), "step")
            start = longest - len(trace) if side == "left" else 0
            assert {query - start for r, query in batch if r == row} == {query for _, query in alone}
            for (_, query), groups in alone.items():
                for group, padded in zip(groups, batch[row, query + start], strict=True):
                    assert np.flatnonzero(padded[: query + start + 1]).tolist() == [
                        key + start for key in np.flatnonzero(group[: query + 1])
                    ]


def test_new_steps_are_found_with_all_tokens_of_the_step_before(trace):
    state = FlowState.from_trace(trace)
    found = {i.query: i.columns.tolist() for i in state.injections("all", None)}
    assert found == {
        step.token_start: list(range(*before.token_span))
        for before, step in zip(trace.steps, trace.steps[1:], strict=False)
    }
    windowed = {i.query: i.columns.tolist() for i in state.injections("all", 4)}
    assert windowed == {query: columns[-4:] for query, columns in found.items()}


@pytest.mark.parametrize(
    ("boundaries", "expected"),
    [
        ("response", ["T1", "T2", "T3", "S1", "S2"]),
        ("all", ["T1", "T2", "T3", "S1", "S2"]),
        ("within", ["T2", "T3", "S2"]),
        ("thinking", ["T2", "T3"]),
        ("summary", ["S1", "S2"]),
    ],
)
def test_boundaries_say_which_new_steps_count(trace, boundaries, expected):
    starts = {step.token_start: step.label for step in trace.steps}
    injections = FlowState.from_trace(trace).injections(boundaries, None)
    assert [starts[i.query] for i in injections] == expected


def test_a_pass_over_other_tokens_is_refused(trace):
    state = FlowState.from_trace(trace)
    state.check_shape(1, len(trace), "here")
    with pytest.raises(ModelError, match=rf"here: the model runs 1 rows of 3 tokens, .* of {len(trace)}"):
        state.check_shape(1, 3, "here")
    with pytest.raises(ValueError, match="no trace"):
        FlowState.from_traces([])
