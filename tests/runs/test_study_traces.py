"""Which answers of a study are mapped: balanced, nested, in an order decided by the seed and the ids."""

import json
import random
from dataclasses import replace

import pytest
from study_findings import PLAIN, REPAIR, make_evaluation

from stepflow_tl.runs.study_traces import (
    changes,
    choose_traces,
    trace_row,
    with_pages,
    write_rows,
)


def third(question):
    return question % 3 == 0


def mixed(question):
    """Three samples: question 0 always right, 1 always wrong, the others both."""
    return [True] * 3 if question == 0 else [False] * 3 if question == 1 else [True, False, False]


def with_answers(evaluation, **changes):
    """The plain answers to question 0 changed."""
    plain = evaluation.results[PLAIN]
    first = tuple(replace(answer, **changes) for answer in plain.answers[0])
    results = {**evaluation.results, PLAIN: replace(plain, answers=(first, *plain.answers[1:]))}
    return replace(evaluation, results=results)


def test_at_most_so_many_of_each_group_are_taken_and_the_rest_is_stated():
    choice = choose_traces(make_evaluation(30, {PLAIN: third}), 12, seed=0)
    assert len(choice.ids(True)) == 10 and len(choice.ids(False)) == 12
    assert choice.left_out == ("8 of 20 wrong plain answers are not mapped (--maps 12)",)
    assert all(row.right is third(int(row.question_id[1:])) for row in choice.rows)
    assert choice.rows[0].tokens == (1, 2, 3 + int(choice.rows[0].question_id[1:]), 4)


def test_more_maps_add_traces_and_change_none():
    evaluation = make_evaluation(12, {PLAIN: mixed})
    small, large = (choose_traces(evaluation, n, seed=3) for n in (4, 9))
    for right in (True, False):
        assert large.ids(right)[:4] == small.ids(right)
    assert choose_traces(evaluation, 4, seed=4).rows != small.rows


def test_questions_with_both_come_first_and_each_question_once_before_any_twice():
    choice = choose_traces(make_evaluation(6, {PLAIN: mixed}), 5, seed=0)
    right = [row.question_id for row in choice.rows if row.right]
    wrong = [row.question_id for row in choice.rows if row.right is False]
    assert set(right[:4]) == set(wrong[:4]) == {"q2", "q3", "q4", "q5"}
    assert right[4:] == ["q0"] and wrong[4:] == ["q1"]


def test_of_a_question_with_both_the_pair_nearest_in_tokens_comes_first():
    evaluation = make_evaluation(8, {PLAIN: lambda i: [True, False, i % 2 == 0, False]})
    plain, rng = evaluation.results[PLAIN], random.Random(0)
    answers = [
        tuple(replace(answer, tokens=answer.tokens * rng.randrange(1, 90)) for answer in row)
        for row in plain.answers
    ]
    results = {PLAIN: replace(plain, answers=tuple(answers))}
    choice = choose_traces(replace(evaluation, results=results), 8, seed=0)
    chosen = {(row.question_id, row.right): len(row.tokens) for row in choice.rows}
    for i, (row, verdicts) in enumerate(zip(answers, plain.verdicts, strict=True)):
        best = None
        for answer, verdict in zip(row, verdicts, strict=True):
            for other, its_verdict in zip(row, verdicts, strict=True):
                gap = abs(len(answer.tokens) - len(other.tokens))
                if verdict and not its_verdict and (best is None or gap < best[0]):
                    best = gap, len(answer.tokens), len(other.tokens)
        assert best is not None and (chosen[f"q{i}", True], chosen[f"q{i}", False]) == best[1:]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"finished": False}, "1 plain answers were cut off by the token limit"),
        ({"thinking": " \n"}, "1 plain answers have no thinking or no summary"),
        ({"summary": ""}, "1 plain answers have no thinking or no summary"),
    ],
)
def test_an_answer_that_cannot_be_compared_is_left_out_and_counted(changed, reason):
    choice = choose_traces(with_answers(make_evaluation(4, {PLAIN: third}), **changed), 5, seed=0)
    assert choice.left_out == (reason,) and "q0/plain/0" not in choice.ids(True)


def test_changes_take_turns_and_name_a_sample_that_shows_them():
    rules = {PLAIN: lambda i: [i < 2, False], REPAIR: lambda i: [False, i in (2, 4, 5)]}
    found = changes(make_evaluation(6, rules), REPAIR)
    assert [(change.question, change.gained, change.sample) for change in found] == [
        (2, True, 1),
        (0, False, 0),
        (4, True, 1),
        (1, False, 0),
        (5, True, 1),
    ]


def test_an_answer_shown_but_not_chosen_is_in_the_file_without_right(tmp_path):
    evaluation = make_evaluation(6, {PLAIN: third, REPAIR: lambda i: i == 1})
    chosen = choose_traces(evaluation, 1, seed=0).rows
    rows = with_pages(evaluation, chosen, changes(evaluation, REPAIR), PLAIN)
    write_rows(tmp_path / "traces.jsonl", rows)
    lines = [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    by_id = {line["id"]: line["right"] for line in lines}
    assert {by_id[row.id] for row in chosen} == {True, False}
    assert {"q0/plain/0", "q1/plain/0", "q3/plain/0"} <= by_id.keys()
    assert list(by_id.values()).count(None) == len(lines) - 2
    other = with_pages(evaluation, chosen, changes(evaluation, REPAIR), REPAIR)
    assert {row.id for row in other} == {row.id for row in chosen} | {f"q{i}/StepFlow/0" for i in (0, 1, 3)}


def test_an_answer_of_nothing_gets_no_page():
    evaluation = with_answers(
        make_evaluation(2, {PLAIN: third, REPAIR: lambda i: False}), thinking="", summary=""
    )
    assert with_pages(evaluation, (), changes(evaluation, REPAIR), PLAIN) == []
    assert trace_row(evaluation, 1, PLAIN, 0).id == "q1/plain/0"
