"""Answers: the same for every batch size, paired under sampling, cut into thinking and summary."""

from contextlib import nullcontext

import pytest
import torch

from stepflow_tl import ReasoningTrace, StepFlow
from stepflow_tl.errors import TraceError
from stepflow_tl.evaluation import AnswerWriter, Decoding, Prompting, evaluate, generation, write_answers
from stepflow_tl.evaluation.decoding import Row, _choose, end_tokens, plan_batches
from stepflow_tl.evaluation.generation import answer_of
from stepflow_tl.models import cached_rows
from stepflow_tl.stepflow.placebo import mixed_seed
from stepflow_tl.testbed import ProblemSpec, load_testbed_model, make_problems
from stepflow_tl.testbed.model import read_weights
from stepflow_tl.testbed.vocabulary import prompt_of
from stepflow_tl.trace.formats.chat_template import detect_format


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


def test_a_plain_transformers_model_is_evaluated_as_its_bridge_is(questions):
    """Same weights, same attention under every condition, so the same answers."""
    plain, tokenizer = read_weights()
    bridge = load_testbed_model()
    plain.tokenizer = tokenizer
    conditions = {"plain": None, "StepFlow": StepFlow(tau_max=0.6, alpha=0.9)}
    options = dict(conditions=conditions, decoding=Decoding(max_new_tokens=60))
    found, expected = (evaluate(model, questions, **options) for model in (plain, bridge))
    for name in conditions:
        assert found.results[name].answers == expected.results[name].answers
    assert found.results["plain"].answers != found.results["StepFlow"].answers


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
        name: answer_of(
            tokenizer, detect_format(tokenizer), prompt, tokenizer(text).input_ids, end_tokens(model)
        )
        for name, text in texts.items()
    }
    assert found["whole"].thinking == problem.thinking + "\n" and found["whole"].finished
    assert found["whole"].summary == found["no end"].summary == problem.answer
    assert not found["no end"].finished and found["no end"].n_new == found["whole"].n_new - 1
    assert (found["thinking only"].summary, found["nothing"].thinking) == ("", "")
    # A token that only the model's embedding has: an answer that cannot be read, not the end of the run.
    beyond = answer_of(tokenizer, detect_format(tokenizer), prompt, [len(tokenizer)], end_tokens(model))
    assert (beyond.thinking, beyond.summary, beyond.n_new) == ("", "", 1)


def test_a_writer_plans_every_answer_once_and_writes_any_part_of_a_batch(model, questions):
    decoding = Decoding(max_new_tokens=6, temperature=1.0, n_samples=2, batch_size=5)
    texts = [question.text for question in questions]
    writer = AnswerWriter(model, texts, decoding)
    rows = [row for batch in writer.batches for row in batch]
    places = [(row.question, row.sample) for row in rows]
    assert sorted(places) == [(i, sample) for i in range(len(texts)) for sample in range(2)]
    assert [len(batch) for batch in writer.batches] == [5, 5, 5, 3]
    whole, seconds = writer.write(writer.batches[1], None)
    part, _ = writer.write(writer.batches[1][1:3], None)
    assert part == whole[1:3] and seconds > 0


def test_the_words_around_a_question_are_the_users_and_the_systems(model):
    prompting = Prompting(prompt="{question} {{x}} {0}")
    assert prompting.turn("a {question}") == "a {question} {{x}} {0}"
    for prompt in ("", "question", "{ question }"):
        with pytest.raises(ValueError, match=r"expected a text with \{question\} in it"):
            Prompting(prompt=prompt)
    (row,), *_ = AnswerWriter(model, ["find a"], Decoding(), Prompting(prompt="A = 1\n{question}")).batches
    (bare,), *_ = AnswerWriter(model, ["A = 1\nfind a"], Decoding()).batches
    assert row.prompt == bare.prompt
    with pytest.raises(TraceError, match="Unknown splitter 'chapter'"):
        AnswerWriter(model, ["find a"], Decoding(), Prompting(splitter="chapter"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"n_samples": 0}, "n_samples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p 0"),
        ({"n_samples": 2}, "2 samples of greedy decoding"),
    ],
)
def test_decoding_without_a_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**options)


@pytest.fixture
def ends_often(model, monkeypatch):
    """Rows that end at different times: a ninth of the vocabulary ends a turn. Counts the rows dropped."""
    ends = frozenset(range(0, int(model.cfg.d_vocab), 9))
    monkeypatch.setattr(generation, "end_tokens", lambda model: ends)
    dropped, keep = [], cached_rows._TransformersRows.keep

    def counted(self, rows):
        dropped.append(len(self._mask) - len(rows))
        keep(self, rows)

    monkeypatch.setattr(cached_rows._TransformersRows, "keep", counted)
    return ends, dropped


FLOWS = [None, StepFlow(tau_max=0.6, alpha=0.9), StepFlow(tau_max=0.6, alpha=0.9, placebo="both")]


