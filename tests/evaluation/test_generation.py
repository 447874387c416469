"""Answers: the same for every batch size, paired under sampling, cut into thinking and summary."""

import pytest
import torch

from stepflow_tl import ReasoningTrace, StepFlow
from stepflow_tl.evaluation import Decoding, write_answers
from stepflow_tl.evaluation.generation import _answer
from stepflow_tl.testbed import ProblemSpec, make_problems
from stepflow_tl.testbed.train import prompt_of
from stepflow_tl.trace.formats.detection import detect_format


def greedy_by_hand(model, prompt, n_new):
    """One token at a time, without a cache, the whole sequence again for each."""
    tokens = list(prompt)
    for _ in range(n_new):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), return_type="logits")
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == model.tokenizer.eos_token_id:
            break
    return tuple(tokens)


def test_batched_answers_equal_greedy_decoding_by_hand(model, questions):
    texts = [question.text for question in questions]
    for size in (1, 4, 100):
        answers, seconds = write_answers(model, texts, None, Decoding(max_new_tokens=12, batch_size=size))
        assert seconds > 0
        for question, (answer,) in zip(questions, answers, strict=True):
            prompt = model.tokenizer(prompt_of(question.problem, model.tokenizer)).input_ids
            assert answer.tokens == greedy_by_hand(model, prompt, 12)
            assert answer.n_new == len(answer.tokens) - len(prompt)


def test_answers_under_a_flow_equal_one_pass_over_them(model, questions):
    flow = StepFlow(tau_max=0.6, alpha=0.9)
    texts = [question.text for question in questions]
    plain, _ = write_answers(model, texts, None, Decoding(max_new_tokens=16, batch_size=5))
    answers, _ = write_answers(model, texts, flow, Decoding(max_new_tokens=16, batch_size=5))
    assert [a[0].tokens for a in plain] != [a[0].tokens for a in answers]
    for (answer,) in answers:
        trace = ReasoningTrace.from_tokens(model.tokenizer, list(answer.tokens))
        with torch.no_grad(), model.hooks(fwd_hooks=flow.hooks(model, trace)):
            logits = model(trace.tokens[None], return_type="logits")[0]
        first = len(answer.tokens) - answer.n_new
        for position in range(first, len(answer.tokens)):
            best = logits[position - 1].max()
            assert logits[position - 1, answer.tokens[position]] > best - 1e-3  # ties within rounding


def test_samples_share_their_random_numbers_over_conditions(model, questions):
    texts = [question.text for question in questions]
    decoding = Decoding(max_new_tokens=10, temperature=1.0, n_samples=3, batch_size=7, seed=5)
    first, _ = write_answers(model, texts, None, decoding)
    again, _ = write_answers(model, texts, None, decoding)
    off, _ = write_answers(model, texts, StepFlow(tau_max=0.0, alpha=1e-9), decoding)
    other, _ = write_answers(
        model, texts, None, Decoding(max_new_tokens=10, temperature=1.0, n_samples=3, batch_size=7, seed=6)
    )
    assert all(len(samples) == 3 for samples in first)
    assert first == again and first != other
    assert [[a.tokens for a in s] for s in off] == [[a.tokens for a in s] for s in first]
    assert len({a.tokens for samples in first for a in samples}) > len(texts)


def test_the_callers_random_state_is_left_alone(model, questions):
    before = torch.random.get_rng_state()
    write_answers(model, [questions[0].text], None, Decoding(max_new_tokens=3, temperature=0.7))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_written_tokens_are_cut_by_the_formats_markers(model):
    (problem,) = make_problems(ProblemSpec(n_steps=3), 1, seed=0)
    tokenizer = model.tokenizer
    prompt = tokenizer(prompt_of(problem, tokenizer)).input_ids
    end = tokenizer.eos_token
    texts = {
        "whole": f"{problem.thinking}\n</think>\n\n{problem.answer}{end}",
        "no end": f"{problem.thinking}\n</think>\n\n{problem.answer}",
        "thinking only": problem.thinking,
        "nothing": "",
    }
    found = {
        name: _answer(tokenizer, detect_format(tokenizer), prompt, tokenizer(text).input_ids)
        for name, text in texts.items()
    }
    assert found["whole"].thinking == problem.thinking + "\n" and found["whole"].finished
    assert found["whole"].summary == found["no end"].summary == problem.answer
    assert not found["no end"].finished and found["no end"].n_new == found["whole"].n_new - 1
    assert (found["thinking only"].summary, found["nothing"].thinking) == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"n_samples": 0}, "n_samples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p 0"),
        ({"n_samples": 2}, "2 samples of greedy decoding"),
    ],
)
def test_decoding_without_a_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**options)
