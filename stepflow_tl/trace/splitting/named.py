"""Splitters by name, so that a command line or a config can say "sentence"."""

from typing import Any

from stepflow_tl.errors import TraceError
from stepflow_tl.trace.splitting.sentences import SentenceSplitter
from stepflow_tl.trace.splitting.splitters import LineSplitter, ParagraphSplitter, StepSplitter, WholeSplitter

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
