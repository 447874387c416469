"""A model's own answers, read from the files of `evaluate`: which lines count, which rows are chosen."""

import json

import pytest
import torch
from answer_files import HEADER, answer, write_answers

from stepflow_tl.diagnosis import compare
from stepflow_tl.errors import InputFileError
from stepflow_tl.runs import analyze_dataset
from stepflow_tl.runs.answer_rows import AnswerRows
from stepflow_tl.runs.options import RunOptions
from stepflow_tl.runs.records import Unreadable, open_traces, read_records
from stepflow_tl.saliency import StepSaliency
from stepflow_tl.trace import ReasoningTrace


class Notes:
    def __init__(self):
        self.messages = []

    def begin(self, total, settings, replicas):
        self.total = total

    def note(self, message):
        self.messages.append(message)

    def advance(self, n_tokens, seconds, tokens_left):
        pass


@pytest.fixture
def make(tiny_tokenizer):
    return lambda question_id, **options: answer(tiny_tokenizer, question_id, **options)


@pytest.fixture
def answers(make, tmp_path):
    """Six questions, right and wrong in turn, answered under two conditions."""
    lines = [
        make(f"q{i}", right=i % 2 == 0, condition=condition)
        for i in range(6)
        for condition in ("plain", "StepFlow")
    ]
    return write_answers(tmp_path / "answers.jsonl", *lines)


def ids(records):
    return [record.id for record in records]


def test_a_map_of_an_answer_is_that_of_the_tokens_the_model_wrote(answers, tiny_model, tiny_tokenizer, out):
    report = analyze_dataset(tiny_model(), answers, out, where=["condition=plain"], limit=2)
    assert report.is_complete and report.total == 2
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines[1:]] == ["q0/plain/0", "q1/plain/0"]
    assert lines[0]["settings"]["format"] == "chatml"
    given = json.loads(answers.read_text().splitlines()[1])
    trace = StepSaliency.load(out / lines[1]["file"]).trace
    assert torch.equal(trace.tokens, torch.tensor(given["tokens"]))
    assert trace == ReasoningTrace.from_tokens(tiny_tokenizer, given["tokens"], format="chatml")
    assert [step.label for step in trace.steps] == ["Q", "T1", "T2", "S1"]


def test_the_last_line_of_an_answer_counts_and_a_torn_one_does_not(make, tmp_path):
    path = write_answers(
        tmp_path / "answers.jsonl",
        make("a", right=True),
        make("b", right=True),
        make("a", right=False),
        {"kind": "note", "id": "x"},
        '{"kind": "answer", "id": 3}',
        make("c", right=True),
    )
    with path.open("a") as file:
        file.write('{"kind": "answer", "id": "torn')
    found = list(read_records(path, group_by="right"))
    assert [record.line for record in found] == [1, 2, 3, 4]
    assert ids(found) == ["b/plain/0", "a/plain/0", "", "c/plain/0"]
    assert [record.group for record in found if not isinstance(record, Unreadable)] == [True, False, True]
    assert "id is a int, expected a string" in found[2].reason and found[2].unit == "row"
    assert open_traces(path).count() == 4 and open_traces(path).count(3) == 3


def test_a_folder_is_read_through_its_answer_files(make, tmp_path):
    folder = tmp_path / "run"
    write_answers(folder / "answers-1-of-2.jsonl", make("b", right=True))
    write_answers(folder / "answers-0-of-2.jsonl", make("a", right=True))
    (folder / "answers-old.jsonl").write_text("something else")
    assert ids(read_records(folder)) == ["a/plain/0", "b/plain/0"]
    assert open_traces(folder).settings == HEADER["settings"]
    other = {**HEADER, "settings": {**HEADER["settings"], "model_name": "small"}}
    write_answers(folder / "answers.jsonl", header=other)
    with pytest.raises(
        InputFileError, match=r"answers.jsonl: a header with model_name 'small', another .*'tiny'"
    ):
        open_traces(folder)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["condition=plain"], ["q0/plain/0", "q1/plain/0", "q2/plain/0"]),
        (["right=false", "condition=plain"], ["q1/plain/0", "q3/plain/0", "q5/plain/0"]),
        (["right=true", "right=false", "question_id=q4"], ["q4/plain/0", "q4/StepFlow/0"]),
        (["sample=0", "id=q3/plain/0"], ["q3/plain/0"]),
        (["sample=0.0", "id=q3/plain/0"], ["q3/plain/0"]),
        (["sample=1"], []),
        (["right=1"], []),
        (["right=True"], []),
        (["no_such_field=x"], []),
        (["condition=[["], []),
    ],
)
def test_rows_are_chosen_by_the_values_of_their_fields(where, expected, answers):
    source = open_traces(answers, where)
    assert ids(read_records(source, limit=3)) == expected
    assert source.count(3) == len(expected)


def test_every_kind_of_file_lets_rows_be_chosen_and_what_cannot_be_read_stays(write_lines, make_record):
    path = write_lines(make_record("a", level=3), "{broken", make_record("b", level=4), make_record("c"))
    found = list(read_records(open_traces(path, ["level=4"])))
    assert [(item.line, item.id) for item in found] == [(2, ""), (3, "b")]


