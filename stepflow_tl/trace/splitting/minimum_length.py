"""A minimum step length: short pieces merge into the step that follows."""

from copy import copy

from stepflow_tl.errors import TraceError
from stepflow_tl.trace.splitting.named import resolve_splitter
from stepflow_tl.trace.splitting.splitters import CopyableStream, Splitter, StepSplitter, StepStream


class _MinimumLengthStream(CopyableStream):
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


class MinimumLength(Splitter):
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
        self.splitter, self.min_chars = resolve_splitter(splitter), min_chars

    def stream(self) -> StepStream:
        """A twin that counts the current step's characters around the inner twin."""
        return _MinimumLengthStream(self.splitter.stream(), self.min_chars)
