r"""Stretches of text in which a full stop ends nothing: LaTeX, inline code, code fences.

Causal, and O(1) in time and memory a character.

What opens a stretch, and what closes it:

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
"""

from copy import copy

from stepflow_tl.trace.steps import WHITE_SPACE

_TEXT, _INLINE, _AMOUNT, _DISPLAY, _ENVIRONMENT, _CODE, _FENCE = range(7)
_INLINE_FIRST = "\\([{|+-<_^"
_OPERATORS = "=+-*/(<>~×÷,;"


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

    def clone(self) -> "ProtectedStretches":
        """An independent copy."""
        return copy(self)

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
            self.ticks_open_line = (
                self.ticks_open_line if self.ticks and char == previous else self.line_is_blank
            )
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
