"""Laws of traces, for random texts, tokens and tokenizers whose tokens straddle every boundary."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_material import chat_texts, family_tokenizer, texts

from stepflow_tl.errors import FormatError
from stepflow_tl.trace import ReasoningTrace, Segment
from stepflow_tl.trace.formats import get_format
from stepflow_tl.trace.splitting import TokenTracker, resolve_splitter
from stepflow_tl.trace.steps import WHITE_SPACE

LAW = settings(max_examples=500, deadline=None)
TOKENIZERS = {
    "bytes": family_tokenizer("chatml"),
    "spelled markers": family_tokenizer("chatml", tags="plain"),
    "straddling": family_tokenizer("chatml", tags="plain", merges="straddling"),
}
SPLITTERS = st.sampled_from(["paragraph", "line", "sentence"])


def assert_partition(trace: ReasoningTrace) -> None:
    pieces = trace.pieces
    assert "".join(piece.text for piece in pieces) == trace.text
    edges = [0, *(piece.char_end for piece in pieces)]
    assert edges == [*(piece.char_start for piece in pieces), len(trace.text)]
    edges = [0, *(piece.token_end for piece in pieces)]
    assert edges == [*(piece.token_start for piece in pieces), len(trace)]
    spans = trace.token_char_spans.tolist()
    assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), len(trace.text)]
    assert not any(step.text[0] in WHITE_SPACE for step in trace.steps)


def assert_streams(tokenizer, trace: ReasoningTrace, format: str, splitter: str, cut: int) -> None:
    """The tracker, fed token by token and forked on the way, says what the trace says."""
    tracker = TokenTracker(tokenizer, format, splitter)
    segments, steps = [], []
    known_segments, known_steps = trace.causal.segment_ids.tolist(), trace.causal.step_ids.tolist()
    resolved_at = trace.causal.resolved_at.tolist()
    for token, token_id in enumerate(trace.tokens.tolist()):
        if token == cut:
            fork, tracker = tracker, tracker.clone()
            for other in (*range(0, len(tokenizer), 29), token_id):
                fork.push(other)
        label = tracker.push(token_id)
        assert label.token == token
        assert (label.segment, label.step) == (known_segments[token], known_steps[token])
        assert label.is_final == (resolved_at[token] == token)
        assert label.begins_step == (label.step >= 0 and label.step not in steps)
        for earlier in (*range(*label.settled), *range(*label.relabelled)):
            assert resolved_at[earlier] == token
        for earlier in range(*label.relabelled):
            segments[earlier], steps[earlier] = Segment.TEMPLATE, -1
        segments.append(label.segment)
        steps.append(label.step)
    tracker.finish()
    assert segments == trace.segment_ids.tolist() and steps == trace.step_ids.tolist()


MARKERS = get_format("chatml").markers
BEGINNINGS = {marker[:length] for marker in MARKERS for length in range(1, len(marker) + 1)}


def assert_token_rule(trace: ReasoningTrace) -> None:
    """A token belongs to the piece of its first character, unless that might have opened a marker."""
    owner = [piece.index for piece in trace.pieces for _ in piece.text]
    step_ids = trace.step_ids.tolist()
    for token, (start, end) in enumerate(trace.token_char_spans.tolist()):
        tails = (trace.text[begin : start + 1] for begin in range(max(0, start - 24), start + 1))
        if end > start and not any(tail in BEGINNINGS for tail in tails):
            assert step_ids[token] == owner[start]


@LAW
@given(
    name=st.sampled_from(sorted(TOKENIZERS)), text=chat_texts(), splitter=SPLITTERS, cut=st.integers(0, 60)
)
def test_a_transcript_is_partitioned_and_streams_as_it_was_read(name, text, splitter, cut):
    tokenizer = TOKENIZERS[name]
    try:
        trace = ReasoningTrace.from_text(tokenizer, text, splitter=splitter)
    except FormatError as error:
        assert "without '<think>' before it" in str(error)
        return
    assert_partition(trace)
    assert_token_rule(trace)
    assert ReasoningTrace.from_tokens(tokenizer, trace.tokens, splitter=splitter) == trace
    assert ReasoningTrace.from_json(trace.to_json()) == trace
    assert_streams(tokenizer, trace, "chatml", splitter, cut)


@LAW
@given(data=st.data(), splitter=SPLITTERS)
def test_any_token_ids_make_a_partition(data, splitter):
    tokenizer = TOKENIZERS[data.draw(st.sampled_from(sorted(TOKENIZERS)))]
    prompt = tokenizer("<|im_start|>user\nQ", add_special_tokens=False)["input_ids"]
    ids = prompt + data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    try:
        trace = ReasoningTrace.from_tokens(tokenizer, ids, splitter=splitter)
    except FormatError:
        return
    assert_partition(trace)
    assert trace.tokens.tolist() == ids
    assert_streams(tokenizer, trace, "chatml", splitter, cut=len(prompt))


@LAW
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    question=texts(),
    thinking=texts(),
    summary=texts(),
    splitter=SPLITTERS,
)
def test_parts_come_back_whole_whatever_they_hold(name, question, thinking, summary, splitter):
    if not question.strip() or not (thinking.strip() or summary.strip()):
        return
    trace = ReasoningTrace.from_parts(TOKENIZERS[name], question, thinking, summary, splitter=splitter)
    assert_partition(trace)
    assert torch.equal(trace.causal.resolved_at, torch.arange(len(trace)))
    assert_token_rule(trace)
    # With one token a byte every character begins a token, so no step can go without one. A closing bracket
    # or a second full-width stop, split into bytes, is not known in time to be one: the stream may begin a
    # sentence there.
    has_wide_signs = any(sign in thinking + summary for sign in "…。！？»”’」』）】》")
    if name != "straddling" and not (splitter == "sentence" and has_wide_signs):
        for segment, part in ((Segment.THINKING, thinking), (Segment.SUMMARY, summary)):
            body = part.lstrip(WHITE_SPACE)
            found = [step.text for step in trace.steps_in(segment)]
            expected = resolve_splitter(splitter).split(body)
            assert [step.rstrip(WHITE_SPACE) for step in found] == [
                step.rstrip(WHITE_SPACE) for step in expected
            ]
            assert "".join(found).startswith(body)


@LAW
@given(text=chat_texts(), splitter=SPLITTERS, keep=st.integers(1, 80))
def test_labels_of_a_beginning_are_the_beginning_of_the_labels(text, splitter, keep):
    tokenizer = TOKENIZERS["straddling"]
    try:
        whole = ReasoningTrace.from_text(tokenizer, text, splitter=splitter)
        part = ReasoningTrace.from_tokens(tokenizer, whole.tokens[:keep], splitter=splitter)
    except FormatError:
        return
    assert torch.equal(part.causal.step_ids, whole.causal.step_ids[: len(part)])
    settled = part.causal.resolved_at < len(part)
    assert torch.equal(part.step_ids[settled], whole.step_ids[: len(part)][settled])
    assert torch.equal(part.segment_ids[settled], whole.segment_ids[: len(part)][settled])
