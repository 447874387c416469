"""Training: what a batch holds, that it learns, and that equal seeds give equal weights."""

import random
import sys

import pytest
import torch

from stepflow_tl import ReasoningTrace
from stepflow_tl.testbed import ProblemSpec, load_testbed_model
from stepflow_tl.testbed.vocabulary import build_tokenizer

SETTINGS = dict(
    tokens=60_000,
    batch_tokens=600,
    rate=2e-3,
    steps_from=2,
    steps_to=3,
    mastered=0.1,
    layers=6,
    n_asked=1,
    long_steps=False,
    seed=0,
    graded=2,
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


def test_shorter_texts_are_filled_up_and_their_end_counts_once(training):
    tokenizer = build_tokenizer()
    spec = ProblemSpec(n_steps=4, n_asked=2, long_steps=True)
    tokens, n_prompt = training.batch_of(spec, random.Random(0), tokenizer, 2000)
    end = tokenizer.eos_token_id
    assert (tokens[:, -1] == end).all() and (tokens[:, -2] == end).any() and (tokens[:, -2] != end).any()
    targets = training.targets_of(tokens, n_prompt, tokenizer)
    for row, target in zip(tokens[:, n_prompt:].tolist(), targets.tolist(), strict=True):
        length = row.index(end) + 1
        assert target == row[:length] + [-100] * (len(row) - length)
        answer = tokenizer.decode(row[: length - 1]).split("</think>")[1]
        assert answer[-9::4].strip().isdigit() and answer.count(" + ") == answer.count(" = ") == 1


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(capsys, monkeypatch, training, tmp_path):
    settings = {**SETTINGS, "tokens": 3_000, "n_asked": 2, "long_steps": True, "layers": 12}
    whole, _ = training.train(settings)
    rate = training._rate

    def stop(update, progress):
        if update == 3:
            raise KeyboardInterrupt
        return rate(update, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "_rate", stop)
        training.train(settings, tmp_path / "held", 0.0)
    with pytest.raises(SystemExit, match="was written with other settings"):
        training.train({**settings, "seed": 1}, tmp_path / "held", 0.0)
    resumed, _ = training.train(settings, tmp_path / "held", 0.0)
    state = resumed.state_dict()
    assert len(resumed.model.layers) == 12
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())


@pytest.mark.slow
def test_it_learns_and_equal_seeds_give_equal_weights(capsys, monkeypatch, training):
    monkeypatch.setattr(training, "REPORT_TOKENS", 30_000)
    train = training.train
    train(SETTINGS)
    losses = [float(line.split("NLL ")[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[0] > losses[1] and losses[1] < 2.5  # of log(75) = 4.3; the means of 50 batches each
    short = {**SETTINGS, "tokens": 6_000}
    (first, _), (again, _), (other, _) = train(short), train(short), train({**short, "seed": 1})
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
