"""The marker scanner: characters in, the segment of each character out, as soon as it is certain.

One character at a time:

1. The character joins the held text. Held text is what may still grow into an active marker.
2. While no active marker begins with the held text, its first character is released as content of the
   current place, and the rest is looked at again.
3. Held text that equals a marker is released as TEMPLATE and moves the scanner to the marker's place (one
   that is the beginning of the answer moves it first, and is released there). If a longer marker begins with
   this one the scanner keeps watching for it; when it completes, its place wins.

So each character is released exactly once, in order, at most one marker length late, and its segment depends
on no character after its release. Time per character and memory: O(longest marker). `SpanScanner` is the same
interface for text whose segments are known beforehand.
"""

from collections.abc import Iterable
from copy import copy
from functools import lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

from stepflow_tl.errors import TraceError
from stepflow_tl.trace.formats.reasoning_format import ReasoningFormat
from stepflow_tl.trace.steps import WHITE_SPACE, Segment


class Released(NamedTuple):
    """A character whose segment is now certain. `run` counts the stretches between markers."""

    char: str
    segment: Segment
    run: int


@runtime_checkable
class Scanner(Protocol):
    """What the step tracker asks of a scanner; as it stands here, one that never holds a character back."""

    def feed(self, char: str) -> list[Released]:
        """Take one character, `char`; return the characters released by it, in text order."""
        ...

    def feed_fragment(self) -> list[Released]:
        """Learn that the next character is not ASCII; return the characters this releases."""
        return []

    def finish(self) -> list[Released]:
        """Learn that the text ends here; return whatever is still held."""
        return []

    @property
    def held(self) -> str:
        """The characters taken but not released."""
        return ""

    @property
    def place(self) -> tuple[Segment, int]:
        """Segment and run that the next character has unless it turns out to be a marker's."""
        ...

    def clone(self) -> "Scanner":
        """An independent copy; a shallow one, so all state must be immutable values."""
        return copy(self)


_USER, _ASSISTANT, _OTHER, _END, _THINK, _ANSWER, _ANSWER_TEXT, _CONTENT, _FILLER = range(9)


@lru_cache(maxsize=64)
def _actions(entry: ReasoningFormat) -> tuple[tuple[str, int], ...]:
    groups = (
        (entry.user_turns, _USER),
        (entry.assistant_turns, _ASSISTANT),
        (entry.other_turns, _OTHER),
        (entry.turn_ends, _END),
        (entry.thinking_starts, _THINK),
        (entry.thinking_ends + entry.answer_starts, _ANSWER),
        (entry.answer_begins_with, _ANSWER_TEXT),
        ((entry.content_start,) if entry.content_start else (), _CONTENT),
        (entry.fillers, _FILLER),
    )
    actions: dict[str, int] = {}
    for markers, action in groups:
        for marker in markers:
            actions.setdefault(marker, action)
    return tuple(actions.items())


@lru_cache(maxsize=64)
def _first_characters(entry: ReasoningFormat) -> frozenset[str]:
    return frozenset(marker[0] for marker in entry.markers)


