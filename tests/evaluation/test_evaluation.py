"""The evaluation as a whole: what it asks, what it counts, and what its table says."""

import json
from dataclasses import replace

import numpy as np
import pytest

from stepflow_tl import StepFlow
from stepflow_tl.errors import ProblemError
from stepflow_tl.evaluation import (
    Answer,
    Decoding,
    evaluate,
    exact,
    grid,
    search,
    standard_conditions,
    steps,
)


def short(**options):
    return Decoding(**{"max_new_tokens": 8, "batch_size": 5, **options})


def test_every_condition_answers_every_question(model, questions):
    told = []
    found = evaluate(model, questions, decoding=short(), progress=told.append)
    assert list(found.results) == [
        "plain",
        "bridge",
        "momentum",
        "StepFlow",
        "bridge control",
        "momentum control",
        "StepFlow control",
    ]
    assert [line.split(":")[0] for line in told] == list(found.results)
    assert found.difficulties == ("2 steps", "4 steps", "3 steps")
    assert all(len(result.answers) == 9 for result in found.results.values())
    assert found.results["plain"].n_tokens == sum(a.n_new for (a,) in found.results["plain"].answers)
    assert found.results["plain"].unfinished > 0.5  # random weights do not end within eight tokens
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_scores_differences_and_tables_follow_the_grader(model, questions):
    calls = []

    def grader(question, answer):
        calls.append(question.id)
        return len(calls) % 3 == 0  # plain: questions 3, 6, 9; then again 3, 6, 9

    found = evaluate(
        model,
        questions,
        conditions={"plain": None, "bridge": StepFlow(alpha=0.0)},
        decoding=short(),
        grader=grader,
    )
    assert found.accuracy("plain") == pytest.approx(1 / 3)
    assert found.accuracy("plain", "2 steps") == pytest.approx(1 / 3)
    assert found.difference("bridge", "plain").gained == 0
    table = found.table()
    assert "plain: 0.3333 right" in table and "McNemar" in table and "paired over 9 questions" in table
    (row,) = [line for line in table.splitlines() if line.strip().startswith("bridge  0.3333  ")]
    assert row.split() == ["bridge", "0.3333", "no", "answer", "differs", "0", "0", "-", "-"]
    data = json.loads(found.to_json())
    assert data["conditions"]["plain"]["scores"] == [0, 0, 1] * 3
    assert data["differences"][0]["condition"] == "bridge" and data["decoding"]["max_new_tokens"] == 8
    assert data["conditions"]["bridge"]["flow"].startswith("StepFlow(")


def test_several_samples_score_their_mean(model, questions):
    found = evaluate(
        model,
        questions[:4],
        conditions={"plain": None},
        decoding=short(n_samples=4, temperature=1.0),
        grader=lambda question, answer: answer.tokens[-1] % 2 == 0,
    )
    scores = found.results["plain"].scores
    assert set(np.round(scores * 4, 9) % 1) == {0} and len(scores) == 4
    assert "sign flips" not in found.table()  # one condition: nothing to compare


def test_nothing_to_ask_is_refused(model, questions):
    with pytest.raises(ValueError, match="no questions"):
        evaluate(model, [])
    with pytest.raises(ValueError, match="no conditions"):
        evaluate(model, questions, conditions={})

    with pytest.raises(ValueError, match="both halves on"):
        standard_conditions(StepFlow(alpha=0.0))


def test_search_chooses_on_validation_and_reports_on_test_questions(model, questions):
    candidates = grid(tau_max=[0.1, 0.3], alpha=[0.0, 0.5])
    assert [(c.tau_max, c.alpha) for c in candidates] == [(0.1, 0), (0.1, 0.5), (0.3, 0), (0.3, 0.5)]
    asked = []

    def grader(question, answer):
        asked.append(question.id)
        return len(asked) > 6 and len(asked) <= 9  # three validation questions: the third candidate is right

    found = search(model, questions, candidates, validation_part=1 / 3, decoding=short(), grader=grader)
    assert found.chosen is candidates[2]
    assert [score for _, score in found.validation] == [0, 0, 1, 0]
    validation, test = set(asked[:12]), set(asked[12:])
    assert len(validation) == 3 and len(test) == 6 and not validation & test
    assert {q.difficulty for q in questions if q.id in validation} == {"2 steps", "3 steps", "4 steps"}
    assert list(found.test.results) == ["plain", "StepFlow", "StepFlow control"]
    assert found.test.results["StepFlow control"].flow.placebo == "bridge"
    with pytest.raises(ValueError, match="no candidates"):
        search(model, questions, [])
    with pytest.raises(ValueError, match="one side would be empty"):
        search(model, questions, candidates, validation_part=0.01)


def test_regrading_counts_the_same_answers_anew(model, questions):
    found = evaluate(model, questions, conditions={"plain": None}, decoding=short())
    again = found.regraded(lambda question, answer: question.id.endswith("0"))
    assert again.accuracy("plain") == pytest.approx(1 / 9) and found.accuracy("plain") != again.accuracy(
        "plain"
    )
    assert again.results["plain"].answers == found.results["plain"].answers
    assert again.regraded(lambda question, answer: True).accuracy("plain") == 1


def test_the_grader_of_steps_wants_every_step_right(questions):
    question = questions[0]
    right = Answer((), question.problem.thinking, f"\n\n{question.answer}", 1, True)
    assert steps(question, right) and exact(question, right)
    last = question.problem.derivations[0]
    slip = replace(
        right, thinking=right.thinking.replace(last.text, last.text[:-1] + str((last.value + 1) % 10))
    )
    assert exact(question, slip) and not steps(question, slip)
    assert not steps(question, replace(right, summary="x"))
    with pytest.raises(ProblemError, match="'testbed-0' has no testbed problem"):
        steps(replace(question, problem=None), right)
