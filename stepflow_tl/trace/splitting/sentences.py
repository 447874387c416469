r"""The sentence splitter: a small causal state machine over characters.

A sentence ends at `.`, `!`, `?` or an ellipsis, any closing quotes and brackets after it, and white space; at
a full-width stop (`。！？`), white space or not; and at a blank line. Whether it has ended is decided at the
next character that is not white space, so "3." waits for what follows. It has **not** ended when

1. no white space follows an ASCII stop (decimals, file names, addresses),
2. a lower-case ASCII letter follows `!`, `?` or an ellipsis ("Really?" he said), or an abbreviation that may
   also end a sentence ("etc."),
3. the word before the stop is an abbreviation ("e.g.", "Dr."), a dotted one ("U.S."), one that stands before
   numbers and a digit follows ("No. 5"), or an initial: one capital letter after a capitalised word or at the
   sentence's start ("Donald E. Knuth"),
4. the line is so far only an enumerator ("3.", "- a.", "**Step 2.**"), or the sentence only a number,
5. it stands inside LaTeX or code; `protected` says how those are told from money.

Of a character outside ASCII the decision reads only whether it is a stop or a closing bracket. Where a
tokenizer splits such a bracket into bytes, that is not known in time, and it begins the next sentence.
"""

import re

from stepflow_tl.trace.splitting.protected import ProtectedStretches
from stepflow_tl.trace.splitting.splitters import CopyableStream, Splitter, StepStream
from stepflow_tl.trace.steps import WHITE_SPACE

_WIDE_STOPS = "。！？"
_STOPS = ".!?…" + _WIDE_STOPS
_CLOSERS = "\"')]}*_»”’」』）】》"
_NEVER_ENDS = frozenset(
    "eg ie dr mr mrs ms prof st sr jr fig figs eq eqs eqn vs cf viz resp approx ca thm lem prop cor def "
    "gov capt lt col sgt rev hon".split()
)
_MAY_END = frozenset("etc al inc ltd co corp dept est a.m p.m ph.d b.c a.d".split())
_BEFORE_NUMBER = frozenset("no nos p pp art par ex vol chap ch sec".split())
_DOTTED = re.compile(r"([A-Za-z]\.)+[A-Za-z]")
_BULLETS = WHITE_SPACE + "*_#>+-("
_ENUMERATOR = re.compile(
    r"((step|case|part|problem|question|example|option|theorem|lemma|claim)[ \t])?"
    r"(\d{1,3}|[a-z]|[ivx]{1,4})[)*_]*",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d{1,3}[)*_]*")
_HEAD = 32  # characters of a line or sentence that are remembered: enough for any enumerator


class _SentenceStream(CopyableStream):
    def __init__(self) -> None:
        self.protected = ProtectedStretches()
        self.line_head = self.sentence_head = ""
        self.word = ""  # letters, digits and inner stops up to here
        self.word_before = (
            ""  # the word, or the last sign, before the last white space; empty at a sentence's start
        )
        self.last = ""  # the last character that is not white space
        self.stop = ""  # a stop after which the sentence may be over
        self.stop_word = ("", "")  # `word` and `word_before` at that stop
        self.follows_enumerator = False
        self.is_spaced = False  # white space has followed the stop
        self.newlines = 0  # in the white space that ends here

    def clone(self) -> "_SentenceStream":
        twin = super().clone()
        twin.protected = self.protected.clone()
        return twin

    def feed(self, char: str) -> bool:
        was_inside = self.protected.inside
        self.protected.feed(char)
        if char in WHITE_SPACE:
            self._take_space(char)
            return False
        begins = not was_inside and self._is_over(char)
        if begins:
            self.sentence_head = self.word = self.word_before = self.stop = ""
        self.newlines = 0
        if was_inside or self.protected.inside:
            self.stop = self.word = ""
        else:
            self._take(char)
        self.last = char
        self.line_head = (self.line_head + char)[:_HEAD]
        self.sentence_head = (self.sentence_head + char)[:_HEAD]
        return begins

    def _take_space(self, char: str) -> None:
        if self.stop:
            self.is_spaced = True
        self.word_before, self.word = self.word or (self.last if self.sentence_head else ""), ""
        self.last = ""
        self.newlines += char == "\n"
        self.line_head = "" if char == "\n" else (self.line_head + char)[:_HEAD]
        self.sentence_head = (self.sentence_head + char)[:_HEAD] if self.sentence_head else ""

    def _take(self, char: str) -> None:
        if char in _STOPS:
            is_first = not self.stop or self.is_spaced
            if is_first:
                self.stop_word = (self.word, self.word_before)
                self.follows_enumerator = bool(
                    _ENUMERATOR.fullmatch(self.line_head.lstrip(_BULLETS))
                    or _NUMBER.fullmatch(self.sentence_head.lstrip(_BULLETS))
                )
            self.stop = "…" if char == "." and self.stop in (".", "…") and not is_first else char
            self.is_spaced = False
            self.word = (self.word + char)[-_HEAD:] if char == "." and self.word else ""
        elif self.stop and not self.is_spaced and char in _CLOSERS:
            pass  # closing quotes and brackets belong to the stop before them
        else:
            self.stop, self.is_spaced = "", False
            self.word = (self.word + char)[-_HEAD:] if char.isalnum() or char in "-'" else ""

    def _is_over(self, char: str) -> bool:
        if self.newlines >= 2:
            return True
        if not self.stop:
            return False
        if self.stop in _WIDE_STOPS:
            return self.is_spaced or char not in _CLOSERS + _STOPS
        if not self.is_spaced:
            return False
        if self.stop != ".":
            return not "a" <= char <= "z"
        return not self.follows_enumerator and not self._is_abbreviation(char)

    def _is_abbreviation(self, char: str) -> bool:
        word, before = self.stop_word
        lower_word = word.lower()
        if lower_word in _MAY_END:
            return "a" <= char <= "z"
        if lower_word in _NEVER_ENDS or _DOTTED.fullmatch(word):
            return True
        if lower_word in _BEFORE_NUMBER:
            return "0" <= char <= "9"
        is_capital = len(word) == 1 and "A" <= word <= "Z"
        return is_capital and (before in ("", "by") or "A" <= before[:1] <= "Z")


class SentenceSplitter(Splitter):
    """A sentence is a step; never cut inside a decimal, an abbreviation, LaTeX or code.

    The rules are in this module's docstring, those for `$` in `stepflow_tl.trace.splitting.protected`.
    """

    def stream(self) -> StepStream:
        """A twin whose state is a few dozen characters."""
        return _SentenceStream()
