"""Question files, line by line."""

import json

import pytest

from stepflow_tl.errors import InputFileError
from stepflow_tl.evaluation import Question, read_questions


def write(tmp_path, *lines):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_file_is_read(tmp_path):
    path = write(
        tmp_path,
        {"id": "a", "question": "1+1?", "answer": 2, "difficulty": "easy"},
        "",
        {"question": "2*3?", "answer": "6", "source": "ignored"},
    )
    assert read_questions(path) == [Question("a", "1+1?", "2", "easy"), Question("line-3", "2*3?", "6")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: not JSON"),
        (["[1]"], "line 1: expected an object"),
        ([{"answer": "1"}], "line 1: `question` is missing or empty"),
        ([{"question": "1?", "answer": " "}], "line 1: `answer` is missing or empty"),
        ([{"question": "1?", "answer": True}], "line 1: `answer` is bool, expected a string or a number"),
        (
            [{"question": "1?", "answer": "1"}, {"question": ["?"], "answer": "1"}],
            "line 2: `question` is list",
        ),
        ([{"id": "x", "question": "1?", "answer": "1"}] * 2, "the id 'x' occurs more than once"),
        ([""], "has no question"),
    ],
)
def test_a_bad_file_names_line_and_field(tmp_path, lines, message):
    with pytest.raises(InputFileError, match=message):
        read_questions(write(tmp_path, *lines))
    with pytest.raises(InputFileError, match="cannot read"):
        read_questions(tmp_path / "nothing.jsonl")
