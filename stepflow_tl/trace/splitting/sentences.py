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
5. it stands inside LaTeX or code, a *protected* stretch.

Of a character outside ASCII the decision reads only whether it is a stop or a closing bracket. Where a
tokenizer splits such a bracket into bytes, that is not known in time, and it begins the next sentence.

What opens a protected stretch (LaTeX, inline code, a code fence), and what closes it:

1. `$` opens inline LaTeX before a letter or one of `\ ( [ { | + - < _ ^`, unless a letter or digit stands
   right before it. The next `$` closes it.
2. `$` before a digit opens an *amount* ("$400 000"), which protects nothing. It is over at the next word
   ("budget"). If one of `\ ^ _ { }` comes before that, it was LaTeX ("$2^{10}. 5$"). A `$` within it begins
   the next amount after white space or an operator ("$5*3=$15"), and else closes it ("$3.5$-fold").
3. `$$`, `\(`, `\[` and `\begin{` open what `$$`, `\)`, `\]` and the matching `\end{` close.
4. A single backtick opens inline code up to the next one. Three or more at the start of a line, or `~~~`,
   open a fence, which a line of nothing but as many closes. Two are a LaTeX quotation mark.

A backslash takes the meaning from the character after it: `\$` and the bracket of `\\[` open nothing.
**Nothing stays open for ever**: inline LaTeX, amounts and inline code end with their line; displays end at a
blank line (TeX allows none in mathematics); a fence runs to its closing line or the end of the text, as in
Markdown.

