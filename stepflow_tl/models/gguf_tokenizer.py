r"""The tokenizer that a GGUF file describes, cut the way the model was trained.

A GGUF file holds the vocabulary, the merges and the kind of every token, and the NAME of the rule that cuts
text before the merges apply (`tokenizer.ggml.pre`). The rules differ in what they do with digits and with the
white space around them, and numbered steps ("\n\n2. ...") are the very text we read: under a wrong rule the
model sees tokens it never saw in training. transformers knows some of the rules and takes GPT-2's, silently,
for the others (`smollm` among them); here an unknown rule is refused.

    gpt-2      GPT-2's pattern: a run of digits is one piece, with the space before it
    smollm     every digit on its own, then GPT-2's pattern
    qwen2      the tiktoken pattern, every digit on its own
    llama-bpe  the tiktoken pattern, digits in groups of up to three; a piece that is a token is not merged

Nothing is normalised: decoding gives the text back, byte for byte. (Qwen's own tokenizer first composes
accents, NFC; the file does not record that, and llama.cpp does not do it either.)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepflow_tl.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
else:
    # The run-time type check must not import transformers, which takes seconds.
    PreTrainedTokenizerFast = Any

_BYTE_LEVEL_BPE = "gpt2"  # the value of tokenizer.ggml.model
_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4  # of tokenizer.ggml.token_type

_RULES = {
    "gpt-2": "gpt-2",
    "smollm": "smollm",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "llama-bpe": "llama-bpe",
    "llama-v3": "llama-bpe",
    "llama3": "llama-bpe",
    "falcon3": "llama-bpe",
}
"""tokenizer.ggml.pre -> the rule above."""

_TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(
    path: Path, metadata: dict[str, Any], context_length: int | None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its special tokens and its chat template.

    Control tokens ("<|im_end|>") are special; user-defined ones ("<tool_call>", "<think>") are one token each
    and stay when special tokens are skipped. BOS is put in front only where the file asks for it. A
    vocabulary other than byte-level BPE (SentencePiece, Unigram) goes to transformers' own converter.

    Raises:
        ModelError: If the file holds no tokenizer, or asks for a rule that is not known.
        KeyError, ValueError, TypeError, IndexError: If the vocabulary is damaged.
    """
    ggml = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    if "model" not in ggml:
        raise ModelError(
            f"{path} holds no tokenizer (no tokenizer.ggml.model). Expected a file made from a whole model "
            "folder; convert the model again, with its tokenizer."
        )
    if ggml["model"] != _BYTE_LEVEL_BPE:
        return _tokenizer_of_transformers(path, ggml["model"])
    from transformers import PreTrainedTokenizerFast

    rule = _rule(path, ggml.get("pre"))
    tokens, kinds = ggml["tokens"], ggml["token_type"]
    control, user_defined = (
        [token for token, kind in zip(tokens, kinds, strict=True) if kind == wanted]
        for wanted in (_CONTROL_TOKEN, _USER_DEFINED_TOKEN)
    )
    ids = {role: ggml.get(f"{key}_token_id") for role, key in _SPECIAL_ROLES.items()}
    options = {role: tokens[token_id] for role, token_id in ids.items() if token_id is not None}
    if ggml.get("add_bos_token", rule == "llama-bpe"):
        options["add_bos_token"] = True
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(tokens, ggml["merges"], rule, control, user_defined),
        additional_special_tokens=control,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
        **options,
    )


_SPECIAL_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""A tokenizer's special token -> the start of its key in the file, `tokenizer.ggml.*_token_id`."""


def _rule(path: Path, pre_tokenizer: str | None) -> str:
    if pre_tokenizer not in _RULES:
        raise ModelError(
            f"{path} asks for pre-tokenizer {pre_tokenizer!r}; known are {', '.join(sorted(_RULES))}. "
            "Another would cut text in ways the model was not trained on. Load the model from its "
            "original folder or hub name, which has its own tokenizer."
        )
    return _RULES[pre_tokenizer]


def _backend(
    tokens: list[str], merges: list[str], rule: str, control: list[str], user_defined: list[str]
) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(left, right) for left, right in (merge.split(" ") for merge in merges)],
            ignore_merges=rule == "llama-bpe",
        )
    )
    if rule == "gpt-2":
        cuts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif rule == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        cuts = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        digits = r"\p{N}" if rule == "qwen2" else r"\p{N}{1,3}"
        cuts = [
            pre_tokenizers.Split(Regex(_TIKTOKEN.format(digits=digits)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_defined])
    return backend


def _tokenizer_of_transformers(path: Path, kind: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # several libraries convert, each with errors of its own
        raise ModelError(
            f"{path} holds a tokenizer of kind {kind!r}; read here is {_BYTE_LEVEL_BPE!r} (byte-level BPE). "
            f"transformers' converter was tried and failed ({type(error).__name__}: {str(error)[:200]})."
        ) from error
