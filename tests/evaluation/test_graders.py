"""Graders: what counts as an answer, how questions are asked, and which lines are refused before any is."""

import json
import sys

import pytest

from stepflow_tl.errors import InputFileError, MissingExtraError, ProblemError, SandboxError
from stepflow_tl.evaluation import (
    GRADERS,
    Answer,
    Decoding,
    Grader,
    Question,
    Verdict,
    choice,
    code,
    evaluate,
    exact,
    grading,
    maths,
    maths_grader,
    questions_of,
    read_questions,
    register_grader,
)
from stepflow_tl.evaluation.choice_grader import named_option
from stepflow_tl.evaluation.code_grader import find_code
from stepflow_tl.evaluation.sandbox import check_sandbox
from stepflow_tl.testbed import ProblemSpec, make_problems


def answer(summary):
    return Answer((1,), "", summary, 1, True)


def write(tmp_path, *lines):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


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
    assert bool(maths(Question("a", "?", right), answer(summary))) == verdict


def test_a_value_that_no_machine_holds_is_a_wrong_answer_and_the_next_is_graded(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(maths_grader, "SECONDS", 1.5)
    for summary in (r"\boxed{9^{9^{9}}}", r"\boxed{10^{10^{10}}}"):
        verdict = maths(Question("a", "?", "18"), answer(summary))
        assert not verdict and ("within 1.5 s" in verdict.reason or "memory" in verdict.reason)
        assert maths(Question("a", "?", "18"), answer(r"\boxed{18}"))


def test_the_comparing_process_may_die_and_ends_with_its_parent():
    pytest.importorskip("math_verify")
    question = Question("a", "?", "18")
    assert maths(question, answer("18"))
    process = maths_grader._CHILD._process
    process.kill()
    process.wait()
    assert "without an answer" in maths(question, answer("18")).reason
    assert maths(question, answer("18"))
    again = maths_grader._CHILD._process
    maths_grader._CHILD.end()
    assert again.poll() is not None and maths_grader._CHILD._process is None


def test_maths_without_the_library_says_what_to_install(monkeypatch, model, questions):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingExtraError, match=r"stepflow-tl\[maths\]"):
        maths(Question("a", "?", "1"), answer("1"))
    with pytest.raises(MissingExtraError, match=r"stepflow-tl\[maths\]"):  # before anything is asked
        evaluate(None, questions, grader="maths")


# --- choice -------------------------------------------------------------------------------------------------

LABELS = ("A", "B", "C", "D")
CHOICES = ("A planet", "Days become shorter.", "25 °C", "Days")
CHOICE_LINE = {"question": "Which?", "choices": ["x", "y"], "labels": ["A", "B"], "answer": "B"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(C)", "C"),
        ("**C**", "C"),
        ("Answer: B", "B"),
        ("The correct answer is C.", "C"),
        ("The answer is (D) because A and B are wrong.", "D"),
        ("The correct option is therefore **B: Days become shorter**", "B"),
        ("Not A. The answer is B.\nAnswer: C", "C"),  # the last statement counts
        (r"so \boxed{B}", "B"),
        (r"\boxed{\text{C}}. The answer is B", "C"),
        (r"The answer is $\boxed{\text{B. Days become shorter.}}$", "B"),
        ("Days become shorter", "B"),
        ("The answer is days become shorter.", "B"),
        ("The answer is days.", "D"),
        ("The answer is a planet.", "A"),
        ("A planet turns faster, so Days become shorter.", None),  # holds two options
        ("It all turns faster, and it is 25 °C there.", "C"),
        ("Some thought.\n\nC. 25 °C", "C"),
        ("B) Days become shorter\n\nThat is why.", "B"),
        ("I am not sure.", None),
        ("A star is not it.", None),  # the article
        ("The answer is not clear.", None),
        ("The answer is E.", None),
        ("Cats", None),
        ("", None),
    ],
)
def test_the_option_that_an_answer_names(text, named):
    assert named_option(text, LABELS, CHOICES) == named


def test_choices_are_shown_and_graded(tmp_path):
    (question,) = read_questions(write(tmp_path, {**CHOICE_LINE, "id": "q", "difficulty": 3}), "choice")
    assert question == Question("q", question.text, "B", "3")
    assert "Which?" in question.text and "A. x\nB. y" in question.text
    assert choice(question, answer("Answer: B")) == Verdict(True)
    assert choice(question, answer("It is A.")) == Verdict(False, "names no option")
    assert choice(question, answer("A")) == Verdict(False, "names A")
    with pytest.raises(ProblemError, match="'a' has no `labels`, which its grader needs"):
        choice(Question("a", "?", "B"), answer("B"))


