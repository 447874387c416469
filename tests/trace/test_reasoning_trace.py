"""The trace as a value: validation, copies, JSON, pieces, table."""

import json
from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from trace_material import family_tokenizer

from stepflow_tl.errors import TraceError
from stepflow_tl.trace import ReasoningTrace, Segment, Step
from stepflow_tl.trace.steps import CausalLabels


def small(**changes) -> ReasoningTrace:
    """Four tokens: BOS, a question, two steps of thinking."""
    fields = {
        "tokens": torch.tensor([7, 8, 9, 9]),
        "text": "<s>Q?a\nb",
        "token_char_spans": torch.tensor([[0, 3], [3, 5], [5, 7], [7, 8]]),
        "segment_ids": torch.tensor([0, 1, 2, 2]),
        "step_ids": torch.tensor([-1, 0, 1, 2]),
        "steps": (
            Step(0, Segment.QUESTION, "Q", 1, 2, 3, 5, "Q?"),
            Step(1, Segment.THINKING, "T1", 2, 3, 5, 7, "a\n"),
            Step(2, Segment.THINKING, "T2", 3, 4, 7, 8, "b"),
        ),
        "format": "plain",
    }
    return ReasoningTrace(**{**fields, **changes})


def test_pieces_are_the_steps_and_the_template_between_them():
    trace = small()
    assert [piece.text for piece in trace.pieces] == ["<s>", "Q?", "a\n", "b"]
    assert [piece.segment for piece in trace.pieces] == [0, 1, 2, 2]
    assert [piece.token_span for piece in trace.pieces] == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_counts_spans_and_segments_are_at_hand():
    trace = small()
    assert len(trace) == 4
    assert trace.step_lengths.tolist() == [1, 1, 1]
    assert [step.label for step in trace.steps_in(Segment.THINKING)] == ["T1", "T2"]
    assert trace.steps[1].char_span == (5, 7) and trace.steps[1].n_tokens == 1
    assert repr(trace) == (
        "ReasoningTrace(4 tokens, steps: 1 question, 2 thinking, 0 summary; format 'plain')"
    )


def test_a_step_is_found_by_its_label_its_index_or_itself():
    trace = small()
    for index, label in enumerate(["Q", "T1", "T2"]):
        step = trace.steps[index]
        assert trace.step(label) is trace.step(index) is trace.step(step) is step
    assert trace.step(replace(STEP)) is trace.steps[1]  # an equal step is the same step


@pytest.mark.parametrize(
    ("which", "asked"),
    [
        ("T9", "'T9'"),
        ("t1", "'t1'"),
        (3, "3"),
        (-1, "-1"),
        (True, "True"),  # a bool is not an index
        (1.0, "1.0"),
    ],
)
def test_a_step_that_is_not_there_is_refused_with_those_that_are(which, asked):
    # `__wrapped__`: the signature check of the tests would refuse 1.0 first.
    look_up = getattr(ReasoningTrace.step, "__wrapped__", ReasoningTrace.step)
    with pytest.raises(TraceError, match=rf"no step {asked}: its steps are Q, T1, T2 \(0\.\.2\)"):
        look_up(small(), which)


def test_a_step_of_another_trace_is_refused_by_its_label():
    with pytest.raises(TraceError, match=r"no step 'T1': its steps are Q, T1, T2 \(0\.\.2\)"):
        small().step(replace(STEP, token_end=4))


def test_a_trace_without_steps_says_so():
    trace = small(steps=(), segment_ids=torch.zeros(4, dtype=torch.int64), step_ids=torch.full((4,), -1))
    with pytest.raises(TraceError, match="the trace has no step 'Q': it has no steps"):
        trace.step("Q")


def test_the_table_shows_one_piece_per_line_and_shortens_long_ones():
    lines = small().table(width=2).splitlines()
    assert lines[0].split() == ["label", "segment", "tokens", "chars", "text"]
    assert lines[1].split() == ["template", "template", "0:1", "0:3", "'<…'"]
    assert lines[3].split() == ["T1", "thinking", "2:3", "5:7", r"'a\n'"]


