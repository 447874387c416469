"""Every splitter is lossless, causal and equal to an independent slow reading of the finished text."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_material import texts

from stepflow_tl.errors import TraceError
from stepflow_tl.trace.splitting import (
    CallableSplitter,
    LineSplitter,
    MinimumLength,
    ParagraphSplitter,
    RegexSplitter,
    SentenceSplitter,
    WholeSplitter,
    resolve_splitter,
)
from stepflow_tl.trace.steps import WHITE_SPACE

SPLITTERS = {
    "paragraph": ParagraphSplitter(),
    "line": LineSplitter(),
    "sentence": SentenceSplitter(),
    "whole": WholeSplitter(),
    "regex": RegexSplitter(r"[.;!?]\s|answer"),
    "callable": CallableSplitter(lambda step: len(step) > 7 or step.endswith("x")),
    "minimum": MinimumLength("sentence", 9),
}
LAW = settings(max_examples=1000, deadline=None)


def starts(pieces: list[str]) -> list[int]:
    return [sum(map(len, pieces[:i])) for i in range(len(pieces))]


@pytest.mark.parametrize("name", SPLITTERS)
@LAW
@given(text=texts(), data=st.data())
def test_every_splitter_is_lossless_causal_and_equal_to_its_streaming_twin(name, text, data):
    splitter = SPLITTERS[name]
    pieces = splitter.split(text)
    # Lossless; white space belongs to the step before it.
    assert "".join(pieces) == text
    assert all(pieces)
    assert not any(piece[0] in WHITE_SPACE for piece in pieces[1:])
    # Causal: the beginning of a text splits into the beginning of its split.
    cut = data.draw(st.integers(0, len(text)))
    assert starts(splitter.split(text[:cut])) == [start for start in starts(pieces) if start < cut]
    # The twin, forked on the way; what the fork is fed must not reach the stream it was forked from.
    first = len(text) - len(text.lstrip(WHITE_SPACE))
    stream, online = splitter.stream(), [0] if text else []
    for position in range(first, len(text)):
        if position == cut:
            fork = stream.clone()
            for char in "X. Y\n\n```$Z":
                fork.feed(char)
            stream = stream.clone()
        if stream.feed(text[position]) and position > first:
            online.append(position)
    assert online == starts(pieces)


@LAW
@given(text=texts())
def test_paragraphs_and_lines_equal_a_regular_expression_on_the_finished_text(text):
    for splitter, gap in (
        (ParagraphSplitter(), r"\n[ \t\r\f\v]*\n[ \t\r\n\f\v]*"),
        (LineSplitter(), r"\n[ \t\r\n\f\v]*"),
    ):
        body = text.lstrip(WHITE_SPACE)
        head = text[: len(text) - len(body)]
        cuts = [m.end() for m in re.finditer(gap, body) if m.end() < len(body)]
        pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
        expected = [head + pieces[0], *pieces[1:]] if text else []
        assert splitter.split(text) == expected


@LAW
@given(text=texts(), min_chars=st.integers(1, 30))
def test_minimum_length_merges_short_pieces_into_the_next_one(text, min_chars):
    # White space before the first step counts for nothing in a stream, so the oracle leaves it out, too.
    body = text.lstrip(WHITE_SPACE)
    expected, held = [], ""
    for piece in ParagraphSplitter().split(body):
        held += piece
        if len(held) >= min_chars:
            expected.append(held)
            held = ""
    expected += [held] if held else []
    pieces = MinimumLength(ParagraphSplitter(), min_chars).split(body)
    assert pieces == expected
    assert all(len(piece) >= min_chars for piece in pieces[:-1])


@LAW
@given(text=texts(), pattern=st.sampled_from([r"[.;]\s", r"\.+", r"So|But|Then", r"\n", r"x = \d", r"a?\w"]))
def test_a_regex_step_ends_where_any_stretch_of_it_matches_to_its_end(text, pattern):
    body = text.lstrip(WHITE_SPACE)
    expected, step, ended = [], "", False
    for char in body:
        if ended and char not in WHITE_SPACE:
            expected.append(step)
            step, ended = "", False
        step += char
        ended = ended or any(re.fullmatch(pattern, step[i:]) for i in range(len(step)))
    assert RegexSplitter(pattern, max_match=500).split(body) == expected + ([step] if step else [])


@LAW
@given(
    text=texts(),
    chars=st.lists(st.characters(min_codepoint=0x80, categories=["Lu", "Ll", "Lo", "So"]), max_size=2),
)
def test_whether_a_step_begins_does_not_depend_on_which_non_ascii_letter_begins_it(text, chars):
    # So a step may begin at the first fragment of a split character, before the character is known.
    for splitter in (ParagraphSplitter(), LineSplitter(), SentenceSplitter(), MinimumLength("line", 4)):
        for char in chars:
            stream = splitter.stream()
            for known in text.lstrip(WHITE_SPACE):
                stream.feed(known)
            assert stream.clone().feed(char) == stream.clone().feed("\ufffd")


def test_empty_text_has_no_step_and_white_space_alone_is_one_piece():
    for splitter in SPLITTERS.values():
        assert splitter.split("") == []
        assert splitter.split(" \n\n ") == [" \n\n "]


def test_a_blank_line_may_hold_spaces_and_end_in_crlf():
    assert ParagraphSplitter().split("a\nb\r\n \t\r\nc\n\n\nd") == ["a\nb\r\n \t\r\n", "c\n\n\n", "d"]
    assert LineSplitter().split("a\r\n\r\nb\n  c") == ["a\r\n\r\n", "b\n  ", "c"]


def test_wide_spaces_are_ordinary_characters():
    # U+3000 is the indent of a Chinese paragraph: it belongs to the paragraph it opens.
    assert ParagraphSplitter().split("甲。\n\n\u3000\u3000乙。") == ["甲。\n\n", "\u3000\u3000乙。"]


def test_a_regex_marks_the_end_of_a_step_and_white_space_stays_before():
    assert RegexSplitter(r"Wait,").split("Yes. Wait,  no. Wait,x") == ["Yes. Wait,  ", "no. Wait,", "x"]
    assert RegexSplitter(re.compile("wait", re.IGNORECASE)).split("aWAITb") == ["aWAIT", "b"]


def test_a_callable_sees_the_current_step_with_the_new_character():
    seen = []

    def begins(step: str) -> bool:
        seen.append(step)
        return step.endswith("#")

    assert CallableSplitter(begins).split("ab#c") == ["ab", "#c"]
    assert seen == ["ab", "ab#", "#c"]


def test_a_callable_that_says_yes_on_white_space_begins_the_step_after_it():
    assert CallableSplitter(lambda step: step.endswith(" ")).split("a b  c") == ["a ", "b  ", "c"]


def test_names_stand_for_splitters():
    assert isinstance(resolve_splitter("line"), LineSplitter)
    assert isinstance(resolve_splitter(None), ParagraphSplitter)
    splitter = RegexSplitter("x")
    assert resolve_splitter(splitter) is splitter


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: resolve_splitter("sentences"),
            r"Unknown splitter 'sentences'; known names are paragraph, line",
        ),
        (lambda: resolve_splitter(str.split), r"must be a name .* Wrap a function in CallableSplitter"),
        (
            lambda: resolve_splitter(LineSplitter),
            r"must be a name .* or an object with stream\(\) and split\(\)",
        ),
        (lambda: RegexSplitter("("), r"'\(' is not a regular expression"),
        (lambda: RegexSplitter(r"\.(?=\s)"), r"looks ahead, which a causal splitter cannot"),
        (lambda: RegexSplitter("a*"), r"matches the empty string, .* use \+ instead of \*"),
        (lambda: RegexSplitter("a", max_match=0), r"max_match must be at least 1, got 0"),
        (lambda: MinimumLength("line", 0), r"min_chars must be at least 1, got 0"),
        (lambda: MinimumLength("lines", 3), r"Unknown splitter 'lines'"),
    ],
)
def test_bad_splitters_are_refused_with_what_to_do(make, message):
    with pytest.raises(TraceError, match=message):
        make()


def test_an_escaped_bracket_is_not_taken_for_a_look_ahead():
    assert RegexSplitter(r"\(\?=").split("a(?=b") == ["a(?=", "b"]
