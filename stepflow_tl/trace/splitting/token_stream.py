"""The step tracker for token ids: decoder, scanner and splitters behind one `push`.

This is what a generation loop holds: one tracker a row, fed each id as it enters the model. It gives, token
by token, what `ReasoningTrace.from_tokens` says of the whole sequence afterwards.
"""

from copy import copy
from typing import Any

from stepflow_tl.trace.decoding import TokenDecoder
from stepflow_tl.trace.formats.detection import resolve_format
from stepflow_tl.trace.formats.scanner import FormatScanner, Scanner
from stepflow_tl.trace.splitting.splitters import StepSplitter
from stepflow_tl.trace.splitting.stream import StepTracker, TokenLabel


class TokenTracker:
    """Segment and step of each token id of one stream.

    Args:
        tokenizer: A transformers tokenizer.
        format: Name, `ReasoningFormat`, or "auto" for the tokenizer's own.
        splitter: Cuts thinking, and the summary unless that has its own.
        summary_splitter: Cuts the summary; default: like thinking.
        question_splitter: Cuts the question; default: one step.
        scanner: In place of the format's, for instance a `SpanScanner` over a prompt whose parts are known.

    Raises:
        FormatError: The format is unknown.
        TraceError: A splitter is unknown.
    """

    def __init__(
        self,
        tokenizer: Any,
        format: Any = "auto",
        splitter: StepSplitter | str | None = None,
        summary_splitter: StepSplitter | str | None = None,
        question_splitter: StepSplitter | str | None = None,
        *,
        scanner: Scanner | None = None,
    ) -> None:
        """Start at the beginning of a stream."""
        if scanner is None:
            scanner = FormatScanner(resolve_format(tokenizer, format))
        self.decoder = TokenDecoder(tokenizer)
        self.steps = StepTracker(scanner, splitter, summary_splitter, question_splitter)

    def push(self, token_id: int) -> TokenLabel:
        """Take the next token id; say what is known of that token now."""
        return self.steps.push(self.decoder.push(token_id))

    def finish(self) -> tuple[int, int]:
        """Learn that the stream ends; return the tokens whose provisional label is final with this."""
        return self.steps.finish(self.decoder.finish())

    def clone(self) -> "TokenTracker":
        """An independent copy, O(1)."""
        twin = copy(self)
        twin.decoder, twin.steps = self.decoder.clone(), self.steps.clone()
        return twin
