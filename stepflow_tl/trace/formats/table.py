"""The table of formats: the built-in ones and those that a user registers."""

from stepflow_tl.errors import FormatError
from stepflow_tl.trace.formats.families import BUILT_IN
from stepflow_tl.trace.formats.reasoning_format import ReasoningFormat

_TABLE: dict[str, ReasoningFormat] = {entry.name: entry for entry in BUILT_IN}


def known_formats() -> tuple[str, ...]:
    """Names of all formats, built-in ones first, in the order they were registered."""
    return tuple(_TABLE)


def get_format(name: str) -> ReasoningFormat:
    """The format of that name.

    Raises:
        FormatError: No format has that name.
    """
    if name not in _TABLE:
        raise FormatError(
            f"Unknown reasoning format {name!r}; known formats are {', '.join(_TABLE)}. "
            "Pass one of them, or add your own with stepflow_tl.trace.formats.register_format."
        )
    return _TABLE[name]


def register_format(entry: ReasoningFormat) -> ReasoningFormat:
    """Add a format to the table; detection tries formats added here before the built-in ones.

    Raises:
        FormatError: The name is taken.
    """
    if entry.name in _TABLE:
        raise FormatError(
            f"Reasoning format {entry.name!r} exists already; choose another name. Known: "
            f"{', '.join(_TABLE)}."
        )
    _TABLE[entry.name] = entry
    return entry


def formats_by_priority() -> tuple[ReasoningFormat, ...]:
    """All formats in the order detection tries them: the user's latest first, then the built-in ones."""
    built_in = [entry for entry in BUILT_IN if _TABLE.get(entry.name) is entry]
    added = [entry for entry in _TABLE.values() if entry not in built_in]
    return tuple(reversed(added)) + tuple(built_in)
