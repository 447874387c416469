"""The testbed's text: one token per symbol, and the markers of DeepSeek-R1.

Every letter, digit, operator (with the spaces around it), line break and blank line is one token, so decoding
gives the text back to the last character. The chat template opens the thinking itself, as the R1 distills'
does: the format is detected as `deepseek-r1`.
"""

from __future__ import annotations

from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

from stepflow_tl.testbed.problems import Problem

BEGIN, END, USER, ASSISTANT = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
THINK_TAGS = ("<think>", "</think>")
SYMBOLS = (" = ", " + ", " - ", ": ", "find ", "\n", "\n\n", *digits, *ascii_lowercase, *ascii_uppercase)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}"
    "{% else %}{{ raise_exception('The testbed model knows user and assistant turns only.') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)


def build_tokenizer() -> Any:
    """The testbed's tokenizer, a transformers `PreTrainedTokenizerFast`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    unknown = "<unknown>"
    special = (END, BEGIN, USER, ASSISTANT, unknown)
    names = (*special, *THINK_TAGS, *SYMBOLS)
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" [=+-] |: |find |\n\n|\n|."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in THINK_TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def prompt_of(problem: Problem, tokenizer: Any) -> str:
    """The text before the thinking: the question in the tokenizer's chat template."""
    messages = [{"role": "user", "content": problem.question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