def test_options_without_letters_go_by_their_labels():
    assert named_option("Answer: B", ("A", "B"), ("+", "-")) == "B"
    assert named_option("", ("A", "B"), ("+", "minus")) is None


def test_numbers_may_be_labels_and_options():
    labels, options = ("1", "2", "3"), ("1.5", "2", "30")
    for text, named in {
        "Answer: 2": "2",
        "The answer is 3": "3",
        "Answer: 1.5": "1",
        "Answer: 30": "3",
    }.items():
        assert named_option(text, labels, options) == named


# --- code ---------------------------------------------------------------------------------------------------

PROMPT = 'import math\n\ndef helper(x):\n    return x\n\ndef f(x: int) -> int:\n    """Add one."""\n'
TEST = (
    "def check(candidate):\n    assert candidate(1) == 2 and candidate(2) == 3\n    assert helper(1) == 1\n"
)
CODE_LINE = {"prompt": PROMPT, "entry_point": "f", "test": TEST}
DEFINITION = "def f(x):\n    return math.floor(helper(x)) + 1"
BODY = "    y = math.floor(helper(x))\n    return y + 1"
ANSWERS = {
    "prose and a block": f"Here it is:\n\n```python\n{DEFINITION}\n```\n\nIt adds one.",
    "a block that is cut off": f"```python\n{DEFINITION}\n",
    "a block that is indented": "1. So:\n\n   ```py\n   def f(x):\n       return x + 1\n   ```",
    "the last of several": f"```\ndef f(x):\n    return 7\n```\nNo:\n```\n{DEFINITION}\n```\n```\nf(1)\n```",
    "with a usage that asks": f"```python\n{DEFINITION}\nif __name__ == '__main__':\n    input()\n```",
    "a bare function": DEFINITION,
    "a bare function between prose": f"Sure! The function is\n\n{DEFINITION}\n\nIt's what you asked for.",
    "imports of its own": "from math import floor as g\n\ndef f(x):\n    return g(x) + 1\n\nThat's all.",
    "the body only": BODY,
    "the body without its first indent": BODY.lstrip(),
    "the body in a block": f"```python\n{BODY}\n```",
    "the body in a block, not indented": "```python\ny = helper(x)\nreturn y + 1\n```",
    "the prompt again": f"```python\n{PROMPT}{BODY}\n```",
}


@pytest.fixture(scope="module")
def sandboxed():
    try:
        check_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def asked(tmp_path):
    (question,) = read_questions(write(tmp_path, CODE_LINE), "code")
    return question


@pytest.mark.parametrize("text", ANSWERS.values(), ids=ANSWERS)
def test_code_is_found_however_it_is_written(text, asked, sandboxed):
    assert code(asked, answer(text), allow_code_execution=True) == Verdict(True)


@pytest.mark.parametrize(
    "text", ["", "I cannot.", "```python\nx = 1\n```", "def g(x):\n    return 2", '"""Doc."""', "    pass"]
)
def test_an_answer_without_the_function_is_wrong(text, asked):
    assert find_code(text, PROMPT, "f") is None
    assert code(asked, answer(text), allow_code_execution=True) == Verdict(False, "defines no function f")


def test_wrong_code_is_told_why(asked, sandboxed):
    verdict = code(asked, answer("def f(x):\n    return 2"), allow_code_execution=True)
    assert not verdict and verdict.reason.startswith("failed at line 2 of the test, assert candidate(1) == 2")


def test_what_code_says_is_shown_as_text_that_can_be_printed(asked, sandboxed):
    raising = answer("def f(x):\n    raise ValueError('\\x1b[2J' + chr(0xd800))")
    reason = code(asked, raising, allow_code_execution=True).reason
    assert reason.startswith("ValueError: ") and reason.isprintable() and reason.encode()


def test_code_is_not_run_unless_that_is_allowed(asked):
    with pytest.raises(SandboxError, match="pass allow_code_execution=True"):
        code(asked, answer(DEFINITION))
    with pytest.raises(SandboxError, match="nobody has allowed that.*--allow-code-execution"):
        evaluate(None, [asked], grader="code")  # before the model is looked at


def test_a_head_without_a_docstring_is_asked_and_graded(tmp_path, sandboxed):
    line = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(c):\n    assert c(1) == 2"}
    (question,) = read_questions(write(tmp_path, line), "code")
    assert "```python\ndef f(x):\n```" in question.text and question.answer == ""
    assert code(question, answer("    return x + 1"), allow_code_execution=True)