def test_rows_that_are_not_chosen_are_no_failures_and_none_chosen_is_refused(answers, tiny_model, out):
    report = analyze_dataset(tiny_model(), answers, out, where=["condition=plain", "question_id=q0"])
    assert dict(report.counts) == {"analysed": 1}
    with pytest.raises(InputFileError, match=r"answers.jsonl holds no row with condition=plian"):
        analyze_dataset(tiny_model(), answers, out, where=["condition=plian"])
    with pytest.raises(ValueError, match="'condition' is not FIELD=VALUE, such as condition=plain"):
        analyze_dataset(tiny_model(), answers, out, where=["condition"])


def test_right_and_wrong_answers_are_compared_and_paired_within_their_question(
    make, tiny_model, tmp_path, out
):
    """The samples of a question are averaged within right and wrong, then paired: the whole path."""
    rights = {"q0": [True, False, True], "q1": [False, True, False], "q2": [True, False, False]}
    rights |= {"q3": [True, True, True], "q4": [False, False, False]}
    lines = [
        make(name, right=right, sample=sample)
        for name, answered in rights.items()
        for sample, right in enumerate(answered)
    ]
    path = write_answers(tmp_path / "answers.jsonl", *lines)
    report = analyze_dataset(tiny_model(), path, out, group_by="right", pair_by="question_id")
    found = report.comparison
    assert report.paired_by == "question_id" and found.names == ("right", "not right")
    assert found.n_traces == (7, 8)
    assert (found.pairing.n_pairs, found.pairing.n_dropped, found.pairing.n_averaged) == (3, 2, 3)
    maps = {
        line["id"]: StepSaliency.load(out / line["file"])
        for line in map(json.loads, (out / "manifest.jsonl").read_text().splitlines()[1:])
    }
    sides = [[line for line in lines if line["right"] is value] for value in (True, False)]
    by_hand = compare(
        *([maps[line["id"]] for line in side] for side in sides),
        names=found.names,
        pair_by=tuple([line["question_id"] for line in side] for side in sides),
    )
    assert found == by_hand
    assert analyze_dataset(tiny_model(), path, out, group_by="right").comparison.pairing is None


def test_tokens_of_another_tokenizer_are_refused(make, tiny_model, tmp_path, out):
    lines = [make("a", right=True), make("b", right=True)]
    lines[1]["question"] = "What did the other model read here?"
    lines[0]["question"] = "  WHAT is ａ+1?\n"  # white space, case and width are the template's business
    watcher = Notes()
    path = write_answers(tmp_path / "answers.jsonl", *lines)
    report = analyze_dataset(tiny_model(), path, out, watcher=watcher)
    assert dict(report.counts) == {"analysed": 1, "failed": 1}
    assert "id 'b/plain/0': its tokens do not read as its question" in " ".join(watcher.messages)
    assert watcher.messages[0].startswith("these answers are tiny's, and ")


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], "field 'tokens' is empty"),
        ([1, "x"], "field 'tokens' holds a string at 1, expected token ids"),
        ([1, 2.0], "field 'tokens' holds a number at 1"),
        ([True], "field 'tokens' holds true or false at 0"),
    ],
)
def test_tokens_that_are_none_are_named(tokens, said, write_lines, make_record):
    (found,) = read_records(write_lines({**make_record(), "tokens": tokens}))
    assert said in found.reason


def test_a_number_of_tokens_is_a_field_like_any_other(write_lines, make_record):
    (found,) = read_records(write_lines(make_record("a", tokens=120)))
    assert found.tokens is None and found.thinking == make_record()["thinking"]


def test_tokens_need_no_other_field_and_come_before_all(write_lines, make):
    line = make("a", right=True)
    bare, with_parts = read_records(write_lines({"tokens": line["tokens"]}, {**line, "thinking": 3}))
    assert bare.id == "line-1" and bare.tokens == with_parts.tokens == tuple(line["tokens"])
    assert (with_parts.thinking, with_parts.question) == ("", line["question"])
    assert bare.size == 4 * len(line["tokens"])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([{**HEADER, "schema": 2}], "ledger of answers schema 2"),
        ([HEADER, "x" * 100], None),
    ],
)
def test_a_later_version_is_refused_and_a_line_that_is_none_costs_itself(lines, said, make, tmp_path):
    path = write_answers(tmp_path / "answers.jsonl", *lines[1:], make("a", right=True), header=lines[0])
    if said is None:
        assert [isinstance(item, Unreadable) for item in read_records(path)] == [True, False]
        return
    with pytest.raises(InputFileError, match=said):
        open_traces(path)


def test_what_is_no_ledger_is_read_as_what_it_is(write_lines, make_record, tmp_path):
    for first in ('{"kind": "header"}', "[1]", "{"):
        path = write_lines(first, make_record("a"))
        assert not AnswerRows.are_at(path) and len(list(read_records(path))) == 2
    assert not AnswerRows.are_at(tmp_path) and not AnswerRows.are_at(tmp_path / "nowhere")


def test_format_and_splitter_are_the_answers_own_where_nobody_says_otherwise():
    said = {"format": "boxed", "splitter": "line"}
    found = RunOptions().for_source(said)
    assert (found.format, found.splitter) == ("boxed", "line")
    found = RunOptions(format="qwen3", splitter="sentence").for_source(said)
    assert (found.format, found.splitter) == ("qwen3", "sentence")
    found = RunOptions().for_source({"format": None, "splitter": "RegexSplitter('x')"})
    assert (found.format, found.splitter) == ("auto", "paragraph")