Both machines are O(1) in time and memory per character.
"""

import re
from copy import copy

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

_TEXT, _INLINE, _AMOUNT, _DISPLAY, _ENVIRONMENT, _CODE, _FENCE = range(7)
_INLINE_FIRST = "\\([{|+-<_^"
_OPERATORS = "=+-*/(<>~×÷,;"


class SentenceStream:
    """Streaming twin of `SentenceSplitter`; its state is a few dozen characters."""

    def __init__(self) -> None:
        """Start at the beginning of a segment."""
        self.protected = ProtectedStretches()
        self.line_head = self.sentence_head = ""
        self.word = ""  # letters, digits and inner stops up to here
        self.word_before = ""  # word or sign before the last white space; empty at a sentence's start
        self.last = ""  # the last character that is not white space
        self.stop = ""  # a stop after which the sentence may be over
        self.stop_word = ("", "")  # `word` and `word_before` at that stop
        self.follows_enumerator = False
        self.is_spaced = False  # white space has followed the stop
        self.newlines = 0  # in the white space that ends here

    def clone(self) -> "SentenceStream":
        """An independent copy."""
        twin = copy(self)
        twin.protected = copy(self.protected)
        return twin

    def feed(self, char: str) -> bool:
        """Take the next character; say whether it begins a new sentence."""
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


class ProtectedStretches:
    """Streaming recogniser; `inside` says whether the text so far ends inside a protected stretch."""

    def __init__(self) -> None:
        """Start outside every stretch."""
        self.mode = _TEXT
        self.before = ""  # the last characters, eight at most
        self.escaped = False  # the last character is a backslash that is not itself escaped
        self.dollar = False  # the last character is a `$` whose meaning the next one tells
        self.closer = ""  # last character of what closes the display
        self.depth = 0  # of environments
        self.line_is_blank = True
        self.blank_lines = 0  # newlines since the last other character
        self.ticks = 0  # length of the run of backticks or tildes that ends here
        self.ticks_open_line = False  # that run began its line
        self.fence = ("", 0)  # character and length
        self.line_may_close = False  # so far the line is nothing but fence characters

    @property
    def inside(self) -> bool:
        """Whether a stop here would end nothing."""
        return self.mode not in (_TEXT, _AMOUNT)

    def feed(self, char: str) -> None:
        """Take the next character."""
        if self.mode == _FENCE:
            self._in_fence(char)
        elif char == "\n":
            self._end_line()
        else:
            self._within_line(char)
        self._remember(char)

    def _remember(self, char: str) -> None:
        self.blank_lines = self.blank_lines + (char == "\n") if char in WHITE_SPACE else 0
        self.line_is_blank = char == "\n" or (self.line_is_blank and char in WHITE_SPACE)
        self.escaped = char == "\\" and not self.escaped
        self.before = (self.before + char)[-8:]

    def _end_line(self) -> None:
        is_blank_line = self.blank_lines >= 1
        if self.mode in (_INLINE, _AMOUNT, _CODE) or (
            self.mode in (_DISPLAY, _ENVIRONMENT) and is_blank_line
        ):
            self.mode = _TEXT
        self.dollar, self.ticks = False, 0

    def _within_line(self, char: str) -> None:
        previous = self.before[-1:]
        if self.mode == _INLINE:
            if char == "$" and not self.escaped:
                self.mode = _TEXT
        elif self.mode == _DISPLAY:
            two = self.escaped if self.closer in "])" else previous == "$"
            if char == self.closer and two and self.depth:
                self.mode = _TEXT
            self.depth = 1  # a closer needs a character after the opener: "$$$" is not a closed display
        elif self.mode == _ENVIRONMENT:
            if char == "{":
                self.depth += self.before.endswith("\\begin") - self.before.endswith("\\end")
                if self.depth == 0:
                    self.mode = _TEXT
        elif self.mode == _CODE:
            if char == "`":
                self.mode = _TEXT
        else:
            self._in_text(char, previous)

    def _in_text(self, char: str, previous: str) -> None:
        if self.dollar:
            self.dollar = False
            if char == "$":
                self.mode, self.closer, self.depth = _DISPLAY, "$", 0
                return
            if char.isascii() and char.isdigit():
                self.mode = _AMOUNT
                return
            if char.isalpha() or char in _INLINE_FIRST:
                self.mode = _INLINE
                return
            self.mode = _TEXT
        if char == "$" and not self.escaped:
            in_amount, self.mode = self.mode == _AMOUNT, _TEXT
            opens = previous in WHITE_SPACE or previous in _OPERATORS if in_amount else not previous.isalnum()
            self.dollar = opens
        elif self.mode == _AMOUNT and char in "\\^_{}":
            self.mode = _INLINE
        elif self.mode == _AMOUNT and char.isalpha() and previous in WHITE_SPACE:
            self.mode = _TEXT
        elif self.escaped and char in "([":
            self.mode, self.closer, self.depth = _DISPLAY, ")" if char == "(" else "]", 1
        elif char == "{" and self.before.endswith("\\begin"):
            self.mode, self.depth = _ENVIRONMENT, 1
        else:
            self._count_ticks(char, previous)

    def _count_ticks(self, char: str, previous: str) -> None:
        if char in "`~" and not self.escaped:
            if not (self.ticks and char == previous):
                self.ticks_open_line = self.line_is_blank
            self.ticks = self.ticks + 1 if char == previous else 1
            if self.ticks == 3 and self.ticks_open_line:
                self.mode, self.fence, self.line_may_close = _FENCE, (char, 3), False
            return
        if self.ticks == 1 and previous == "`":
            self.mode = _CODE
        self.ticks = 0

    def _in_fence(self, char: str) -> None:
        mark, length = self.fence
        if char == "\n":
            if self.line_may_close and self.ticks >= length:
                self.mode = _TEXT
            self.ticks, self.line_may_close = 0, True
        elif char == mark and self.ticks >= 3 and not self.line_may_close and self.before.endswith(mark * 3):
            self.fence, self.ticks = (mark, length + 1), self.ticks + 1  # a longer opening run
        elif char == mark and (self.ticks == 0 or self.before.endswith(mark)):
            self.ticks += 1
        elif char not in WHITE_SPACE:
            self.line_may_close = False