# --- files and the registry ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grader", "change", "message"),
    [
        ("choice", {"answer": None}, "line 1: `answer` is missing or empty"),
        ("choice", {"answer": "E"}, "line 1: `answer` is 'E', which is none of the labels A, B"),
        ("choice", {"choices": None}, "line 1: `choices` is missing or empty"),
        ("choice", {"choices": "x"}, "line 1: `choices` is str, expected a list of strings"),
        ("choice", {"choices": ["x", ""]}, "line 1: `choices` holds an empty string"),
        ("choice", {"choices": ["x", None]}, "line 1: `choices` holds an empty string"),
        ("choice", {"choices": ["x", {}]}, "line 1: `choices` is dict, expected a string or a number"),
        ("choice", {"choices": ["x", "x"]}, "line 1: `choices` has one twice"),
        (
            "choice",
            {"choices": ["x"]},
            "`choices` has 1, expected at least two.*there are 1 `choices` but 2 `labels`",
        ),
        ("choice", {"labels": ["A", "a"]}, "`labels` names one twice"),
        ("code", {"entry_point": None}, "line 1: `entry_point` is missing or empty"),
        ("code", {"entry_point": "f()"}, "`entry_point` is 'f\\(\\)', which cannot name a function"),
        ("code", {"entry_point": "g"}, "`prompt` does not define the function 'g' that `entry_point` names"),
        ("code", {"test": "assert f(1) == 2"}, "`test` does not define check"),
        ("code", {"test": "def check(c) pass"}, "`test` does not define check"),
        ("code", {"prompt": None}, "`prompt` is missing or empty"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path, grader, change, message):
    line = {"choice": CHOICE_LINE, "code": CODE_LINE}[grader]
    with pytest.raises(InputFileError, match=f"(?s){message}.*grader '{grader}'"):
        read_questions(write(tmp_path, {**line, **change}), grader)


def test_all_bad_lines_are_named_at_once(tmp_path):
    bad = {**CHOICE_LINE, "answer": "E"}
    path = write(
        tmp_path,
        bad,
        bad,
        CHOICE_LINE,
        bad,
        {**CHOICE_LINE, "choices": None},
        {**CHOICE_LINE, "id": "line-3"},
    )
    with pytest.raises(InputFileError) as caught:
        read_questions(path, "choice")
    text = str(caught.value)
    assert "lines 1-2, 4: `answer` is 'E'" in text and "line 5: `choices` is missing" in text
    assert "line 6: the id 'line-3' occurs more than once" in text and "line 3:" not in text


def test_anyone_can_register_a_grader(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "_graders", dict(GRADERS))

    def grade(question, answer):
        return question.field("mood") in answer.summary

    mood = Grader("mood", {"text": "text", "mood": "text"}, grade, ask=lambda row: row["text"].upper())
    assert register_grader(mood) is mood
    with pytest.raises(ValueError, match="there is a grader 'mood' already"):
        register_grader(mood)
    path = write(tmp_path, {"text": "how?", "mood": "glad"})
    (question,) = read_questions(path, mood)
    assert (question.text, question.answer) == ("HOW?", "")
    assert read_questions(path, "mood") == [question]
    assert grading.graded([question], [[answer("glad"), answer("sad")]], grade) == (
        (Verdict(True), Verdict(False)),
    )


def test_a_grader_that_cannot_serve_is_refused_before_anything_is_asked():
    testbed = questions_of(make_problems(ProblemSpec(n_steps=2), 1, seed=0))
    with pytest.raises(
        ValueError, match="no grader 'magic': expected one of choice, code, exact, steps, maths"
    ):
        evaluate(None, testbed, grader="magic")
    with pytest.raises(ProblemError, match="'testbed-0' has no `choices`"):
        evaluate(None, testbed, grader="choice")


def test_an_evaluation_counts_verdicts(model, tmp_path):
    lines = [{**CHOICE_LINE, "question": f"Which {i}?"} for i in range(2)]
    found = evaluate(
        model,
        read_questions(write(tmp_path, *lines), "choice"),
        conditions={"plain": None},
        decoding=Decoding(max_new_tokens=3),
        grader="choice",
    )
    assert found.accuracy("plain") == 0 and found.results["plain"].right == ((False,), (False,))
    assert found.results["plain"].verdicts[0][0].reason == "names no option"
    assert found.regraded(lambda question, answer: True).accuracy("plain") == 1