@pytest.mark.parametrize("flow", FLOWS, ids=["plain", "StepFlow", "its control"])
def test_a_row_that_leaves_its_batch_changes_no_other(model, questions, ends_often, flow):
    texts = [question.text for question in questions]
    alone, _ = write_answers(model, texts, flow, Decoding(max_new_tokens=25, batch_size=1))
    assert not ends_often[1]
    together, _ = write_answers(model, texts, flow, Decoding(max_new_tokens=25, batch_size=100))
    assert together == alone
    lengths = {answer.n_new for (answer,) in together}
    assert len(lengths) > 2 and sum(ends_often[1]) > 2
    assert all(a.finished == (a.tokens[-1] in ends_often[0]) for (a,) in together)
    if flow is not None:
        plain, _ = write_answers(model, texts, None, Decoding(max_new_tokens=25, batch_size=100))
        assert plain != together


@pytest.mark.parametrize("flow", FLOWS[:2], ids=["plain", "StepFlow"])
def test_greedy_answers_are_those_of_transformers_own_generate(model, questions, flow):
    """The oracle: `generate` of the model inside the bridge, one batch, padded on the left."""
    texts, end = [question.text for question in questions], model.tokenizer.eos_token_id
    answers, _ = write_answers(model, texts, flow, Decoding(max_new_tokens=20, batch_size=100))
    prompts = [list(answer.tokens[: len(answer.tokens) - answer.n_new]) for (answer,) in answers]
    longest = max(map(len, prompts))
    batch = torch.tensor([[end] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    on = nullcontext() if flow is None else flow.generating(model)
    with on:
        whole = model.original_model.generate(
            batch, attention_mask=mask, pad_token_id=end, max_new_tokens=20, do_sample=False
        )
    for (answer,), row in zip(answers, whole[:, longest:].tolist(), strict=True):
        row = row[: row.index(end) + 1] if end in row else row
        assert list(answer.tokens[-answer.n_new :]) == row


def test_a_sample_depends_on_its_question_and_number_alone(model, questions, ends_often):
    texts = [question.text for question in questions]
    options = {"max_new_tokens": 12, "temperature": 1.0, "n_samples": 2, "seed": 3}
    together, _ = write_answers(model, texts, None, Decoding(**options, batch_size=100))
    few, _ = write_answers(model, texts, None, Decoding(**options, batch_size=3))
    backwards, _ = write_answers(model, texts[::-1][:4], None, Decoding(**options, batch_tokens=1))
    assert together == few and together[::-1][:4] == backwards
    assert any(first.tokens != second.tokens for first, second in together)


def test_tokens_are_drawn_from_the_nucleus_in_their_shares():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]].expand(4000, 4)
    for top_p, expected in ((1.0, [0.15, 0.5, 0.05, 0.3]), (0.8, [0, 0.625, 0, 0.375]), (0.01, [0, 1, 0, 0])):
        decoding = Decoding(temperature=1.0, top_p=top_p)
        counts = _choose(logits, range(4000), 7, decoding).bincount(minlength=4) / 4000
        assert torch.allclose(counts, torch.tensor(expected, dtype=torch.float32), atol=0.03), counts
    cold = _choose(logits, range(4000), 7, Decoding(temperature=0.01))
    assert set(cold.tolist()) == {1} == set(_choose(logits, range(4000), 7, Decoding()).tolist())


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("spread", [0.2, 1.0, 4.0])  # the nucleus has all 1 000 tokens, some hundreds, a few
def test_a_draw_among_the_likeliest_is_that_of_the_whole_sorted_vocabulary(top_p, spread):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(60, 1000, generator=generator) * spread).to(torch.bfloat16)  # so that tokens tie
    decoding = Decoding(temperature=0.7, top_p=top_p)
    found = _choose(logits, range(60), 3, decoding).tolist()
    for row, token in enumerate(found):
        shares = (logits[row].double() / 0.7).softmax(-1).tolist()
        nucleus, mass = [], 0.0
        for i in sorted(range(1000), key=lambda i: (-shares[i], i)):
            if mass < top_p:
                nucleus.append(i)
                mass += shares[i]
        at, sum_so_far = mixed_seed(decoding.seed, row, 3) / 2**63 * mass, 0.0
        for i in nucleus:
            sum_so_far += shares[i]
            if sum_so_far > at:
                break
        assert token == i


def test_batches_are_filled_by_tokens_and_by_rows():
    rows = [Row(i, 0, (0,) * n, 0) for i, n in enumerate([30, 10, 10, 20, 100])]

    def lengths(**options):
        decoding = Decoding(max_new_tokens=10, **options)
        return [[len(row.prompt) for row in batch] for batch in plan_batches(rows, decoding, True)]

    assert lengths() == [[10, 10, 20, 30, 100]]
    assert lengths(batch_size=2) == [[10, 10], [20, 30], [100]]
    assert lengths(batch_tokens=90) == [[10, 10, 20], [30], [100]]  # 100 is too long for any, and goes alone
    assert list(map(len, plan_batches(rows, Decoding(), False))) == [2, 1, 1, 1]


def test_the_ends_of_a_turn_are_the_tokenizers_and_the_models(model, monkeypatch):
    config = model.original_model.generation_config
    for told, more in ((None, set()), (3, {3}), ([4, 5], {4, 5})):
        monkeypatch.setattr(config, "eos_token_id", told)
        assert end_tokens(model) == more | {model.tokenizer.eos_token_id}
