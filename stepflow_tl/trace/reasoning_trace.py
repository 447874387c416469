"""The reasoning trace: one token sequence, cut into segments and steps.

`tokens` and `text` are the same sequence twice. Two partitions describe it, both half-open and exact:

- **characters**: `token_char_spans` tile the text, one span a token (empty for a token that completes no
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
from stepflow_tl.trace.steps import Segment as Segment
from stepflow_tl.trace.steps import Step as Step
from stepflow_tl.trace.steps import refuse_half_characters

JSON_VERSION = 1


@dataclass(frozen=True)
class CausalLabels:
    """What was known of each token when it arrived.

    Attributes:
        segment_ids: Segment as known when the token arrived.
        step_ids: Step as known then; -1 on TEMPLATE.
        resolved_at: Index of the token whose arrival made the label final; the token itself, as a rule. A
            token still undecided at the end of the trace has the number of tokens there, and keeps its label.
    """

    segment_ids: Int[Tensor, "token"]
    step_ids: Int[Tensor, "token"]
    resolved_at: Int[Tensor, "token"]


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
        for name in ("tokens", "token_char_spans", "segment_ids", "step_ids"):
            object.__setattr__(self, name, _own(getattr(self, name)))
        causal = self.causal
        if causal is None:  # the default
            causal = CausalLabels(self.segment_ids, self.step_ids, torch.arange(len(self.tokens)))
        fields = (_own(causal.segment_ids), _own(causal.step_ids), _own(causal.resolved_at))
        object.__setattr__(self, "causal", CausalLabels(*fields))
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
        labels = ", ".join(step.label for step in self.steps) or "none"
        last = len(self.steps) - 1
        raise TraceError(f"the trace has no step {asked!r}: its steps are {labels} (0..{last})")

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
        """The pieces as text, one a line: label, segment, spans, and the first `width` characters."""
        rows = [["label", "segment", "tokens", "chars", "text"]]
        for piece in self.pieces:
            start = piece.text if len(piece.text) <= width else piece.text[: width - 1] + "…"
            spans = (f"{a}:{b}" for a, b in (piece.token_span, piece.char_span))
            rows.append([piece.label, piece.segment.name.lower(), *spans, repr(start)])
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values that `json` can write and `from_json` reads back exactly."""
        data: dict[str, Any] = {"version": JSON_VERSION, "format": self.format, "text": self.text}
        for name in ("tokens", "token_char_spans", "segment_ids", "step_ids"):
            data[name] = getattr(self, name).tolist()
        data["causal"] = {
            k: getattr(self.causal, k).tolist() for k in ("segment_ids", "step_ids", "resolved_at")
        }
        data["steps"] = [
            {
                "segment": int(s.segment),
                "label": s.label,
                "tokens": list(s.token_span),
                "chars": list(s.char_span),
            }
            for s in self.steps
        ]
        return data

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
                tokens=_ints(data["tokens"]),
                text=text,
                token_char_spans=_int_pairs(data["token_char_spans"]),
                segment_ids=_ints(data["segment_ids"]),
                step_ids=_ints(data["step_ids"]),
                steps=steps,
                format=data["format"],
                causal=CausalLabels(*(_ints(causal[k]) for k in ("segment_ids", "step_ids", "resolved_at"))),
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
        """A trace from its parts, the chat template applied around them.

        See `trace_building.build_from_parts`.

        Args:
            tokenizer: The model's own.
            question: The user's text.
            thinking: The text between the thinking markers.
            summary: The visible answer after them; none by default.
            format: Name, or a `ReasoningFormat`; default: the chat template's own, "plain" without one.
            splitter: Cuts thinking into steps: a name or a splitter; default "paragraph".
            summary_splitter: Cuts the summary; default: like thinking.
            question_splitter: Cuts the question; default: one step.
            system: System prompt; default: the template's own.
        """
        from stepflow_tl.trace.assembly import build_from_parts

        splitters = (splitter, summary_splitter, question_splitter)
        return build_from_parts(tokenizer, question, thinking, summary, format, splitters, system)

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

        With format "plain", the text up to the end of `question` is the question; without it all is thinking.
        Other arguments as in `from_parts`; see `trace_building.build_from_text`.
        """
        from stepflow_tl.trace.assembly import build_from_text

        return build_from_text(
            tokenizer, text, format, question, (splitter, summary_splitter, question_splitter)
        )

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
        """A trace from the token ids of a full transcript.

        `ids` is any iterable of integers, or a tensor `[token]` or `[1, token]`. Other arguments as in
        `from_parts`; see `trace_building.build_from_tokens`.
        """
        from stepflow_tl.trace.assembly import build_from_tokens

        return build_from_tokens(tokenizer, ids, format, (splitter, summary_splitter, question_splitter))


def causal_labels(trace: ReasoningTrace) -> CausalLabels:
    """What was known of each token of the trace when it arrived."""
    return trace.causal


def _step_from_json(index: int, data: dict[str, Any], text: str) -> Step:
    (token_start, token_end), (char_start, char_end) = data["tokens"], data["chars"]
    _ints([token_start, token_end, char_start, char_end])
    if not isinstance(data["label"], str):
        raise TypeError("a step's label must be a string")
    segment, piece = Segment(data["segment"]), text[char_start:char_end]
    return Step(index, segment, data["label"], token_start, token_end, char_start, char_end, piece)


def _ints(values: list) -> Tensor:
    # torch would cut 1.5 to 1 and take True for 1.
    if any(type(value) is not int for value in values):
        raise TypeError("expected whole numbers only")
    return torch.tensor(values, dtype=torch.int64)


def _int_pairs(pairs: list) -> Tensor:
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("expected pairs")
    return _ints([value for pair in pairs for value in pair]).reshape(-1, 2)


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.int64, copy=True).contiguous()


def _validate(trace: ReasoningTrace) -> None:
    """Refuse fields that contradict each other."""
    n_tokens, n_chars = len(trace), len(trace.text)
    refuse_half_characters(trace.text)
    if n_tokens == 0:
        raise TraceError("A trace needs at least one token, got none.")
    shapes = {
        "token_char_spans": (trace.token_char_spans, (n_tokens, 2)),
        "segment_ids": (trace.segment_ids, (n_tokens,)),
        "step_ids": (trace.step_ids, (n_tokens,)),
        "causal.segment_ids": (trace.causal.segment_ids, (n_tokens,)),
        "causal.step_ids": (trace.causal.step_ids, (n_tokens,)),
        "causal.resolved_at": (trace.causal.resolved_at, (n_tokens,)),
    }
    for name, (tensor, shape) in shapes.items():
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
