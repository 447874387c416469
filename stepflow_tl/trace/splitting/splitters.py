"""Step splitters: where one reasoning step ends and the next begins, decided without looking ahead.

A splitter is a recipe; `stream()` gives a fresh streaming twin that is fed the characters of one segment and
says of each whether it begins a new step. The answer uses that character and earlier ones only. `split(text)`
runs the same twin over a finished text, so the two can never disagree.

Rules that hold for every splitter:

1. White space (`steps.WHITE_SPACE`) belongs to the step before it: a step never begins with white space.
   White space before the first step of a text stays with that first step in `split`, and with what precedes
   it in a trace.
2. `"".join(splitter.split(text)) == text`, always.
3. The first character that is not white space begins the first step.
"""

import re
from collections.abc import Callable
from copy import copy
from typing import Any, Protocol, runtime_checkable

from stepflow_tl.errors import TraceError
from stepflow_tl.trace.splitting.sentences import SentenceStream
from stepflow_tl.trace.steps import WHITE_SPACE


@runtime_checkable
class StepStream(Protocol):
    """The streaming twin of a splitter."""

    def feed(self, char: str) -> bool:
        """Take the next character; say whether it begins a new step. White space never does."""
        ...

    def clone(self) -> "StepStream":
        """An independent copy (beams and batches fork); a shallow one, so state must be immutable values."""
        return copy(self)


@runtime_checkable
class StepSplitter(Protocol):
    """A recipe for cutting a segment into steps."""

    def stream(self) -> StepStream:
        """A fresh streaming twin."""
        ...

    def split(self, text: str) -> list[str]:
        """The steps of a finished `text`, by the streaming twin; they join to it. No text has no step."""
        if not text:
            return []
        stream, starts = self.stream(), [0]
        first = len(text) - len(text.lstrip(WHITE_SPACE))
        for position in range(first, len(text)):
            if stream.feed(text[position]) and position > first:
                starts.append(position)
        return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


class _Splitter(StepSplitter):
    """A splitter whose twins are copies of one that has not been fed yet."""

    _unfed: StepStream

    def stream(self) -> StepStream:
        """A fresh streaming twin."""
        return self._unfed.clone()


class _WholeStream(StepStream):
    def feed(self, char: str) -> bool:
        return False


class WholeSplitter(_Splitter):
    """Everything is one step; the default for questions."""

    _unfed = _WholeStream()


class _NewlineStream(StepStream):
    def __init__(self, newlines: int) -> None:
        self.needed, self.seen = newlines, 0

    def feed(self, char: str) -> bool:
        if char in WHITE_SPACE:
            self.seen += char == "\n"
            return False
        begins, self.seen = self.seen >= self.needed, 0
        return begins


class ParagraphSplitter(_Splitter):
    r"""A blank line separates steps. It may hold white space, and lines may end in `\r\n`."""

    _unfed = _NewlineStream(2)


class LineSplitter(_Splitter):
    """Every line that is not blank is a step."""

    _unfed = _NewlineStream(1)


class SentenceSplitter(_Splitter):
    """A sentence is a step; never cut inside a decimal, an abbreviation, LaTeX or code.

    The rules are in `stepflow_tl.trace.splitting.sentences`.
    """

    _unfed = SentenceStream()


class _RegexStream(StepStream):
    def __init__(self, ends: "re.Pattern[str]", window: int) -> None:
        self.ends, self.window = ends, window
        self.text, self.ended = "", False

    def feed(self, char: str) -> bool:
        begins = self.ended and char not in WHITE_SPACE
        self.text = char if begins else (self.text + char)[-self.window :]
        self.ended = (self.ended and not begins) or self.ends.search(self.text) is not None
        return begins