class FormatScanner(Scanner):
    """Finite-state machine over the markers of one `ReasoningFormat`.

    Args:
        entry: The format.
    """

    def __init__(self, entry: ReasoningFormat) -> None:
        """Start before any turn."""
        self.entry = entry
        self._segment = Segment.TEMPLATE
        self._run = 0
        self._held = ""
        self._spent = 0  # leading characters of the held text that were released with a shorter marker
        self._at_start = True  # only fillers and white space so far
        self._in_assistant = False
        self._in_header = False  # a turn is announced, its content has not opened (gpt-oss)
        self._announced = Segment.TEMPLATE
        self._run_is_empty = True  # no content in this run yet, white space apart
        self._turn_has_answer = False  # thinking was closed in this turn
        #: Facts about the whole text, for the check that a format's demands are met.
        self.saw_thinking_marker = False
        self.stray_thinking_end = False
        if not entry.assistant_turns:  # a format without turns is one long response
            self._in_assistant = True
            self._segment = entry.opens_as

    @property
    def held(self) -> str:
        """The characters taken but not released."""
        return self._held[self._spent :]

    @property
    def place(self) -> tuple[Segment, int]:
        """Segment and run that the next character has unless it turns out to be a marker's."""
        return self._segment, self._run

    def feed(self, char: str) -> list[Released]:
        """Take one character, `char`; return the characters released by it, in text order."""
        if not self._held and char not in _first_characters(self.entry):  # the common case, made fast
            if char not in WHITE_SPACE:
                self._run_is_empty = self._at_start = False
            return [Released(char, self._segment, self._run)]
        released: list[Released] = []
        self._held += char
        while self._held:
            missing = self._missing()
            if missing:
                complete = [action for rest, action in missing if not rest]
                if complete and self.held:
                    if complete[0] == _ANSWER_TEXT:
                        self._apply(complete[0])
                        released += [Released(c, *self.place) for c in self.held]
                    else:
                        released += [Released(c, Segment.TEMPLATE, self._run) for c in self.held]
                        self._apply(complete[0])
                    self._spent = len(self._held)
                    # Only longer forms of this marker may follow, all of them turn markers or fillers.
                    if not any(rest for rest, _ in self._missing()):
                        self._held, self._spent = "", 0
                break
            self._drop_first(released)
        return released

    def feed_fragment(self) -> list[Released]:
        """Learn that the next character is not ASCII; return the characters this releases."""
        released: list[Released] = []
        while self._held and not any(rest and ord(rest[0]) > 127 for rest, _ in self._missing()):
            self._drop_first(released)
        return released

    def finish(self) -> list[Released]:
        """Learn that the text ends here; return whatever is still held."""
        released: list[Released] = []
        while self._held:
            self._drop_first(released)
        return released

    def _drop_first(self, released: list[Released]) -> None:
        if self._spent:  # a shorter marker was taken already; what follows it starts afresh
            self._held, self._spent = self._held[self._spent :], 0
            return
        char, self._held = self._held[0], self._held[1:]
        if char not in WHITE_SPACE:
            self._run_is_empty = self._at_start = False
        released.append(Released(char, self._segment, self._run))

    def _missing(self) -> list[tuple[str, int]]:
        """What the held text lacks of each active marker that begins with it, and the marker's action."""
        held = self._held
        return [
            (marker[len(held) :], action)
            for marker, action in _actions(self.entry)
            if marker.startswith(held) and self._is_active(action)
        ]

    def _is_active(self, action: int) -> bool:
        if action == _CONTENT:
            return self._in_header
        if action == _THINK:
            if self._at_start:
                return True
            if self.entry.content_start:
                return self._in_header and self._in_assistant
            # In thinking that has begun, or in an answer after thinking, "<think>" is only talked about.
            in_first_answer = self._segment == Segment.SUMMARY and not self._turn_has_answer
            return self._in_assistant and (self._run_is_empty or in_first_answer)
        if action == _ANSWER_TEXT:
            return self._in_assistant and self._segment == Segment.THINKING
        if action == _ANSWER:
            if self.entry.content_start:
                return self._at_start or (self._in_header and self._in_assistant)
            # In an answer after thinking "</think>" is only talked about; in one without, it is out of place.
            is_expected = self._segment == Segment.THINKING or self._run_is_empty
            return self._in_assistant and (is_expected or not self._turn_has_answer)
        return True

    def _apply(self, action: int) -> None:
        entry = self.entry
        if action == _FILLER:
            self._move(self._segment)
            return
        self._at_start = False
        if action == _CONTENT:
            self._in_header = False
            self._move(self._announced)
        elif action in (_USER, _ASSISTANT, _OTHER):
            self._in_assistant = action == _ASSISTANT
            self._turn_has_answer = False
            opens = {_USER: Segment.QUESTION, _ASSISTANT: entry.opens_as, _OTHER: Segment.TEMPLATE}[action]
            self._open(opens)
        elif action == _END:
            self._in_assistant = self._in_header = False
            self._move(Segment.TEMPLATE)
        elif action == _THINK:
            self.saw_thinking_marker = self._in_assistant = True
            self._open(Segment.THINKING)
        elif action == _ANSWER_TEXT:
            self.saw_thinking_marker = self._turn_has_answer = True
            self._move(Segment.SUMMARY)
            self._run_is_empty = False
        else:
            is_expected = self._segment == Segment.THINKING or self._run_is_empty or entry.content_start
            self.stray_thinking_end |= not is_expected
            self.saw_thinking_marker = self._turn_has_answer = self._in_assistant = True
            self._open(Segment.SUMMARY)

    def _open(self, segment: Segment) -> None:
        if self.entry.content_start:
            self._announced, self._in_header = segment, True
            self._move(Segment.TEMPLATE)
        else:
            self._move(segment)

    def _move(self, segment: Segment) -> None:
        self._segment = segment
        self._run += 1
        self._run_is_empty = True


class SpanScanner(Scanner):
    """Segments known beforehand: character spans instead of markers, so hostile text is never parsed.

    Args:
        spans: (end, segment) in text order, tiling the text; characters past the last span are TEMPLATE.

    Raises:
        TraceError: The ends decrease.
    """

    def __init__(self, spans: Iterable[tuple[int, Segment]]) -> None:
        """Start at the first character."""
        self.spans = tuple((end, segment) for end, segment in spans)
        if any(a[0] > b[0] for a, b in zip(self.spans, self.spans[1:], strict=False)):
            raise TraceError(f"The ends of segment spans must not decrease, got {self.spans}.")
        self._position = 0
        self._run = 0

    @property
    def place(self) -> tuple[Segment, int]:
        """Segment and run of the next character."""
        while self._run < len(self.spans) and self.spans[self._run][0] <= self._position:
            self._run += 1
        segment = self.spans[self._run][1] if self._run < len(self.spans) else Segment.TEMPLATE
        return segment, self._run

    def feed(self, char: str) -> list[Released]:
        """Release the character `char` at once."""
        segment, run = self.place
        self._position += 1
        return [Released(char, segment, run)]
