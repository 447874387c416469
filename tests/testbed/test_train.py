"""Training: what a batch holds, that it learns, and that equal seeds give equal weights."""

import random
import sys

import pytest
import torch

from stepflow_tl import ReasoningTrace
from stepflow_tl.testbed import ProblemSpec, load_testbed_model
from stepflow_tl.testbed.vocabulary import build_tokenizer

SETTINGS = dict(
    tokens=60_000, batch_tokens=600, rate=2e-3, steps_from=2, steps_to=3, mastered=0.1, seed=0, graded=2
)


def test_a_batch_holds_whole_texts_of_one_kind(training):
    tokenizer = build_tokenizer()
    tokens, n_prompt = training.batch_of(ProblemSpec(n_steps=4), random.Random(0), tokenizer, 2000)
    assert tokens.numel() <= 2000 < tokens.numel() + tokens.shape[1]
    assert len({tuple(row.tolist()) for row in tokens}) == len(tokens)
    for row in tokens[:5]:
        assert tokenizer.decode(row[:n_prompt]).endswith("<think>\n")
        trace = ReasoningTrace.from_tokens(tokenizer, row)
        assert [step.label for step in trace.steps] == ["Q", "T1", "T2", "T3", "T4", "S1"]


@pytest.mark.slow
def test_it_learns_and_equal_seeds_give_equal_weights(capsys, monkeypatch, training):
    monkeypatch.setattr(training, "REPORT_TOKENS", 30_000)
    train = training.train
    train(SETTINGS)
    losses = [float(line.split("NLL ")[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[0] > losses[1] and losses[1] < 2.5  # of log(75) = 4.3; the means of 50 batches each
    short = {**SETTINGS, "tokens": 6_000}
    first, again, other = train(short), train(short), train({**short, "seed": 1})
    state = first.state_dict()
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    assert any(not torch.equal(state[name], value) for name, value in other.state_dict().items())


def test_the_rate_warms_up_and_falls(training):
    rate = training._rate
    assert rate(0, 0.0) == pytest.approx(0.01) and rate(99, 0.0) == pytest.approx(1.0)
    assert rate(10_000, 1.0) == pytest.approx(0.1)


def test_the_script_writes_a_folder_that_loads(capsys, monkeypatch, training, tmp_path):
    options = "--tokens 1500 --batch-tokens 600 --steps-from 2 --steps-to 3 --graded 2".split()
    monkeypatch.setattr(sys, "argv", ["train_testbed.py", "--out", str(tmp_path / "model"), *options])
    monkeypatch.setattr(training, "GRADED_STEPS", (2,))
    training.main()
    assert capsys.readouterr().out == f"wrote {tmp_path / 'model'}\n"
    assert load_testbed_model(folder=tmp_path / "model").cfg.model_name == "stepflow-testbed"
    card = (tmp_path / "model" / "card.md").read_text()
    assert "train_testbed.py --tokens 1500 --batch-tokens 600 --rate 0.0015 --steps-from 2" in card
