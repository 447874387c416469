"""The format table: what is in it, what is registered, and what is refused."""

from dataclasses import replace

import pytest
from trace_material import TEMPLATES, family_tokenizer

from stepflow_tl.errors import FormatError
from stepflow_tl.trace.formats import (
    ReasoningFormat,
    detect_format,
    get_format,
    known_formats,
    register_format,
    table,
)
from stepflow_tl.trace.steps import Segment

FAMILIES = [
    "deepseek-r1",
    "qwen3",
    "qwq",
    "gpt-oss",
    "phi-4-reasoning",
    "magistral",
    "smollm3",
    "glm-4.5",
    "chatml",
    "llama-3",
    "granite",
    "seed-oss",
    "command-a",
    "minimax-m2",
    "gemma-4",
    "kimi-k2",
    "gemma",
    "mistral",
    "phi-3",
]


@pytest.fixture
def own_table(monkeypatch):
    """A copy of the table, so that what a test registers is gone after it."""
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))


def test_every_family_is_in_the_table():
    assert set(FAMILIES) | {"plain"} <= set(known_formats())
    assert get_format("qwq").name == "qwq"


@pytest.mark.usefixtures("own_table")
def test_a_registered_format_is_found_by_name_and_detected_first():
    mine = replace(get_format("chatml"), name="mine", detected_by=("<|im_start|>user",))
    assert register_format(mine) is mine
    assert get_format("mine") is mine and known_formats()[-1] == "mine"
    assert detect_format(family_tokenizer("chatml")) is mine


@pytest.mark.usefixtures("own_table")
def test_a_name_cannot_be_taken_twice():
    with pytest.raises(FormatError, match=r"'qwen3' exists already; choose another name"):
        register_format(get_format("qwen3"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, r"needs a name"),
        (
            {"user_turns": ("\nUser:",)},
            r"Marker '\\nUser:' .* must begin with an ASCII character that is not white",
        ),
        ({"turn_ends": ("｜end｜",)}, r"must begin with an ASCII character"),
        ({"thinking_starts": ("",)}, r"Marker '' of format 'mine' must begin"),
        (
            {"opens_as": Segment.QUESTION},
            r"must be Segment.THINKING or Segment.SUMMARY, got <Segment.QUESTION",
        ),
    ],
)
def test_a_format_that_no_causal_scanner_could_follow_is_refused(fields, message):
    with pytest.raises(FormatError, match=message):
        ReasoningFormat(**{"name": "mine", **fields})


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(
        FormatError, match=r"Unknown reasoning format 'r1'; known formats are deepseek-r1, .*register_format"
    ):
        get_format("r1")


def test_every_template_of_the_tests_belongs_to_a_family_of_the_table():
    assert set(TEMPLATES) == set(FAMILIES)
