"""What a chat template says: the format of each family, and the prompt that asks a model to think."""

import pytest
from trace_material import TEMPLATES, family_tokenizer

from stepflow_tl.errors import FormatError
from stepflow_tl.trace.formats import detect_format, resolve_format
from stepflow_tl.trace.formats.chat_template import question_prompt


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_format_is_detected_from_the_chat_template(family):
    assert detect_format(family_tokenizer(family)).name == family


@pytest.mark.parametrize(
    ("family", "expected"), [("deepseek-r1", "deepseek-r1"), ("chatml", "chatml"), (None, "plain")]
)
def test_without_a_chat_template_the_vocabulary_tells(family, expected):
    tokenizer = family_tokenizer.__wrapped__(family)
    tokenizer.chat_template = None
    assert detect_format(tokenizer).name == expected


def test_a_template_that_cannot_be_rendered_is_read_from_its_source():
    tokenizer = family_tokenizer.__wrapped__("chatml")
    tokenizer.chat_template = "{{ raise_exception('only with tools') }}<|im_start|> <think> enable_thinking"
    assert detect_format(tokenizer).name == "qwen3"


def test_an_unknown_template_is_an_error_that_says_what_to_do():
    tokenizer = family_tokenizer.__wrapped__("chatml")
    tokenizer.chat_template = "{% for m in messages %}USER: {{ m.content }}{% endfor %}"
    with pytest.raises(
        FormatError, match=r"matches no known reasoning format .* format='plain' .*register_format"
    ):
        detect_format(tokenizer)


@pytest.mark.parametrize(
    ("family", "end"), [("gemma-4", "<|turn>model\n"), ("qwen3", "<|im_start|>assistant\n")]
)
def test_a_model_is_asked_to_think(family, end):
    """What is generated from begins where thinking may begin, whatever the template's default."""
    tokenizer = family_tokenizer(family)
    prompt = question_prompt(tokenizer, resolve_format(tokenizer, "auto"), "Hi")
    assert "Hi" in prompt and prompt.endswith(end)
