r"""The token-level stream: for each token, as it comes, its segment and step.

A trace is this stream run over all its tokens; StepFlow is this stream run while the model decodes. For each
token:

1. Its characters go through the scanner (which segment?) and, within question, thinking and summary, through
   the segment's splitter (does a step begin?). That cuts the text into pieces: steps and stretches of
   TEMPLATE.
2. The token belongs to the piece that holds its first character. A piece that begins inside a token therefore
   begins, for tokens, with the next one; a step that owns no token merges into what precedes it.
3. A token that completes no character (a fragment of a split one) is placed at once, as if the character were
   U+FFFD: white space is never split over tokens, so only the character's identity is missing, not its kind.
4. A token whose first character may still turn out to be a marker's ("<" of "</think>" in several tokens)
   carries a provisional label, that of the token before it, and never begins a step. If the marker completes,
   the token becomes TEMPLATE; if not, the provisional label is final, and a step that was due begins with the
   token that settled it. So it does where the marker is the beginning of the answer: of `\boxed{` in three
   tokens, the first two stay with the thinking.

So a label depends on no later token, except that rule 4 says TEMPLATE late; `TokenLabel` reports both
moments. State is O(1) (one marker length of waiting tokens), time O(marker length) per character, amortised.
"""

from copy import copy
from typing import Any, NamedTuple

from stepflow_tl.trace.decoding import TextPiece, TokenDecoder
from stepflow_tl.trace.formats.chat_template import resolve_format
from stepflow_tl.trace.formats.scanner import FormatScanner, Released, Scanner
from stepflow_tl.trace.splitting.splitters import StepSplitter, StepStream, resolve_splitter
from stepflow_tl.trace.steps import WHITE_SPACE, Segment


class TokenLabel(NamedTuple):
    """What is known of a token when it arrives, and what it settles about earlier ones.

    Attributes:
        token: Index of the token in the stream.
        segment: Its segment, as known now.
        step: Its step, counted over the whole stream; -1 on TEMPLATE.
        begins_step: Whether it is the first token of that step.
        is_final: False while the token may still become TEMPLATE.
        settled: Half-open range of earlier tokens whose label has become final, as it was, with this token.
        relabelled: Half-open range of earlier tokens that have become TEMPLATE with this token.
    """

    token: int
    segment: Segment
    step: int
    begins_step: bool
    is_final: bool
    settled: tuple[int, int] = (0, 0)
    relabelled: tuple[int, int] = (0, 0)


class PieceStart(NamedTuple):
    """A stretch of text in the tracker's log: first character, segment, and step once it has one."""

    char: int
    segment: Segment
    step: int | None


class _Waiting(NamedTuple):
    token: int
    char: int  # the label is settled when this character is


