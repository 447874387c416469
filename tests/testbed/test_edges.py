"""Ranking scores against true edges, checked against pair counting and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflow_tl import ReasoningTrace
from stepflow_tl.errors import ProblemError
from stepflow_tl.testbed import ProblemSpec, make_problems
from stepflow_tl.testbed.edges import EdgeRow, edge_rows, score_rows, shuffled, trace_of
from stepflow_tl.testbed.vocabulary import build_tokenizer


def tokenizer():
    return build_tokenizer()


def one_row(scores, needed):
    step_map = np.zeros((1, len(scores)))
    step_map[0] = scores
    return score_rows([EdgeRow(0, tuple(range(len(scores))), np.array(needed))], step_map)


def test_rows_name_the_steps_that_the_text_mentions():
    for problem in make_problems(ProblemSpec(n_steps=9, n_distractors=2), 30, seed=5):
        trace = trace_of(tokenizer(), problem)
        texts = [step.text.strip() for step in trace.steps]
        for sources in ("both", "premises", "steps"):
            for row in edge_rows(problem, trace, sources):
                own, body = texts[row.query][0], texts[row.query].split(" = ")[1]
                for candidate, is_needed in zip(row.candidates, row.needed, strict=True):
                    name = texts[candidate][0]
                    is_premise = texts[candidate].count(" = ") == 1
                    needed = name == own if is_premise else name in body
                    assert is_needed == needed
                    assert candidate < row.query and (sources != "premises" or is_premise)


def test_carried_rows_point_one_step_behind_the_source():
    found = 0
    for problem in make_problems(ProblemSpec(n_steps=9), 20, seed=6):
        trace = trace_of(tokenizer(), problem)
        first = next(step.index for step in trace.steps if step.label == "T1")
        for row in edge_rows(problem, trace, "carried"):
            i = row.query - first
            sources = {j for k, j in problem.step_edges if k == i}
            carriers = {j + 1 for j in sources if j + 1 < i}
            needed = {c - first for c, is_needed in zip(row.candidates, row.needed, strict=True) if is_needed}
            assert needed == carriers
            assert {c - first for c in row.candidates} == set(range(i)) - (sources - carriers)
            found += 1
    assert found > 60


def test_a_question_in_one_step_is_refused():
    (problem,) = make_problems(ProblemSpec(), 1, seed=0)
    trace = ReasoningTrace.from_parts(tokenizer(), problem.question, problem.thinking, problem.answer)
    with pytest.raises(ProblemError, match="has 1 steps, the problem 8 premises.*question_splitter='line'"):
        edge_rows(problem, trace)


@pytest.mark.parametrize(
    ("scores", "needed", "expected"),
    [
        ([3.0, 2.0, 1.0], [True, False, False], (1, 1, 1)),
        ([1.0, 2.0, 3.0], [True, False, False], (0, 1 / 3, 0)),
        ([1.0, 1.0, 1.0, 1.0], [True, False, False, False], (0.5, 0.25, 0.25)),
        ([4.0, 3.0, 2.0, 1.0], [True, False, True, False], (0.75, (1 + 2 / 3) / 2, 1)),
        ([2.0, 2.0, 1.0], [True, False, False], (0.75, 0.5, 0.5)),
    ],
)
def test_scores_by_hand(scores, needed, expected):
    assert one_row(scores, needed) == pytest.approx(expected)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12))
def test_auroc_is_the_part_of_pairs_in_the_right_order(pairs):
    scores, needed = zip(*pairs, strict=True)
    if all(needed) or not any(needed):
        return
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, is_needed in pairs
        if is_needed
        for b, other in pairs
        if not other
    ]
    assert one_row(np.array(scores, dtype=float), needed)[0] == pytest.approx(sum(wins) / len(wins))


def test_shuffled_edges_leave_the_best_score_at_chance():
    rng, found = np.random.default_rng(0), []
    for problem in make_problems(ProblemSpec(n_steps=8), 150, seed=1):
        trace = trace_of(tokenizer(), problem)
        rows = edge_rows(problem, trace)
        oracle = np.zeros((len(trace.steps), len(trace.steps)))
        for row in rows:
            oracle[row.query, list(row.candidates)] = row.needed
        assert score_rows(rows, oracle) == pytest.approx((1, 1, 1))
        other = shuffled(rows, rng)
        assert [row.needed.sum() for row in other] == [row.needed.sum() for row in rows]
        found.append(score_rows(other, oracle)[0])
    assert abs(np.mean(found) - 0.5) < 4 * np.std(found) / len(found) ** 0.5
