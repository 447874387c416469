r"""Where a model family puts question, thinking and answer: one table of literal markers.

A `ReasoningFormat` is data. It names the literal strings ("markers") that move a transcript from one place to
the next; `scanner` runs them as a state machine. The places are: before any turn, inside a user turn, inside
an assistant turn (thinking or answer), inside any other turn (system, tool), between turns. Everything
outside user and assistant turns is TEMPLATE, and so is every marker.

Which markers count where:

1. `user_turns`, `assistant_turns`, `other_turns` and `turn_ends` count everywhere.
2. `thinking_starts` and `thinking_ends` count inside assistant turns only (or as the very first thing in a
   text, so that a bare response can be read), because questions and system prompts talk *about* them: the
   system prompts of Phi-4-reasoning, SmolLM3 and Magistral all do.
3. With `content_start` (gpt-oss), turn and channel markers only announce what comes; the content opens at
   that marker.
4. `answer_begins_with` counts inside thinking only. It ends thinking as `thinking_ends` does, but it is not
   TEMPLATE: it is the beginning of the answer, which could not be read without it (`\boxed{18}`).

Where one marker is the beginning of another (`<|im_start|>` and `<|im_start|>user`), the longer one wins when
it completes; so `other_turns` may hold the bare turn marker and catch every role without an entry of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from stepflow_tl.errors import FormatError
from stepflow_tl.trace.steps import WHITE_SPACE, Segment

_JSON_KINDS = {tuple: "a list of strings", Segment: '"THINKING" or "SUMMARY"'}


@dataclass(frozen=True)
class ReasoningFormat:
    r"""The markers of one model family; see the module for what each one does.

    Args:
        name: Key in the table.
        user_turns: Markers after which the user's text, a QUESTION, follows.
        assistant_turns: Markers after which the model's text follows.
        other_turns: Markers of turns that are all TEMPLATE (system prompt, tool results).
        turn_ends: Markers that close any turn.
        thinking_starts: Markers that open thinking within an assistant turn.
        thinking_ends: Markers that close thinking and open the answer.
        answer_begins_with: Markers that close thinking and are themselves the first text of the answer.
        answer_starts: Markers that announce the answer (gpt-oss channels); elsewhere `thinking_ends` does it.
        content_start: Marker at which an announced turn's text begins; empty when it begins at once.
        fillers: Literal special tokens that are TEMPLATE wherever they stand and change nothing (BOS, end of
            text).
        opens_as: What an assistant turn is until a marker says otherwise: THINKING or SUMMARY.
        thinking_required: Whether a full transcript must hold a thinking marker.
        thinking_open: Text that `ReasoningTrace.from_parts` writes before the thinking.
        thinking_close: Text written between thinking and answer.
        answer_open: Text written before an answer that follows no thinking, when `marks_empty_thinking` is
            false.
        turn_close: Text written after a finished answer.
        marks_empty_thinking: Whether empty thinking is written out (`<think>\n\n</think>`) or left out.
        detected_by: Strings that must all occur in a chat template (or vocabulary) for detection.
        not_with: Strings of which none may occur.

    Raises:
        FormatError: A marker is empty or begins with white space or outside ASCII, or `opens_as` is not a
            segment of the response.
    """

    name: str
    user_turns: tuple[str, ...] = ()
    assistant_turns: tuple[str, ...] = ()
    other_turns: tuple[str, ...] = ()
    turn_ends: tuple[str, ...] = ()
    thinking_starts: tuple[str, ...] = ()
    thinking_ends: tuple[str, ...] = ()
    answer_begins_with: tuple[str, ...] = ()
    answer_starts: tuple[str, ...] = ()
    content_start: str = ""
    fillers: tuple[str, ...] = ()
    opens_as: Segment = Segment.SUMMARY
    thinking_required: bool = False
    thinking_open: str = ""
    thinking_close: str = ""
    answer_open: str = ""
    turn_close: str = ""
    marks_empty_thinking: bool = True
    detected_by: tuple[str, ...] = ()
    not_with: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse markers that no causal scanner could follow."""
        if not self.name:
            raise FormatError("A reasoning format needs a name; got an empty string. Pass name='my-model'.")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple) and not isinstance(value, tuple):
                raise FormatError(
                    f"{field.name} of format {self.name!r} must be a tuple of strings, got {value!r}; write "
                    f"({value!r},)."
                )
        for marker in self.markers:
            # A marker that began outside ASCII would leave open, at the first byte of a split character,
            # whether a step begins there; one that began with white space would take it from the step before
            # it.
            if not marker or marker[0] in WHITE_SPACE or ord(marker[0]) > 127:
                raise FormatError(
                    f"Marker {marker!r} of format {self.name!r} must begin with an ASCII character that is "
                    "not white space; leave white space out of it (after a marker it is TEMPLATE anyway)."
                )
        if self.opens_as not in (Segment.THINKING, Segment.SUMMARY):
            raise FormatError(
                f"opens_as of format {self.name!r} must be Segment.THINKING or Segment.SUMMARY, got "
                f"{self.opens_as!r}."
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any], base: "ReasoningFormat | None" = None) -> "ReasoningFormat":
        """A format from plain data: markers as lists of strings, `opens_as` as "THINKING" or "SUMMARY".

        Args:
            data: Fields by name, `name` among them.
            base: The format that the fields left out come from; without one they have their defaults.

        Raises:
            FormatError: A field is unknown or of the wrong type, or the format is refused.
        """
        given = dict(data)
        for field in fields(cls):
            kind = str if field.name == "name" else type(field.default)
            value = given.get(field.name, field.default)
            if kind is Segment and value in (Segment.THINKING.name, Segment.SUMMARY.name):
                given[field.name] = Segment[value]
            elif kind is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
                given[field.name] = tuple(value)
            elif field.name in given and type(value) is not (None if kind in _JSON_KINDS else kind):
                expected = _JSON_KINDS.get(kind, "true or false" if kind is bool else "a string")
                raise FormatError(f"{field.name} of a format is {value!r}: expected {expected}.")
        unknown = sorted(set(given) - {field.name for field in fields(cls)})
        if unknown or "name" not in given:
            known = ", ".join(field.name for field in fields(cls))
            wrong = f"a format has no field {', '.join(unknown)}" if unknown else "the format has no name"
            raise FormatError(f"{wrong}; its fields are {known}.")
        return cls(**given) if base is None else replace(base, **given)

    @property
    def markers(self) -> tuple[str, ...]:
        """Every marker of the format."""
        content = (self.content_start,) if self.content_start else ()
        turns = self.user_turns + self.assistant_turns + self.other_turns + self.turn_ends
        thinking = self.thinking_starts + self.thinking_ends + self.answer_begins_with
        return turns + thinking + self.answer_starts + content + self.fillers