class StepTracker:
    """Segment and step of each token of one stream.

    Args:
        scanner: Says which segment a character belongs to (`FormatScanner` or `SpanScanner`).
        splitter: Cuts thinking, and the summary unless that has its own.
        summary_splitter: Cuts the summary; default: like thinking.
        question_splitter: Cuts the question; default: one step.
        keep_log: Record where every piece of text starts in `log` (O(number of pieces) memory; not cloned).

    Raises:
        TraceError: A splitter is unknown.
    """

    def __init__(
        self,
        scanner: Scanner,
        splitter: StepSplitter | str | None = None,
        summary_splitter: StepSplitter | str | None = None,
        question_splitter: StepSplitter | str | None = None,
        *,
        keep_log: bool = False,
    ) -> None:
        """Start at the beginning of a stream."""
        thinking = resolve_splitter(splitter)
        self.scanner = scanner
        self.splitters = {
            Segment.QUESTION: resolve_splitter(question_splitter, default="whole"),
            Segment.THINKING: thinking,
            Segment.SUMMARY: resolve_splitter(summary_splitter) if summary_splitter is not None else thinking,
        }
        self.n_tokens = self.n_chars = self.n_steps = 0
        self.log: list[PieceStart] | None = [PieceStart(0, Segment.TEMPLATE, -1)] if keep_log else None
        self._n_released = 0
        self._piece: tuple[Segment, int | None] = (Segment.TEMPLATE, -1)  # None: owns no token yet
        self._label: tuple[Segment, int] = (Segment.TEMPLATE, -1)  # of the last token
        self._stream: StepStream | None = None
        self._run = -1
        self._run_has_begun = False
        self._placed_early = -1  # the character whose piece a fragment has decided
        self._waiting: tuple[_Waiting, ...] = ()
        self._first = -1  # the first character of the current token, until it is released
        self._claimed: tuple[Segment, int, bool] | None = None
        self._changed: dict[str, list[int]] = {}

    def clone(self) -> "StepTracker":
        """An independent copy without the log: O(1)."""
        twin = copy(self)
        twin.scanner = self.scanner.clone()
        twin._stream = self._stream.clone() if self._stream is not None else None
        twin.log = None
        return twin

    def push(self, piece: TextPiece | str) -> TokenLabel:
        """Take the next token's text; say what is known of it now. A `piece` of type str is no fragment."""
        text, is_fragment = (piece, False) if isinstance(piece, str) else piece
        token, self.n_tokens = self.n_tokens, self.n_tokens + 1
        self._changed = {"settled": [], "relabelled": []}
        self._claimed = None
        if text:
            self._first = self.n_chars
            for char in text:
                self.n_chars += 1
                for released in self.scanner.feed(char):
                    self._place(released)
            waits_for = self._first if self._claimed is None else None
        else:
            waits_for = self._push_empty(is_fragment)
        return self._report(token, waits_for)

    def finish(self, rest: str = "") -> tuple[int, int]:
        """Learn that the stream ends, with the `rest` of the last token that the decoder still held.

        Returns the half-open range of tokens whose provisional label is final with this.
        """
        self._changed = {"settled": [], "relabelled": []}
        self._first = -1
        self.n_chars += len(rest)
        released = [item for char in rest for item in self.scanner.feed(char)]
        for item in released + self.scanner.finish():
            self._place(item)
        return self._range("settled")

    def _push_empty(self, is_fragment: bool) -> int | None:
        """Place a token without characters; return the character it has to wait for, if any."""
        self._first = -1
        if is_fragment:
            for released in self.scanner.feed_fragment():
                self._place(released)
            if self.scanner.held:
                return self.n_chars
            if self._placed_early != self.n_chars:
                self._placed_early = self.n_chars
                self._enter(self.n_chars, *self.scanner.place, char=None)
            self._claim()
            return None
        if self._waiting:  # no text at all: it goes where the token before it goes
            return self._waiting[-1].char
        self._claimed = (self._label[0], self._label[1], False)
        return None

    def _place(self, released: Released) -> None:
        index, self._n_released = self._n_released, self._n_released + 1
        if index == self._placed_early:
            self._placed_early = -1
            if released.segment != Segment.TEMPLATE and self._stream is not None:
                self._stream.feed(released.char)
        else:
            self._enter(index, released.segment, released.run, released.char)
        while self._waiting and self._waiting[0].char == index:
            waited, self._waiting = self._waiting[0], self._waiting[1:]
            is_template = released.segment == Segment.TEMPLATE
            self._changed["relabelled" if is_template else "settled"].append(waited.token)
        if index == self._first:
            self._claim()

    def _enter(self, index: int, segment: Segment, run: int, char: str | None) -> None:
        """Begin a piece at this character if one begins; `char` is None where only its kind is known."""
        if segment == Segment.TEMPLATE:
            if self._piece[0] != Segment.TEMPLATE:
                self._begin_piece(index, segment, -1)
            return
        if run != self._run:
            self._run, self._run_has_begun = run, False
            self._stream = self.splitters[segment].stream()
        assert self._stream is not None
        is_space = char is not None and char in WHITE_SPACE
        if not self._run_has_begun:
            if is_space:
                return  # white space before a segment's first step belongs to the piece before it
            self._run_has_begun = True
            if char is not None:
                self._stream.feed(char)
            self._begin_piece(index, segment, None)
            return
        begins = self._stream.clone().feed("\ufffd") if char is None else self._stream.feed(char)
        if begins and not is_space:
            self._begin_piece(index, segment, None)

    def _begin_piece(self, index: int, segment: Segment, step: int | None) -> None:
        self._piece = (segment, step)
        if self.log is not None:
            self.log.append(PieceStart(index, segment, step))

    def _claim(self) -> None:
        """Give the current token to the current piece, which becomes a step if this is its first token."""
        segment, step = self._piece
        begins = step is None
        if step is None:
            step, self.n_steps = self.n_steps, self.n_steps + 1
            self._piece = (segment, step)
            if self.log is not None:
                self.log[-1] = self.log[-1]._replace(step=step)
        self._claimed, self._first = (segment, step, begins), -1

    def _report(self, token: int, waits_for: int | None) -> TokenLabel:
        settled, relabelled = self._range("settled"), self._range("relabelled")
        if relabelled[1] == token and token:
            self._label = (Segment.TEMPLATE, -1)
        if waits_for is not None:
            if self.scanner.place[0] == Segment.TEMPLATE:
                self._label = (Segment.TEMPLATE, -1)
            if self._label[0] != Segment.TEMPLATE:
                self._waiting += (_Waiting(token, waits_for),)
                return TokenLabel(token, *self._label, False, False, settled, relabelled)
            self._claimed = (self._label[0], self._label[1], False)  # TEMPLATE whichever way it turns out
        assert self._claimed is not None
        segment, step, begins = self._claimed
        self._label = (segment, step)
        return TokenLabel(token, segment, step, begins, True, settled, relabelled)

    def _range(self, kind: str) -> tuple[int, int]:
        tokens: list[Any] = self._changed[kind]
        return (tokens[0], tokens[-1] + 1) if tokens else (0, 0)


class TokenTracker:
    """Segment and step of each token id of one stream: decoder, scanner and splitters behind one `push`.

    This is what a generation loop holds: one tracker per row, fed each id as it enters the model. It gives,
    token by token, what `ReasoningTrace.from_tokens` says of the whole sequence afterwards; `tokenizer`,
    `format`, `splitter`, `summary_splitter` and `question_splitter` are those of that function.

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
    ) -> None:
        """Start at the beginning of a stream."""
        scanner = FormatScanner(resolve_format(tokenizer, format))
        self.decoder = TokenDecoder(tokenizer)
        self.steps = StepTracker(scanner, splitter, summary_splitter, question_splitter)

    def push(self, token_id: int) -> TokenLabel:
        """Take the next `token_id`; say what is known of that token now."""
        return self.steps.push(self.decoder.push(token_id))

    def finish(self) -> tuple[int, int]:
        """Learn that the stream ends; return the tokens whose provisional label is final with this."""
        return self.steps.finish(self.decoder.finish())

    def clone(self) -> "TokenTracker":
        """An independent copy, O(1)."""
        twin = copy(self)
        twin.decoder, twin.steps = self.decoder.clone(), self.steps.clone()
        return twin
