"""The reasoning trace: one token sequence, cut into segments and steps.

`tokens` and `text` are the same sequence twice. Two partitions describe it, both half-open and exact:

- **characters**: `token_char_spans` tile the text, one span per token (empty for a token that completes no
  character); the steps' spans and the TEMPLATE gaps between them tile it too, so `pieces` join to `text`.
- **tokens**: every token has one step or is TEMPLATE (`step_ids` -1); a step's tokens are contiguous.

A token that straddles a boundary belongs to the step in which it starts, so a step's first token may begin
after the step's first character. Labels are causal: `causal` keeps, for the few tokens whose label was not
final when they arrived (a marker spread over several tokens), what was known then and when it was settled.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from stepflow_tl.errors import TraceError
from stepflow_tl.trace.assembly import read_parts, read_text, read_tokens
from stepflow_tl.trace.steps import CausalLabels, Segment, Step, refuse_half_characters, whole_numbers

JSON_VERSION = 1
_TENSORS = ("tokens", "token_char_spans", "segment_ids", "step_ids")
_CAUSAL_TENSORS = ("segment_ids", "step_ids", "resolved_at")


@dataclass(frozen=True, eq=False, repr=False)
class ReasoningTrace:
    """One reasoning trace; build it with `from_parts`, `from_text` or `from_tokens`.

    Attributes:
        tokens: Token ids, int64 on the CPU.
        text: What the tokens read as.
        token_char_spans: Half-open character span of each token; they tile the text.
        segment_ids: `Segment` of each token.
        step_ids: Index into `steps` of each token; -1 on TEMPLATE.
        steps: The steps in trace order.
        format: Name of the reasoning format.
        causal: What was known of each token when it arrived; by default that all labels were final at once.

    Raises:
        TraceError: The fields contradict each other.
    """

    tokens: Int[Tensor, "token"]
    text: str
    token_char_spans: Int[Tensor, "token 2"]
    segment_ids: Int[Tensor, "token"]
    step_ids: Int[Tensor, "token"]
    steps: tuple[Step, ...]
    format: str
    causal: CausalLabels = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        """Take copies, so that nobody else's write reaches this trace, and refuse contradictions."""
        for name in _TENSORS:
            object.__setattr__(self, name, _own(getattr(self, name)))
        causal = self.causal
        if causal is None:  # the default
            causal = CausalLabels(self.segment_ids, self.step_ids, torch.arange(len(self.tokens)))
        causal = CausalLabels(*(_own(getattr(causal, name)) for name in _CAUSAL_TENSORS))
        object.__setattr__(self, "causal", causal)
        object.__setattr__(self, "steps", tuple(self.steps))
        _validate(self)

    def __len__(self) -> int:
        """Number of tokens."""
        return self.tokens.shape[0]

    def __eq__(self, other: object) -> bool:
        """Same tokens, text, labels and format."""
        return isinstance(other, ReasoningTrace) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        """Hash of text and format."""
        return hash((self.text, self.format, len(self)))

    def __repr__(self) -> str:
        """Counts, not contents."""
        counts = [f"{len(self.steps_in(s))} {s.name.lower()}" for s in Segment if s != Segment.TEMPLATE]
        return f"ReasoningTrace({len(self)} tokens, steps: {', '.join(counts)}; format {self.format!r})"

    @property
    def step_lengths(self) -> Int[Tensor, "step"]:
        """Number of tokens of each step."""
        return torch.tensor([step.n_tokens for step in self.steps], dtype=torch.int64)

    def steps_in(self, segment: Segment) -> tuple[Step, ...]:
        """The steps of one `segment`, in trace order."""
        return tuple(step for step in self.steps if step.segment == segment)

    def step(self, which: Step | str | int) -> Step:
        """One step of the trace.

        Args:
            which: Its label ("Q", "T3", "S1"), its index, or the step itself.

        Raises:
            TraceError: If the trace has no such step; the message names those it has.
        """
        for step in self.steps:
            if which == step or which == step.label or (type(which) is int and which == step.index):
                return step
        asked = which.label if isinstance(which, Step) else which
        labels = ", ".join(step.label for step in self.steps)
        known = f"its steps are {labels} (0..{len(self.steps) - 1})" if self.steps else "it has no steps"
        raise TraceError(f"the trace has no step {asked!r}: {known}")

    @property
    def pieces(self) -> tuple[Step, ...]:
        """Steps and the TEMPLATE stretches between them (index -1); their texts join to `text`."""
        pieces: list[Step] = []
        token = char = 0
        for step in [*self.steps, None]:
            token_end, char_end = (step.token_start, step.char_start) if step else (len(self), len(self.text))
            if char_end > char or token_end > token:
                gap = self.text[char:char_end]
                pieces.append(Step(-1, Segment.TEMPLATE, "template", token, token_end, char, char_end, gap))
            if step:
                pieces.append(step)
                token, char = step.token_end, step.char_end
        return tuple(pieces)

    def table(self, width: int = 48) -> str:
        """One line per piece: label, segment, spans, and the first `width` characters of its text."""
        rows = [["label", "segment", "tokens", "chars", "text"]]
        for piece in self.pieces:
            start = piece.text if len(piece.text) <= width else piece.text[: width - 1] + "…"
            spans = (f"{a}:{b}" for a, b in (piece.token_span, piece.char_span))
            rows.append([piece.label, piece.segment.name.lower(), *spans, repr(start)])
        widths = [*(max(len(row[column]) for row in rows) for column in range(4)), 0]
        return "\n".join(
            "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)) for row in rows
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values that `json` can write and `from_json` reads back exactly."""
        return {
            "version": JSON_VERSION,
            "format": self.format,
            "text": self.text,
            **{name: getattr(self, name).tolist() for name in _TENSORS},
            "causal": {name: getattr(self.causal, name).tolist() for name in _CAUSAL_TENSORS},
            "steps": [
                {
                    "segment": int(step.segment),
                    "label": step.label,
                    "tokens": list(step.token_span),
                    "chars": list(step.char_span),
                }
                for step in self.steps
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ReasoningTrace":
        """Read `data` that `to_json` wrote.

        Raises:
            TraceError: A field is missing, of the wrong kind or of another version, or the fields contradict.
        """
        if not isinstance(data, dict) or data.get("version") != JSON_VERSION:
            version = data.get("version") if isinstance(data, dict) else type(data).__name__
            raise TraceError(
                f"Not a trace this package reads: version {version!r}, expected {JSON_VERSION}. Write it "
                "with to_json."
            )
        try:
            text, causal = data["text"], data["causal"]
            if not isinstance(text, str) or not isinstance(data["format"], str):
                raise TypeError("text and format must be strings")
            steps = tuple(_step_from_json(index, step, text) for index, step in enumerate(data["steps"]))
            return cls(
                tokens=_tensor(data["tokens"]),
                text=text,
                token_char_spans=_pairs(data["token_char_spans"]),
                segment_ids=_tensor(data["segment_ids"]),
                step_ids=_tensor(data["step_ids"]),
                steps=steps,
                format=data["format"],
                causal=CausalLabels(*(_tensor(causal[name]) for name in _CAUSAL_TENSORS)),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            if isinstance(error, TraceError):
                raise
            raise TraceError(
                f"Not a trace: {type(error).__name__}: {error}. Write it with to_json."
            ) from error

    @classmethod
    def from_parts(
        cls,
        tokenizer: Any,
        question: str,
        thinking: str,
        summary: str = "",
        *,
        format: Any = None,
        splitter: Any = None,
        summary_splitter: Any = None,
        question_splitter: Any = None,
        system: str | None = None,
    ) -> "ReasoningTrace":
        """A trace from its parts, written the way the model would have seen and said them.

        The chat template stands around the question and the format's markers between the parts, whose own
        text is never searched for markers.

        Args:
            tokenizer: The model's own; a fast transformers tokenizer.
            question: The user's text.
            thinking: The text between the thinking markers; may be empty.
            summary: The visible answer after them; empty for thinking that has not ended (no end marker is
                written then).
            format: Name, or a `ReasoningFormat`; default: the chat template's own, "plain" without one.
            splitter: Cuts thinking into steps: a name or a splitter; default "paragraph".
            summary_splitter: Cuts the summary; default: like thinking.
            question_splitter: Cuts the question; default: one step.
            system: System prompt; default: the template's own.

        Raises:
            TraceError: A part is not a string, the question is empty, thinking and summary are both empty, or
                a splitter is unknown.
            FormatError: The format is unknown, or the chat template cannot be filled.
        """
        splitters = (splitter, summary_splitter, question_splitter)
        return cls(**read_parts(tokenizer, question, thinking, summary, format, splitters, system))

    @classmethod
    def from_text(
        cls,
        tokenizer: Any,
        text: str,
        *,
        format: Any = "auto",
        question: str | None = None,
        splitter: Any = None,
        summary_splitter: Any = None,
        question_splitter: Any = None,
    ) -> "ReasoningTrace":
        """A trace from a full transcript, markers and all: `text` as it is decoded, nothing hidden.

        The text is tokenised once, and nothing is added to it. With format "plain", `question` is the
        beginning of the text that is the question; without it all is thinking. Format "auto" is the
        tokenizer's own; other arguments as in `from_parts`.

        Raises:
            TraceError: The text is empty, or does not begin with the question; or a splitter is unknown.
            FormatError: The format is unknown, or the text lacks the markers it demands.
        """
        splitters = (splitter, summary_splitter, question_splitter)
        return cls(**read_text(tokenizer, text, format, question, splitters))

    @classmethod
    def from_tokens(
        cls,
        tokenizer: Any,
        ids: Int[Tensor, "..."] | Iterable[int],
        *,
        format: Any = "auto",
        splitter: Any = None,
        summary_splitter: Any = None,
        question_splitter: Any = None,
    ) -> "ReasoningTrace":
        """A trace from the token ids of a full transcript, prompt and response together.

        `ids` is any iterable of integers, or a tensor `[token]` or `[1, token]`. The tokenizer need not be a
        fast one, and format "auto" is its own. Other arguments as in `from_parts`.

        Raises:
            TraceError: There is no token, an id is outside the vocabulary, or a splitter is unknown.
            FormatError: The format is unknown, or the text lacks the markers it demands.
        """
        splitters = (splitter, summary_splitter, question_splitter)
        return cls(**read_tokens(tokenizer, ids, format, splitters))


def _step_from_json(index: int, data: dict[str, Any], text: str) -> Step:
    (token_start, token_end), (char_start, char_end) = map(whole_numbers, (data["tokens"], data["chars"]))
    if not isinstance(data["label"], str):
        raise TypeError("a step's label must be a string")
    segment, piece = Segment(data["segment"]), text[char_start:char_end]
    return Step(index, segment, data["label"], token_start, token_end, char_start, char_end, piece)


def _tensor(values: list) -> Int[Tensor, "value"]:
    return torch.tensor(whole_numbers(values), dtype=torch.int64)


def _pairs(pairs: list) -> Int[Tensor, "pair 2"]:
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("expected pairs")
    return _tensor([value for pair in pairs for value in pair]).reshape(-1, 2)


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.int64, copy=True).contiguous()


def _validate(trace: ReasoningTrace) -> None:
    """Refuse fields that contradict each other."""
    n_tokens, n_chars = len(trace), len(trace.text)
    refuse_half_characters(trace.text)
    if n_tokens == 0:
        raise TraceError("A trace needs at least one token, got none.")
    fields = {name: getattr(trace, name) for name in _TENSORS}
    fields |= {f"causal.{name}": getattr(trace.causal, name) for name in _CAUSAL_TENSORS}
    for name, tensor in fields.items():
        shape = (n_tokens, 2) if name == "token_char_spans" else (n_tokens,)
        if tuple(tensor.shape) != shape:
            raise TraceError(
                f"{name} must have shape {shape} for {n_tokens} tokens, got {tuple(tensor.shape)}."
            )
    spans = trace.token_char_spans
    edges = torch.cat([spans[:, 0], torch.tensor([n_chars])])
    if spans[0, 0] != 0 or not torch.equal(edges[1:], spans[:, 1]) or bool((spans[:, 1] < spans[:, 0]).any()):
        raise TraceError(
            f"token_char_spans must tile the text: from 0 to {n_chars} without holes or overlap."
        )
    step_ids, segment_ids = torch.full((n_tokens,), -1), torch.zeros(n_tokens, dtype=torch.int64)
    token = char = 0
    for index, step in enumerate(trace.steps):
        problem = ""
        if step.index != index or step.segment == Segment.TEMPLATE:
            problem = f"has index {step.index} and segment {step.segment.name}; TEMPLATE has no steps"
        elif not (token <= step.token_start < step.token_end <= n_tokens):
            problem = f"has tokens {step.token_span}: empty, before {token} or past {n_tokens}"
        elif not (char <= step.char_start < step.char_end <= n_chars):
            problem = f"has characters {step.char_span}: empty, before {char} or past {n_chars}"
        elif step.text != trace.text[step.char_start : step.char_end]:
            problem = f"has text {step.text[:40]!r}, which is not what stands at {step.char_span}"
        if problem:
            raise TraceError(
                f"Step {index} ({step.label}) {problem}; steps must lie in order within the trace."
            )
        token, char = step.token_end, step.char_end
        step_ids[step.token_start : step.token_end] = index
        segment_ids[step.token_start : step.token_end] = int(step.segment)
    if not torch.equal(step_ids, trace.step_ids) or not torch.equal(segment_ids, trace.segment_ids):
        raise TraceError(
            "step_ids and segment_ids must say what the steps' token spans say, -1 and TEMPLATE elsewhere."
        )
    if bool((trace.causal.resolved_at < torch.arange(n_tokens)).any()):
        raise TraceError("causal.resolved_at must not come before the token itself.")