class RegexSplitter(_Splitter):
    r"""A step ends wherever the pattern matches a stretch that ends there.

    After each character the text of the current step so far is searched for a match that ends exactly with
    it. If there is one, the step is over: white space still belongs to it, and the next other character
    begins a new step. So the pattern marks the *end* of a step (`r"[.;]\s"`, `r"\n---\n"`, `r"Wait,"`), a
    match may not reach back into the step before, and of two matches that begin at the same place the shorter
    one ends the step.

    Args:
        pattern: A regular expression (string or compiled). Look-ahead is refused: the characters it asks for
            are not there yet. `$` and `\b` see the text end after each character.
        max_match: Longest stretch, in characters, in which a match is looked for. Cost per character is of
            this order.

    Raises:
        TraceError: The pattern does not compile, looks ahead, or matches the empty string.
    """

    def __init__(self, pattern: "str | re.Pattern[str]", max_match: int = 128) -> None:
        """Compile the pattern and refuse what cannot be followed causally."""
        source = pattern if isinstance(pattern, str) else pattern.pattern
        flags = 0 if isinstance(pattern, str) else pattern.flags
        try:
            # A greedy match must be able to give way, so that "ends here" is asked of every way to match.
            ends = re.compile(rf"(?:{source})\Z", flags)
            is_empty = re.compile(source, flags).fullmatch("") is not None
        except re.error as error:
            raise TraceError(
                f"The splitter pattern {source!r} is not a regular expression: {error}."
            ) from error
        if re.search(r"(?<!\\)(?:\\\\)*\(\?[=!]", source):
            raise TraceError(
                f"The splitter pattern {source!r} looks ahead, which a causal splitter cannot; "
                "match the end of a step instead, for example r'[.;]\\s'."
            )
        if is_empty:
            raise TraceError(
                f"The splitter pattern {source!r} matches the empty string, so every character would begin "
                "a step; use + instead of *."
            )
        if max_match < 1:
            raise TraceError(f"max_match must be at least 1, got {max_match}.")
        self._unfed = _RegexStream(ends, max_match)


class _CallableStream(StepStream):
    def __init__(self, begins_step: Callable[[str], bool]) -> None:
        self.begins_step, self.text, self.due = begins_step, "", False

    def feed(self, char: str) -> bool:
        due = self.due or bool(self.text and self.begins_step(self.text + char))
        begins = due and char not in WHITE_SPACE
        self.text, self.due = (char if begins else self.text + char), due and not begins
        return begins


class CallableSplitter(_Splitter):
    """A function decides.

    Args:
        begins_step: Gets the text of the current step so far, its last character being the new one; returns
            whether that character begins a new step. A yes on white space is kept for the next other
            character. It must be a pure function. It is called once per character, so a step of n characters
            costs n calls on texts up to n.

    Raises:
        TraceError: `begins_step` is not callable.
    """

    def __init__(self, begins_step: Callable[[str], bool]) -> None:
        """Refuse what cannot be called."""
        if not callable(begins_step):
            raise TraceError(f"CallableSplitter needs a function from str to bool, got {begins_step!r}.")
        self._unfed = _CallableStream(begins_step)


class _MinimumLengthStream(StepStream):
    def __init__(self, stream: StepStream, min_chars: int) -> None:
        self.inner, self.min_chars, self.length = stream, min_chars, 0

    def feed(self, char: str) -> bool:
        begins = self.inner.feed(char) and self.length >= self.min_chars
        self.length = 1 if begins else self.length + 1
        return begins

    def clone(self) -> "_MinimumLengthStream":
        twin = copy(self)
        twin.inner = self.inner.clone()
        return twin


class MinimumLength(_Splitter):
    """Merge a short piece into the step that follows it.

    A boundary is passed over while the current step has fewer than `min_chars` characters, its trailing white
    space included. A short last piece stays a step: when it began, nobody could know that it would be short.

    Args:
        splitter: The splitter whose boundaries are thinned, or its name.
        min_chars: Fewest characters of a step, the last one excepted.

    Raises:
        TraceError: `min_chars` is below 1, or the splitter is unknown.
    """

    def __init__(self, splitter: "StepSplitter | str", min_chars: int) -> None:
        """Refuse a minimum that could change nothing."""
        if min_chars < 1:
            raise TraceError(
                f"min_chars must be at least 1, got {min_chars}; leave the wrapper out for no minimum."
            )
        self._unfed = _MinimumLengthStream(resolve_splitter(splitter).stream(), min_chars)


_NAMED = {
    "paragraph": ParagraphSplitter,
    "line": LineSplitter,
    "sentence": SentenceSplitter,
    "whole": WholeSplitter,
}


def resolve_splitter(splitter: Any, default: str = "paragraph") -> StepSplitter:
    """The splitter meant by a name, a splitter or None.

    Args:
        splitter: "paragraph", "line", "sentence", "whole", any `StepSplitter`, or None.
        default: What None stands for.

    Raises:
        TraceError: Neither a known name nor a splitter.
    """
    if splitter is None:
        splitter = default
    if isinstance(splitter, str):
        if splitter not in _NAMED:
            raise TraceError(
                f"Unknown splitter {splitter!r}; known names are {', '.join(_NAMED)}. Pass one of them or a "
                "splitter such as RegexSplitter(r'[.;]\\s')."
            )
        return _NAMED[splitter]()
    if isinstance(splitter, type) or not isinstance(splitter, StepSplitter):
        raise TraceError(
            f"A splitter must be a name ({', '.join(_NAMED)}) or an object with stream() and split(), "
            f"got {splitter!r}. Wrap a function in CallableSplitter."
        )
    return splitter
