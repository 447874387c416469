"""The models that ship: whole, small, and as good as their cards say."""

import pytest

from stepflow_tl import load_testbed_model
from stepflow_tl.errors import ModelError
from stepflow_tl.evaluation import Decoding, evaluate, questions_of, write_answers
from stepflow_tl.models.facts import model_facts
from stepflow_tl.testbed import ProblemSpec, grade, make_problems
from stepflow_tl.testbed.model import DEPTHS, FORMS, SHIPPED, check_files


@pytest.fixture(scope="module", params=DEPTHS)
def model(request):
    return load_testbed_model(n_layers=request.param)


def card_rows(n_layers):
    lines = (SHIPPED[n_layers] / "card.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and line[2].isdigit()]
    return {int(steps): float(part) for steps, part in cells}


def test_results_carry_its_own_name(model):
    assert model_facts(model).name == "stepflow-testbed"


def test_their_files_are_whole_and_small():
    for folder in SHIPPED.values():
        check_files(folder)
    assert sum(file.stat().st_size for folder in SHIPPED.values() for file in folder.iterdir()) < 20e6


def test_a_depth_that_does_not_ship_is_refused():
    with pytest.raises(ModelError, match="n_layers=7: no such testbed model ships"):
        load_testbed_model(n_layers=7)


@pytest.mark.parametrize("n_layers", DEPTHS)
def test_each_is_good_on_short_chains_and_not_perfect_on_long_ones(n_layers):
    rows = card_rows(n_layers)
    assert min(part for steps, part in rows.items() if steps <= 4) >= 0.9
    assert any(0.4 <= part <= 0.8 for steps, part in rows.items() if steps >= 12)


@pytest.mark.parametrize("n_steps", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_its_card_tells_the_truth(model, n_steps):
    n, n_layers = 40, model.cfg.n_layers
    problems = make_problems(ProblemSpec(n_steps=n_steps, **FORMS[n_layers]), n, seed=77)
    longest = max(len(model.tokenizer(problem.thinking).input_ids) for problem in problems)
    found = evaluate(
        model,
        questions_of(problems),
        conditions={"plain": None},
        decoding=Decoding(max_new_tokens=longest + 32, batch_size=n),
    )
    told = card_rows(n_layers)[n_steps]
    spread = (told * (1 - told) / n) ** 0.5
    assert abs(found.accuracy("plain") - told) <= 4 * spread + 0.05


def test_right_answers_come_with_right_thinking(model):
    problems = make_problems(ProblemSpec(n_steps=3, **FORMS[model.cfg.n_layers]), 10, seed=5)
    decoding = Decoding(max_new_tokens=120, batch_size=10)
    answers, _ = write_answers(model, [problem.question for problem in problems], None, decoding)
    grades = [grade(p, a.thinking, a.summary) for p, (a,) in zip(problems, answers, strict=True)]
    assert sum(verdict.error is None for verdict in grades) >= 9
