"""Question files, line by line, and graders."""

import json
import sys

import pytest

from stepflow_tl.errors import InputFileError, MissingExtraError
from stepflow_tl.evaluation import Answer, Question, exact, maths, read_questions


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


def answer(summary):
    return Answer((1,), "", summary, 1, True)


def test_exact_grading_ignores_white_space_only():
    assert exact(Question("a", "?", "7"), answer("\n7 "))
    assert not exact(Question("a", "?", "7"), answer("7."))


@pytest.mark.parametrize(
    ("right", "summary", "verdict"),
    [
        ("0.5", r"so it is $\frac{1}{2}$", True),
        ("72", "The answer is 72.", True),
        ("72", "The answer is 27.", False),
        ("1000", r"\boxed{1{,}000}", True),
        ("72", "", False),
    ],
)
def test_maths_grading(right, summary, verdict):
    pytest.importorskip("math_verify")

    assert maths(Question("a", "?", right), answer(summary)) == verdict


def test_maths_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingExtraError, match=r"stepflow-tl\[maths\]"):
        maths(Question("a", "?", "1"), answer("1"))
