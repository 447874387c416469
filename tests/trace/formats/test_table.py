"""The format table: what is in it, what is registered, and what is refused."""

import json
from dataclasses import replace

import pytest
from trace_material import TEMPLATES, family_tokenizer

from stepflow_tl.errors import FormatError
from stepflow_tl.trace.formats import (
    ReasoningFormat,
    detect_format,
    get_format,
    known_formats,
    read_format,
    register_format,
    resolve_format,
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
    assert set(FAMILIES) | {"plain", "boxed"} <= set(known_formats())
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


def test_a_format_of_the_users_own_is_read_from_a_file_and_may_stand_on_a_known_one(tmp_path):
    path = tmp_path / "mine.json"
    data = {"name": "mine", "based_on": "chatml", "opens_as": "THINKING", "thinking_ends": ["So:"]}
    path.write_text(json.dumps(data))
    expected = replace(get_format("chatml"), name="mine", opens_as=Segment.THINKING, thinking_ends=("So:",))
    assert read_format(path) == expected == resolve_format(family_tokenizer("chatml"), str(path))
    assert "mine" not in known_formats()
    path.write_text('{"name": "bare", "thinking_required": true}')
    assert read_format(path) == ReasoningFormat("bare", thinking_required=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"mine.json cannot be read: No such file"),
        ("{", r"mine.json cannot be read: Expecting property name"),
        ("[1]", r"holds no JSON object"),
        ('{"name": "qwen3"}', r"the name 'qwen3' is taken by a known format; choose another"),
        ('{"name": "mine", "based_on": "r1"}', r"mine.json: Unknown reasoning format 'r1'"),
        ('{"name": "mine", "thinking_end": ["x"]}', r"a format has no field thinking_end; its fields are"),
        ('{"user_turns": ["x"]}', r"the format has no name; its fields are name, user_turns"),
        ('{"name": 3}', r"name of a format is 3: expected a string"),
        ('{"name": "mine", "user_turns": "x"}', r"user_turns of a format is 'x': expected a list of strings"),
        (
            '{"name": "mine", "user_turns": [1]}',
            r"user_turns of a format is \[1\]: expected a list of strings",
        ),
        ('{"name": "mine", "opens_as": "QUESTION"}', r'opens_as .*: expected "THINKING" or "SUMMARY"'),
        ('{"name": "mine", "thinking_required": 1}', r"thinking_required .*: expected true or false"),
        ('{"name": "mine", "turn_ends": ["\\nUser"]}', r"must begin with an ASCII character"),
    ],
)
def test_a_file_that_holds_no_format_is_refused_with_the_reason(text, message, tmp_path):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FormatError, match=message):
        read_format(path)
