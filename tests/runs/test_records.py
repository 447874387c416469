"""Reading JSON lines: every defect is named with its line, and costs no other line."""

import json

import pytest

from stepflow_tl.errors import InputFileError
from stepflow_tl.runs import row_files
from stepflow_tl.runs.records import Record, read_records
from stepflow_tl.runs.row_files import open_source


def test_records_keep_their_order_numbers_and_fields(write_lines, make_record):
    path = write_lines(
        make_record("a"), "", "   ", make_record(7, summary=None), {"text": "<think>x</think>y"}
    )
    first, second, third = read_records(path)
    assert first == Record(1, "a", "What is 2+3*4?", make_record()["thinking"], "It is 14.", None)
    assert (second.line, second.id, second.summary) == (4, "7", "")
    assert (third.line, third.id, third.text, third.thinking) == (5, "line-5", "<think>x</think>y", "")
    assert open_source(path).count() == 3


def test_a_limit_counts_the_lines_that_are_not_blank(write_lines, make_record):
    path = write_lines("", make_record("a"), "", "not json", make_record("b"))
    assert [item.line for item in read_records(path, limit=2)] == [2, 4]
    assert open_source(path).count(2) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "a", ', "not JSON"),
        ("[1, 2]", "holds a list, expected an object"),
        ("null", "holds null, expected an object"),
        ("3.5", "holds a number, expected an object"),
        (b'{"id": "\xff"}', "not UTF-8 (byte 8 of the line)"),
        ("[" * 100_000, "not JSON"),
        ('{"n": ' + "9" * 10_000 + "}", "not JSON that can be read"),
        ({"id": "a", "question": ["x"], "thinking": ""}, "field 'question' is a list, expected a string"),
        ({"id": "a", "question": "x", "thinking": {}}, "field 'thinking' is an object, expected"),
        ({"id": "a", "question": "x", "thinking": "y", "summary": 4}, "field 'summary' is a number"),
        ({"id": True, "question": "x", "thinking": "y"}, "field 'id' is true or false, expected a"),
        ({"id": 1.5, "question": "x", "thinking": "y"}, "field 'id' is a number, expected a string or"),
        ({"id": "a", "thinking": "y"}, "lacks 'question'"),
        ({"id": "a", "question": "x", "thought": "y"}, "lacks 'thinking'"),
        ({"id": "a"}, "lacks 'question' and 'thinking'"),
        ({"text": "x", "thinking": "y"}, "has 'text' beside 'thinking'"),
        ('{"id": "a", "question": "\\ud800", "thinking": "y"}', "holds half a character (\\ud800 at 0)"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_record_is_named_and_the_others_are_read(line, said, write_lines, make_record):
    path = write_lines(make_record("before"), line, make_record("after"))
    before, unreadable, after = read_records(path)
    assert (before.id, after.id) == ("before", "after")
    assert unreadable.line == 2
    assert said in unreadable.reason


def test_a_line_beyond_the_limit_is_refused_unread_and_the_next_one_is_read(
    write_lines, make_record, monkeypatch
):
    monkeypatch.setattr(row_files, "MAX_LINE_BYTES", 1000)
    fits = json.dumps(make_record("fits"))
    fits += " " * (999 - len(fits))
    path = write_lines(fits, make_record("long", thinking="x" * 5000), fits + "  ", make_record("after"))
    first, long, also_long, after = read_records(path)
    assert (first.id, after.id, after.line) == ("fits", "after", 4)
    assert long.reason.startswith("longer than 1000 bytes") and also_long.reason == long.reason


def test_a_byte_order_mark_and_a_missing_last_newline_do_no_harm(tmp_path, make_record):
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(make_record("ä")).encode())
    assert [item.id for item in read_records(path)] == ["ä"]


def test_the_fields_asked_for_are_read_and_checked(write_lines, make_record):
    path = write_lines(
        make_record("a", ok=True, problem=3), make_record("b", ok=None), make_record("c", ok="yes")
    )
    a, b, c = read_records(path, group_by="ok", pair_by="problem")
    assert (a.group, a.pair) == (True, "3")
    assert (b.group, b.pair) == (None, None)
    assert c.reason == "field 'ok' is a string, expected true or false"
    assert [item.group for item in read_records(path)] == [None, None, None]


@pytest.mark.parametrize(("name", "said"), [("nowhere.jsonl", "does not exist"), (".", "is a folder")])
def test_a_file_that_cannot_be_read_is_named(name, said, tmp_path):
    with pytest.raises(InputFileError, match=said):
        list(read_records(tmp_path / name))
