"""The sentence splitter on what reasoning models write."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflow_tl.trace.splitting import SentenceSplitter

WHOLE = [
    "3.14",
    "1,000.50",
    "v2.0.1",
    "file.txt",
    "e.g. this",
    "i.e. that",
    "Dr. Who",
    "Fig. 3",
    "No. 5",
    "Donald E. Knuth",
    "J. R. Smith",
    "U.S. law",
    "etc. and more",
    "$x. Y$",
    "$a = 1. B = 2$",
    "$2^{10}. A$",
    "$$a. B$$",
    "\\(a. B\\)",
    "\\[A. B\n C. D\\]",
    "\\begin{align}a. B\\begin{x}C. D\\end{x}E. F\\end{align}",
    "`a. B`",
    "wait... no",
    "a\\$b",
]


@settings(max_examples=1000, deadline=None)
@given(
    units=st.lists(st.sampled_from(WHOLE), min_size=1, max_size=3),
    stop=st.sampled_from([". ", "! ", "?\n", ".  "]),
)
def test_what_must_stay_whole_stays_whole_and_every_sentence_around_it_is_found(units, stop):
    sentences = [f"Now {unit} ends here{stop}" for unit in units]
    assert SentenceSplitter().split("".join(sentences)) == sentences


@pytest.mark.parametrize(
    "pieces",
    [
        ["$400 000 budget. ", "She saw $350 000. ", "On top"],
        ["He pays $5*3=$15. ", "She pays $2. ", "Then $x. Y$ is it. ", "Done."],
        ["It costs $5 and $10. ", "Next."],
        ["It rose $3.5$-fold. ", "Then."],
        ["A $ alone. ", "Here $ too. ", "End"],
        ["Open $x + y. Z\nends. ", "Here"],
        ["$$$. x. Y"],
        ["Not math \\\\[a. ", "B."],
        ["Price \\$5. ", "And \\$x. ", "Y"],
        [
            "1. Do this. ",
            "Then that.\n",
            "2. And this. ",
            "End.\n",
            "- a. Item. ",
            "More.\n",
            "**Step 2.** Go. ",
            "Stop",
        ],
        ["The answer is B. ", "Next. ", "So x = A. ", "Then y. ", "Z"],
        ['"Really?" he said. ', '"Yes." ', "(No.) ", "Fine"],
        ["你好。", "世界！", "他说：“好。”", "然后？", "好"],
        ["No... wait. ", "Hmm... ", "Wait… ", "Ok?! ", "Yes"],
        ["A heading\n\n", "Its text. ", "More\r\n\r\n", "next"],
        ["We met at 5 p.m. ", "She left, etc. ", "Then"],
        ["Say ``so. ", "And'' b. ", "C"],
        ["Unclosed \\[ a. B\n\n", "It ends. ", "Here"],
        ["x = 5. ", "y = 6."],
    ],
)
def test_examples(pieces):
    assert SentenceSplitter().split("".join(pieces)) == pieces


def test_a_code_fence_is_never_cut_not_even_at_its_blank_lines():
    fence = "Code:\n```py\nx = 1. Y = 2.\n\nfoo. Bar\n``\n```\nIt ran. "
    assert SentenceSplitter().split(fence + "Good.") == [fence, "Good."]


@pytest.mark.parametrize(("mark", "other"), [("````", "```"), ("~~~", "```"), ("```", "~~~")])
def test_a_fence_closes_only_at_a_line_of_as_many_marks(mark, other):
    fence = f"{mark}\nOne. Two\n{other}\nThree. Four\n{mark}\nAfter it. "
    assert SentenceSplitter().split(fence + "End") == [fence, "End"]


def test_a_number_waits_for_what_follows():
    stream = SentenceSplitter().stream()
    assert [stream.feed(char) for char in "It is 3."] == [False] * 8
    decimal, end = stream.clone(), stream.clone()
    assert not any(decimal.feed(char) for char in "14 now")
    assert [end.feed(char) for char in " So"] == [False, True, False]


def test_inline_latex_that_is_never_closed_ends_with_its_line():
    assert SentenceSplitter().split("Let $x be. It\nis so. Then.") == ["Let $x be. It\nis so. ", "Then."]
