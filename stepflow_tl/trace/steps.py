"""The words of a reasoning trace: segments, steps, and what was known of a token when it arrived.

Formats, splitting and the trace itself all speak of these, so they stand below all three. White space is
defined here too, once for the whole package, because it decides where a step begins; and so are the two
refusals that every reader of text and numbers from outside shares.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from jaxtyping import Int
from torch import Tensor

from stepflow_tl.errors import TraceError

#: White space in the sense of this package: the six ASCII characters. Wider spaces (U+00A0, U+3000, U+2028)
#: are ordinary characters. Each of the six is one byte in every tokenizer, so that white space is never split
#: over two tokens and the first fragment of a split character is known to begin an ordinary one.
WHITE_SPACE = " \t\n\r\f\v"


def refuse_half_characters(text: str) -> None:
    r"""Refuse text with a lone surrogate, which is what `json.loads` makes of "\\ud800".

    Raises:
        TraceError: The text has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TraceError(
            f"The text holds half a character ({text[error.start]!r} at {error.start}), which no file or "
            "tokenizer takes."
        ) from error


def whole_numbers(values: Any) -> tuple[int, ...]:
    """The values of a JSON list of whole numbers; 1.5 is not cut to 1, and True is not taken for 1.

    Raises:
        TypeError: The value is not a list, or one of its items is not a whole number.
    """
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise TypeError(f"expected a list of whole numbers, found {str(values)[:60]}")
    return tuple(values)


class Segment(IntEnum):
    """The part of a trace that a token or a step belongs to.

    `TEMPLATE` holds BOS, role markers, the system prompt and the thinking markers themselves; it has no
    steps.
    """

    TEMPLATE = 0
    QUESTION = 1
    THINKING = 2
    SUMMARY = 3


@dataclass(frozen=True)
class Step:
    """A contiguous stretch of one segment. Spans are half-open.

    Attributes:
        index: Place among the trace's steps.
        segment: The segment it lies in; never TEMPLATE.
        label: "Q", "T1", "S1" and so on.
        token_start: First token.
        token_end: The one after the last.
        char_start: First character of the trace's text.
        char_end: The one after the last.
        text: What stands there.
    """

    index: int
    segment: Segment
    label: str
    token_start: int
    token_end: int
    char_start: int
    char_end: int
    text: str

    @property
    def token_span(self) -> tuple[int, int]:
        """First token and the one after the last."""
        return self.token_start, self.token_end

    @property
    def char_span(self) -> tuple[int, int]:
        """First character and the one after the last."""
        return self.char_start, self.char_end

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return self.token_end - self.token_start


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
