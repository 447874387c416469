"""The script behind "Reading maps": its checks check, and the page shows its tables."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from stepflow_tl import load_testbed_model, step_saliency
from stepflow_tl.testbed import ProblemSpec, make_problems

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wrong_reading", ROOT / "docs/scripts/wrong_reading.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return load_testbed_model()


@pytest.fixture(scope="module")
def problems():
    return make_problems(ProblemSpec(n_steps=4), 2, seed=0)


@pytest.fixture(scope="module")
def maps(script: ModuleType, model, problems):
    return [step_saliency(model, script.trace_of(model.tokenizer, problem)) for problem in problems]


def test_the_page_has_the_columns_of_the_script(script: ModuleType, model, problems, maps):
    effects = [script.earlier_effects(model, p, m.trace) for p, m in zip(problems, maps, strict=True)]
    rng = np.random.default_rng(0)
    page = (ROOT / "docs/reading_maps.md").read_text("utf-8")
    first = script.darkest_table(problems, maps, effects, rng).splitlines()
    second = script.lock_in_table(model, problems, maps, 0, rng).splitlines()
    assert first[0] in page and second[0] in page
    assert len(first[2].split("|")) == len(first[0].split("|"))


def test_a_cut_in_pairs_keeps_the_flow(script: ModuleType, model, problems, maps):
    coarse = step_saliency(model, script.cut_in_pairs(model.tokenizer, problems[0]))
    assert len(coarse.trace.steps) == len(maps[0].trace.steps) - 2
    script.check_same_flow(maps[0], coarse)
    with pytest.raises(ValueError, match="changed the saliency"):
        script.check_same_flow(maps[0], replace(coarse, sums=1.1 * coarse.sums))
    with pytest.raises(ValueError, match="changed the saliency"):
        script.check_same_flow(maps[0], maps[0])


def test_needed_steps_are_earlier_ones(script: ModuleType, problems, maps):
    rows = script.needed_rows(problems[0], maps[0].trace)
    assert len(rows) == 4
    assert all(needed and max(needed) < i for i, needed in rows.items())
    step_map = np.zeros((max(rows) + 1,) * 2)
    step_map[:, 0], step_map[:, -1] = 1, 9  # what is not earlier does not count
    assert set(script.darkest_earlier(step_map, rows).values()) == {0}


def test_the_figure_shows_every_thinking_row(script: ModuleType, problems, maps):
    drawn = script.figure(problems[0], maps[0])
    assert len(drawn.axes) == 5
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == ["T1", "T2", "T3", "T4"]
