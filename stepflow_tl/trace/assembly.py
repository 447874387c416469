"""The fields of a `ReasoningTrace`: read from parts, from a transcript's text, from its tokens.

1. Get token ids and the text piece of each (`decoding`).
2. Run the step tracker over the pieces (`splitting.tracker`). The three readers differ in who knows the
   segments: for parts, the character spans of the parts themselves; for transcripts, the format's markers.
3. Lay down what the tracker said of each token, when it became certain, and where each step stands.

Time: O(characters), decoding and scanning apart. `ReasoningTrace.from_parts`, `from_text` and `from_tokens`
describe arguments and errors, and make the trace, whose own check the fields then pass.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from stepflow_tl.errors import FormatError, TraceError
from stepflow_tl.trace.decoding import TextPiece, decode_tokens, encode_text
from stepflow_tl.trace.formats.chat_template import chat_template, render_parts, resolve_format
from stepflow_tl.trace.formats.reasoning_format import ReasoningFormat
from stepflow_tl.trace.formats.scanner import FormatScanner, Scanner, SpanScanner
from stepflow_tl.trace.splitting.tracker import StepTracker
from stepflow_tl.trace.steps import CausalLabels, Segment, Step

Fields = dict[str, Any]  # the arguments of a ReasoningTrace, by name
Splitters = tuple[Any, Any, Any]  # of thinking, summary, question; None for the defaults


def read_parts(
    tokenizer: Any,
    question: str,
    thinking: str,
    summary: str,
    format: Any,
    splitters: Splitters,
    system: str | None,
) -> Fields:
    """Write the parts the way the model would have seen and said them, and cut at the seams."""
    for name, part in (("question", question), ("thinking", thinking), ("summary", summary)):
        if not isinstance(part, str):
            raise TraceError(f"{name} must be a string, got {type(part).__name__}; pass '' for an empty one.")
    if not question.strip():
        raise TraceError("The question is empty; pass the user's text. For text without one use from_text.")
    if not thinking.strip() and not summary.strip():
        raise TraceError("thinking and summary are both empty; a trace needs at least one of them.")
    if format is None and chat_template(tokenizer) is None:
        format = "plain"  # markers in the vocabulary do not tell how to write a prompt
    entry = resolve_format(tokenizer, format)
    text, spans = render_parts(tokenizer, entry, question, thinking, summary, system)
    ids, pieces = encode_text(tokenizer, text)
    return _assemble(ids, pieces, "", SpanScanner(spans), splitters, entry)


def read_text(tokenizer: Any, text: str, format: Any, question: str | None, splitters: Splitters) -> Fields:
    """Read a full transcript, markers and all, as it would be decoded without hiding special tokens."""
    if not isinstance(text, str) or not text:
        raise TraceError(f"The text of a trace must be a string that is not empty, got {text!r}.")
    entry = resolve_format(tokenizer, format)
    scanner = FormatScanner(entry) if question is None else _question_first(text, question, entry)
    ids, pieces = encode_text(tokenizer, text)
    return _assemble(ids, pieces, "", scanner, splitters, entry)


def read_tokens(
    tokenizer: Any, ids: Int[Tensor, "..."] | Iterable[int], format: Any, splitters: Splitters
) -> Fields:
    """Read the token ids of a full transcript, prompt and response together."""
    token_ids = _checked_ids(tokenizer, ids)
    entry = resolve_format(tokenizer, format)
    pieces, rest = decode_tokens(tokenizer, token_ids)
    return _assemble(token_ids, pieces, rest, FormatScanner(entry), splitters, entry)


def _question_first(text: str, question: str, entry: ReasoningFormat) -> SpanScanner:
    """The spans of a plain text that begins with its question; a BOS before that is TEMPLATE."""
    if entry.name != "plain":
        raise TraceError(
            f"question= goes with format='plain' only; the markers of {entry.name!r} say where it is."
        )
    bos = next((filler for filler in entry.fillers if text.startswith(filler)), "")
    if not question or not text.startswith(question, len(bos)):
        raise TraceError(
            f"The text must begin with the question {question[:40]!r}; it begins with {text[:40]!r}."
        )
    end = len(bos) + len(question)
    return SpanScanner([(len(bos), Segment.TEMPLATE), (end, Segment.QUESTION), (len(text), Segment.THINKING)])


def _checked_ids(tokenizer: Any, ids: Int[Tensor, "..."] | Iterable[int]) -> list[int]:
    if isinstance(ids, Tensor):
        if ids.ndim == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise TraceError(
                f"Token ids must be an integer tensor [token] or [1, token], got {ids.dtype} of shape "
                f"{tuple(ids.shape)}; pass one row of a batch at a time."
            )
        ids = ids.tolist()
    ids = list(ids)
    if not ids:
        raise TraceError("There are no token ids; a trace needs at least one token.")
    size = len(tokenizer)
    if any(isinstance(i, int) and i >= size for i in ids):
        # A vocabulary with gaps has ids beyond its size.
        size = max(size, 1 + max(tokenizer.get_vocab().values()))
    for position, token_id in enumerate(ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise TraceError(f"Token ids must be integers, got {token_id!r} at position {position}.")
        if not 0 <= token_id < size:
            raise TraceError(
                f"Token id {token_id} at position {position} is outside the vocabulary of {size} tokens; "
                "are the ids from another model's tokenizer?"
            )
    return ids


def _check_demands(scanner: FormatScanner, entry: ReasoningFormat, steps: tuple[Step, ...]) -> None:
    """Refuse a transcript that lacks the markers its format demands."""
    start = " or ".join(map(repr, entry.thinking_starts))
    end = " or ".join(map(repr, entry.thinking_ends or entry.answer_starts))
    if entry.thinking_required and not scanner.saw_thinking_marker:
        raise FormatError(
            f"No thinking marker in the text: format {entry.name!r} demands {start} or {end} in the "
            "assistant's turn. Pass the full transcript with its markers, use ReasoningTrace.from_parts, or "
            "pass format='plain'."
        )
    if scanner.stray_thinking_end:
        raise FormatError(
            f"{end} without {start} before it in an assistant's turn of format {entry.name!r}. Put {start} "
            "where the thinking starts, or pass a format whose turns open as thinking ('qwq', 'deepseek-r1')."
        )
    if not steps:
        turns = ", ".join(map(repr, entry.user_turns + entry.assistant_turns)) or "text"
        raise FormatError(
            f"No question, thinking or answer in the text: format {entry.name!r} expects turns that begin "
            f"with {turns}. Pass the full transcript, or format='plain' for text without markers."
        )


def _assemble(
    ids: list[int],
    pieces: list[TextPiece],
    rest: str,
    scanner: Scanner,
    splitters: Splitters,
    entry: ReasoningFormat,
) -> Fields:
    """Run the tracker over the pieces and `rest`, which join to the text, and lay its labels down."""
    tracker = StepTracker(scanner, *splitters, keep_log=True)
    labels = [tracker.push(piece) for piece in pieces]
    tracker.finish(rest)
    known_segments, known_steps = [label.segment for label in labels], [label.step for label in labels]
    segments, step_ids = list(known_segments), list(known_steps)
    resolved_at = [label.token if label.is_final else len(labels) for label in labels]
    for label in labels:
        for token in range(*label.settled):
            resolved_at[token] = label.token
        for token in range(*label.relabelled):
            resolved_at[token], segments[token], step_ids[token] = label.token, Segment.TEMPLATE, -1
    text = "".join(piece.text for piece in pieces) + rest
    steps = _steps(tracker, step_ids, text)
    if isinstance(scanner, FormatScanner):
        _check_demands(scanner, entry, steps)
    edges = [0, *accumulate(len(piece.text) for piece in pieces)]
    edges[-1] = len(text)
    return {
        "tokens": _tensor(ids),
        "text": text,
        "token_char_spans": torch.tensor(list(pairwise(edges)), dtype=torch.int64),
        "segment_ids": _tensor(segments),
        "step_ids": _tensor(step_ids),
        "steps": steps,
        "format": entry.name,
        "causal": CausalLabels(_tensor(known_segments), _tensor(known_steps), _tensor(resolved_at)),
    }


def _steps(tracker: StepTracker, step_ids: list[int], text: str) -> tuple[Step, ...]:
    """The steps that own tokens; a step that owns none merges into the step before it, else into TEMPLATE."""
    assert tracker.log is not None
    spans: dict[int, list[int]] = {}
    segments: dict[int, Segment] = {}
    current: int | None = None
    ends = [start.char for start in tracker.log[1:]] + [len(text)]
    for start, end in zip(tracker.log, ends, strict=True):
        if start.segment == Segment.TEMPLATE:
            current = None
        elif start.step is not None:
            current = start.step
            spans[current], segments[current] = [start.char, end], start.segment
        elif current is not None and segments[current] == start.segment:
            spans[current][1] = end
    first = {step: token for token, step in reversed(list(enumerate(step_ids)))}
    last = {step: token for token, step in enumerate(step_ids)}
    totals = {segment: sum(s == segment for s in segments.values()) for segment in Segment}
    counts = dict.fromkeys(Segment, 0)
    steps = []
    for index in sorted(spans):
        segment, (a, b) = segments[index], spans[index]
        counts[segment] += 1
        is_only_question = segment == Segment.QUESTION and totals[segment] == 1
        label = segment.name[0] + ("" if is_only_question else str(counts[segment]))
        steps.append(Step(index, segment, label, first[index], last[index] + 1, a, b, text[a:b]))
    return tuple(steps)


def _tensor(values: Sequence[int]) -> Int[Tensor, "token"]:
    return torch.tensor(list(map(int, values)), dtype=torch.int64)
