"""Tokenizers, chat templates and random texts for the tests of traces. Offline; nothing is downloaded."""

from functools import lru_cache
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# One small template a family: our own words, the family's markers.
TEMPLATES = {
    "chatml": CHATML,
    "qwen3": CHATML
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
    "qwq": CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'"),
    "smollm3": (
        "{% set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}"
        "{{ '<|im_start|>system\\nReasoning Mode: ' + mode }}"
        "{{ '\\nUse <think> thoughts </think> answer.<|im_end|>\\n' }}"
    )
    + CHATML,
    "deepseek-r1": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ m.content }}{% endif %}"
        "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif %}"
        "{% if m.role == 'assistant' %}"
        "{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
    ),
    "gpt-oss": (
        "{{ '<|start|>system<|message|>Valid channels: analysis, commentary, final.<|end|>' }}"
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ '<|start|>developer<|message|># Instructions\\n\\n' + m.content + '<|end|>' }}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{# <|channel|> #}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    "phi-4-reasoning": (
        "{{ '<|im_start|>system<|im_sep|>Use <think> {Thought} </think> {Solution}.<|im_end|>' }}"
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "magistral": (
        "{{ bos_token }}[SYSTEM_PROMPT]Think like this: [THINK]thoughts[/THINK]answer.[/SYSTEM_PROMPT]"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}"
        "{{ m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "glm-4.5": (
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "granite": (
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}"
        "{{ '<|end_of_text|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
    ),
    "seed-oss": (
        "{% for m in messages %}{{ '<seed:bos>' + m.role + '\\n' + m.content + '<seed:eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<seed:bos>assistant\\n' }}{% endif %}{# <seed:think> #}"
    ),
    # Thinks unless it is told not to, in a prompt that opens the thinking.
    "command-a": (
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
        "{{ {'user': '<|USER_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'}.get(m.role, '<|CHATBOT_TOKEN|>') }}"
        "{{ '<|START_TEXT|>' + m.content + '<|END_TEXT|><|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|>{% endif %}"
    ),
    "minimax-m2": (
        "]~!b[]~b]system\nHelp.[e~[\n{% for m in messages %}"
        "{{ ']~b]' + {'assistant': 'ai'}.get(m.role, m.role) + '\\n' + m.content + '[e~[\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ ']~b]ai\\n<think>\\n' }}{% endif %}"
    ),
    # Closes thinking in the prompt unless it is switched on.
    "gemma-4": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|turn>' + {'assistant': 'model'}.get(m.role, m.role) + '\\n' + m.content + '<turn|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\\n' }}"
        "{% if not enable_thinking %}{{ '<|channel>thought\\n<channel|>' }}{% endif %}{% endif %}"
    ),
    "kimi-k2": (
        "{% for m in messages %}{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' + m.content }}"
        "<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}{# <|im_user|> #}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role + '\\n' }}"
        "{{ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
        "{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}{% endfor %}"
    ),
    "phi-3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{# <|user|> #}"
    ),
}
SPECIAL = {
    "deepseek-r1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    "gpt-oss": (
        "<|startoftext|>",
        "<|return|>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
        "<|call|>",
    ),
    "phi-4-reasoning": ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|im_sep|>"),
    "magistral": (
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[THINK]",
        "[/THINK]",
    ),
    "glm-4.5": (
        "[gMASK]",
        "<|endoftext|>",
        "<sop>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|observation|>",
    ),
    "granite": ("<|end_of_text|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "</response>"),
    "seed-oss": ("<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>"),
    "command-a": (
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|>",
        "<|USER_TOKEN|>",
        "<|CHATBOT_TOKEN|>",
        "<|SYSTEM_TOKEN|>",
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        "<|START_TEXT|>",
        "<|END_TEXT|>",
    ),
    "minimax-m2": ("]~!b[", "[e~[", "]~b]"),
    "gemma-4": ("<bos>", "<turn|>", "<|turn>", "<|channel>", "<channel|>"),
    "kimi-k2": ("<|im_end|>", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"),
    "gemma": ("<bos>", "<end_of_turn>", "<start_of_turn>"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),
    "phi-3": ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    "llama-3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
}
CHATML_SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")


@lru_cache
def family_tokenizer(family: str | None, tags: str = "added", merges: str = "bytes") -> Any:
    """A tokenizer with the family's chat template.

    Args:
        family: Key of TEMPLATES, or None for no template and no special tokens.
        tags: "added": the family's think tags are tokens; "plain": they are spelled out.
        merges: "bytes": one token a byte; "straddling": tokens that cross every kind of boundary;
            "sentencepiece": words with `▁`, other characters as byte-fallback tokens.
    """
    specials = () if family is None else SPECIAL.get(family, CHATML_SPECIAL)
    if tags == "plain":
        specials = tuple(s for s in specials if "THINK" not in s)
    backend = {"bytes": _bytes, "straddling": _straddling, "sentencepiece": _sentencepiece}[merges]()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    if tags == "added" and family is not None:
        backend.add_tokens(
            [AddedToken(tag, normalized=False, special=False) for tag in ("<think>", "</think>")]
        )
    names = {"bos_token": specials[0], "eos_token": specials[1]} if specials else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    if family is not None:
        tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


def _bytes() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _straddling() -> Tokenizer:
    """Trained without splitting at words, so tokens run across sentences, lines, markers and characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    texts = [
        "So.\n\nBut x = 3.14. Then",
        "a</think>\n\nb",
        "<think>\nOk",
        " 答案。好 🙂",
        "user\nHi",
        "\r\n\r\nA. B",
    ]
    backend.train_from_iterator(texts * 3, trainer)
    return backend


def _sentencepiece() -> Tokenizer:
    words = [
        "▁",
        "▁So",
        "▁the",
        "▁answer",
        "a",
        "b",
        "<",
        "think",
        ">",
        "/",
        ".",
        "\n",
        "\n\n",
        "▁Then",
        "T",
        "h",
    ]
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    vocab.update({word: len(vocab) + i for i, word in enumerate(words)})
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


_FRAGMENTS = (
    [
        "So",
        "But wait",
        "x = 3.14",
        "3.",
        "12)",
        "e.g.",
        "Dr. Who",
        "etc.",
        "Ok.",
        "No!",
        "Why?",
        "...",
        "word",
    ]
    + [
        "Then",
        " ",
        "\n",
        "\n\n",
        "\r\n",
        "\r\n\r\n",
        "\n \n",
        "\t",
        "",
        "\f",
        "$x. Y$",
        "$5",
        "$400 000",
        "$",
    ]
    + ["$$a. B$$", "\\(a. B\\)", "\\[", "\\]", "\\begin{x}", "\\end{x}", "`a. B`", "```", "<", "</", "<thi"]
    + ["</think", "<|im_", "<|im_start|>us", "🙂", "👩‍🔬", "答案。", "é", "\u3000", "\u00a0", "\ufffd", "。”"]
)
_MARKERS = [
    "<think>",
    "</think>",
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
    "<|im_end|>",
    "<|im_start|>system\n",
]


def texts(markers: bool = False) -> st.SearchStrategy[str]:
    """Prose, numbers, LaTeX, code, CRLF, emoji, beginnings of markers; whole ones on request."""
    part = st.sampled_from(_FRAGMENTS + (_MARKERS if markers else [])) | st.text(
        st.characters(exclude_categories=["Cs"]), max_size=3
    )
    return st.lists(part, max_size=12).map("".join)


def chat_texts() -> st.SearchStrategy[str]:
    """Transcripts in ChatML with hostile contents, well formed or not."""
    return texts(markers=True).map(
        lambda text: "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n" + text
    )
