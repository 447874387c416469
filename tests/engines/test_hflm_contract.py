"""What lm-evaluation-harness demands of its `HFLM`, held against a plain `HFLM` on the same tiny model.

The harness' own tests of that class need models of the hub (EleutherAI/pythia-70m) and compare numbers
written down for them; here the plain class is the oracle. It must hold for the class without StepFlow, and
with a StepFlow that acts but is too weak to change a number.
"""

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: make test-engines")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness' own are not ours to judge

from engine_models import QUESTIONS  # noqa: E402

INERT = dict(stepflow=True, format="boxed", splitter="line", tau_max=0, alpha=1e-12)


@pytest.fixture(scope="module")
def oracle(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), dtype="float32", device="cpu", batch_size=3)


@pytest.fixture(scope="module", params=[{}, INERT], ids=["without StepFlow", "weak StepFlow"])
def ours(request, folder):
    from stepflow_tl.engines.lm_harness import StepFlowLM

    return StepFlowLM(str(folder), dtype="float32", device="cpu", batch_size=3, **request.param)


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def chats(engine, **options):
    return [engine.apply_chat_template([{"role": "user", "content": q}], **options) for q in QUESTIONS]


def pairs(engine):
    """Continuations of several lengths, with a space that moves over, after one context or several."""
    endings = ("One.\nTwo.\nSo 14.", "No.\nYes", "\na\nb\nc")
    found = [(chat, ending) for chat in chats(engine) for ending in endings]
    return [*found, (chats(engine)[0] + "One. ", "Two.\nThree."), ("", "One.\nTwo.")]


def choices(engine):
    """Continuations of one token: the harness reads each context once."""
    return [(chat + "One.\nTwo.\n", letter) for chat in chats(engine) for letter in "ABCD"]


def generated(engine, *, tokens=12, **options):
    asked = [(chat, {"until": [], "max_gen_toks": tokens, **options}) for chat in chats(engine)]
    return engine.generate_until(instances("generate_until", asked))


def stopped(engine):
    """Stop sequences that occur, as text and as list; two groups of settings in one call."""
    whole = generated(engine, tokens=24)
    stops = [next(text[i : i + 2] for i in range(3, 20) if text[i : i + 2].isascii()) for text in whole]
    asked = [
        (chat, {"until": stop if i % 2 else [stop, "never"], "max_gen_toks": 24})
        for i, (chat, stop) in enumerate(zip(chats(engine), stops, strict=True))
    ]
    found = engine.generate_until(instances("generate_until", asked))
    assert found == [text.partition(stop)[0] for text, stop in zip(whole, stops, strict=True)]
    return found


def sampled(engine):
    torch.manual_seed(0)
    found = generated(engine, do_sample=True, temperature=1.5, top_p=0.9)
    assert found != generated(engine)
    return found


def one_by_one(engine):
    """Without padding on the left: what is written does not depend on it."""
    asked = [(chat, {"until": [], "max_gen_toks": 12}) for chat in chats(engine)]
    found = [engine.generate_until(instances("generate_until", [each]))[0] for each in asked]
    assert found == generated(engine)
    return found


def rolling(engine):
    texts = [f"{chat}One.\nTwo.\n" for chat in chats(engine)]
    return engine.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))


def encoded(engine):
    texts = ["foo bar", "<|im_start|>bar", "a longer text of more tokens"]
    ids = [engine.tok_encode(text) for text in texts]
    ids += [
        engine.tok_encode(texts[2], left_truncate_len=5),
        engine.tok_encode(texts[0], add_special_tokens=True),
    ]
    batches = [engine.tok_batch_encode(texts, padding_side=side) for side in ("left", "right")]
    batches.append(engine.tok_batch_encode(texts, left_truncate_len=6))
    assert batches[0][1][0, 0] == 0 == batches[1][1][0, -1]  # padded where it should be
    assert [engine.tok_decode(each) for each in ids[:1]] == texts[:1]
    return ids, [(ids.tolist(), mask.tolist()) for ids, mask in batches]


def raw(engine):
    context, mask = engine.tok_batch_encode(chats(engine))
    return engine._model_generate(context, context.shape[1] + 8, ["\n\n"], attention_mask=mask).tolist()


def templated(engine):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    return (
        engine.apply_chat_template(turns[:1]),
        engine.apply_chat_template(turns, add_generation_prompt=False),
        engine.chat_template(True),
        engine.max_length,
        engine.max_gen_toks,
        (engine.eot_token_id, engine.prefix_token_id, engine.vocab_size, engine.rank, engine.world_size),
    )


CONTRACT = {
    "loglikelihood": lambda engine: engine.loglikelihood(instances("loglikelihood", pairs(engine))),
    "one-token continuations": lambda engine: engine.loglikelihood(
        instances("loglikelihood", choices(engine))
    ),
    "loglikelihood_rolling": rolling,
    "generate_until": generated,
    "stop sequences": stopped,
    "sampling": sampled,
    "left padding": one_by_one,
    "encoding": encoded,
    "_model_generate": raw,
    "chat template and facts": templated,
}


@pytest.mark.parametrize("clause", CONTRACT)
def test_each_clause_gives_what_the_plain_class_gives(oracle, ours, clause):
    found, expected = CONTRACT[clause](ours), CONTRACT[clause](oracle)
    assert len(found) == len(expected) > 1
    if "likelihood" in clause or "continuations" in clause:
        scores, wanted = (torch.tensor([each for each in found]).double() for found in (found, expected))
        torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-4)
        assert scores.flatten().std() > 0.1
    else:
        assert found == expected


@pytest.mark.parametrize(
    "options",
    [dict(batch_size="auto:2", max_batch_size=4), dict(logits_cache=False), dict(add_bos_token=True)],
)
def test_the_options_of_the_class_are_served(folder, options):
    from lm_eval.models.huggingface import HFLM

    from stepflow_tl.engines.lm_harness import StepFlowLM

    given = dict(dtype="float32", device="cpu", max_length=160, **{"batch_size": 2, **options})
    engines = [StepFlowLM(str(folder), **given, **INERT), HFLM(str(folder), **given)]
    found, expected = (engine.loglikelihood(instances("loglikelihood", pairs(engine))) for engine in engines)
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3)


def test_a_text_of_several_windows_is_read_without_stepflow_and_refused_with_it(ours, oracle, monkeypatch):
    from stepflow_tl.errors import ModelError

    for engine in (ours, oracle):
        monkeypatch.setattr(engine, "_max_length", 40)
    if ours.stepflow.key:
        with pytest.raises(ModelError, match=r"a text has \d+ tokens and the model's window 40.*no StepFlow"):
            rolling(ours)
    else:
        assert rolling(ours) == pytest.approx(rolling(oracle), abs=1e-3)


def test_thinking_does_not_go_with_loglikelihood(ours, monkeypatch):
    monkeypatch.setattr(ours, "enable_thinking", True)
    with pytest.raises(ValueError, match="enable_thinking=True is not compatible"):
        ours.loglikelihood(instances("loglikelihood", pairs(ours)))