def test_a_trace_keeps_its_own_copy_of_every_tensor():
    tokens, ids = torch.tensor([7, 8, 9, 9]), torch.tensor([-1, 0, 1, 2])
    trace = small(tokens=tokens, step_ids=ids)
    tokens[0] = ids[0] = 99
    assert trace.tokens[0] == 7 and trace.step_ids[0] == -1
    assert trace.causal.step_ids.data_ptr() != trace.step_ids.data_ptr()


def test_by_default_every_label_was_final_at_once():
    labels = small().causal
    assert labels.resolved_at.tolist() == [0, 1, 2, 3]
    assert labels.step_ids.tolist() == [-1, 0, 1, 2]


def test_json_reads_back_exactly():
    trace = ReasoningTrace.from_parts(family_tokenizer("chatml", tags="plain"), "Hi 🙂?", "a\n\nb <c", "d")
    again = ReasoningTrace.from_json(json.loads(json.dumps(trace.to_json())))
    assert again == trace and hash(again) == hash(trace)
    assert torch.equal(again.token_char_spans, trace.token_char_spans)
    assert again.steps == trace.steps
    assert again != small() and again != "trace"


STEP = small().steps[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "<s>Q?a\nb!"}, "token_char_spans must tile the text: from 0 to 9"),
        ({"token_char_spans": torch.tensor([[0, 3], [4, 5], [5, 7], [7, 8]])}, "must tile the text"),
        ({"token_char_spans": torch.tensor([[0, 6], [6, 5], [5, 7], [7, 8]])}, "must tile the text"),
        ({"step_ids": torch.tensor([0, 0, 1, 2])}, "must say what the steps' token spans say"),
        ({"segment_ids": torch.tensor([0, 1, 2, 3])}, "must say what the steps' token spans say"),
        ({"steps": (replace(STEP, index=1),)}, r"Step 0 \(T1\) has index 1 and segment THINKING"),
        ({"steps": (replace(STEP, index=0, segment=Segment.TEMPLATE),)}, "TEMPLATE has no steps"),
        (
            {"steps": (replace(STEP, index=0, token_end=2),)},
            r"has tokens \(2, 2\): empty, before 0 or past 4",
        ),
        ({"steps": (replace(STEP, index=0, token_end=5),)}, r"has tokens \(2, 5\)"),
        (
            {"steps": (replace(STEP, index=0, char_end=9),)},
            r"has characters \(5, 9\): empty, before 0 or past 8",
        ),
        (
            {"steps": (replace(STEP, index=0, text="x"),)},
            r"has text 'x', which is not what stands at \(5, 7\)",
        ),
        (
            {"causal": CausalLabels(*[torch.tensor([0, 0, 0, 0])] * 3)},
            "resolved_at must not come before the token itself",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(TraceError, match=message):
        small(**changes)


def test_a_trace_without_tokens_is_refused():
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(TraceError, match="A trace needs at least one token, got none"):
        small(
            tokens=none,
            text="",
            token_char_spans=none.reshape(0, 2),
            segment_ids=none,
            step_ids=none,
            steps=(),
        )


def test_a_field_of_another_length_is_refused():
    # While the tests run the signature check may come first; without it the trace's own check does.
    with pytest.raises((TraceError, TypeCheckError), match="segment_ids"):
        small(segment_ids=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: {**data, "version": 0}, r"version 0, expected 1"),
        (lambda data: {k: v for k, v in data.items() if k != "steps"}, r"Not a trace: KeyError: 'steps'"),
        (lambda data: {**data, "tokens": ["a"]}, r"Not a trace: "),
        (lambda data: {**data, "text": data["text"] + "x"}, "must tile the text"),
        (lambda data: {**data, "steps": [{**data["steps"][0], "segment": 9}]}, "Not a trace: ValueError"),
    ],
)
def test_json_that_is_no_trace_is_refused(spoil, message):
    with pytest.raises(TraceError, match=message):
        ReasoningTrace.from_json(spoil(small().to_json()))
