"""The model that ships: whole, small, and as good as its card says."""

import pytest

from stepflow_tl import load_testbed_model
from stepflow_tl.evaluation import Decoding, evaluate, questions_of, write_answers
from stepflow_tl.models.facts import model_facts
from stepflow_tl.testbed import ProblemSpec, grade, make_problems
from stepflow_tl.testbed.model import SHIPPED, check_files


@pytest.fixture(scope="module")
def model():
    return load_testbed_model()


def card_rows():
    lines = (SHIPPED / "card.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and line[2].isdigit()]
    return {int(steps): float(part) for steps, part in cells}


def test_results_carry_its_own_name(model):
    assert model_facts(model).name == "stepflow-testbed"


def test_its_files_are_whole_and_small():
    check_files(SHIPPED)
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 20e6


def test_it_is_good_on_short_chains_and_not_perfect_on_long_ones():
    rows = card_rows()
    assert min(part for steps, part in rows.items() if steps <= 4) >= 0.9
    assert any(0.4 <= part <= 0.8 for steps, part in rows.items() if steps >= 12)


@pytest.mark.parametrize("n_steps", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_its_card_tells_the_truth(model, n_steps):
    n = 40
    problems = make_problems(ProblemSpec(n_steps=n_steps), n, seed=77)
    found = evaluate(
        model,
        questions_of(problems),
        conditions={"plain": None},
        decoding=Decoding(max_new_tokens=n_steps * 12 + 16, batch_size=n),
    )
    told = card_rows()[n_steps]
    spread = (told * (1 - told) / n) ** 0.5
    assert abs(found.accuracy("plain") - told) <= 4 * spread + 0.05


def test_right_answers_come_with_right_thinking(model):
    problems = make_problems(ProblemSpec(n_steps=3), 10, seed=5)
    decoding = Decoding(max_new_tokens=60, batch_size=10)
    answers, _ = write_answers(model, [problem.question for problem in problems], None, decoding)
    grades = [grade(p, a.thinking, a.summary) for p, (a,) in zip(problems, answers, strict=True)]
    assert sum(verdict.error is None for verdict in grades) >= 9
