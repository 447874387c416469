import pytest
from gguf import GGUFWriter
from tiny_gguf import CHAT_TEMPLATE, CONTROL, UNMERGED, write_tiny_gguf
from transformers import AutoTokenizer

from stepflow_tl.errors import ModelError
from stepflow_tl.models.gguf import GgufCheckpoint

TEXTS = (
    "The quick brown fox. It's ours; we'll see! DON'T",
    "Tips:\n\n1. Sleep.\n\n2. Eat.  3 times, 1234567 or 12,345.678.",
    "<|im_start|>user\nWhat is 17*23?<|im_end|>\n<|im_start|>assistant\n",
    "<think>\nLet x be 3.14, so $\\frac{1}{2}x^2 = 4.93$.\n</think>\n\nDone.",
    "é🙂 答案\u200b\t x \u00a0y e\u0301 ½ ٣٤٥ １２３",
    "a\r\n\r\nb  c   d\n\n\n",
    "```python\ndef f(x):\n\treturn x[1:-1]  # abab();\n```",
    "👩‍🔬 नमस्ते \x00\x7f\ufeff\u2028",
    "",
    " ",
)


def tokenizer_of(folder, **options):
    return GgufCheckpoint.open(write_tiny_gguf(folder / "m.gguf", **options)).tokenizer()


@pytest.mark.parametrize("pre_tokenizer", ["qwen2", "llama-bpe", "deepseek-r1-qwen", "gpt-2"])
def test_ids_and_offsets_are_those_of_the_transformers_tokenizer_where_it_knows_the_rule(
    pre_tokenizer, tmp_path
):
    ours = tokenizer_of(
        tmp_path, pre_tokenizer=pre_tokenizer, metadata={"tokenizer.ggml.add_bos_token": False}
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        mine, expected = (tokenizer(text, return_offsets_mapping=True) for tokenizer in (ours, theirs))
        assert mine["input_ids"] == expected["input_ids"], text
        assert mine["offset_mapping"] == expected["offset_mapping"], text
        assert ours.decode(mine["input_ids"]) == text
    assert (ours.bos_token, ours.eos_token, ours.unk_token, ours.pad_token) == (
        theirs.bos_token,
        theirs.eos_token,
        theirs.unk_token,
        theirs.pad_token,
    )
    assert ours.chat_template == theirs.chat_template == CHAT_TEMPLATE
    assert len(ours) == len(theirs)


@pytest.mark.parametrize(
    ("pre_tokenizer", "expected"),
    [
        ("gpt-2", ["ĊĊ", "Ġ1", "2", "34"]),
        ("smollm", ["ĊĊ", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["ĊĊ", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["ĊĊ", "Ġ", "123", "4"]),
    ],
)
def test_digits_and_the_white_space_before_them_are_cut_as_each_rule_says(pre_tokenizer, expected, tmp_path):
    tokenizer = tokenizer_of(
        tmp_path, pre_tokenizer=pre_tokenizer, metadata={"tokenizer.ggml.add_bos_token": False}
    )
    assert tokenizer.tokenize("\n\n 1234") == expected


def test_only_llama_3_takes_a_word_that_is_a_token_without_its_merges(tmp_path):
    whole = tokenizer_of(tmp_path, pre_tokenizer="llama-bpe").tokenize(UNMERGED)
    assert (whole, tokenizer_of(tmp_path, pre_tokenizer="qwen2").tokenize(UNMERGED)) == (
        [UNMERGED],
        list(UNMERGED),
    )


def test_control_tokens_are_special_and_user_defined_ones_are_text(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    text = "".join(CONTROL) + "<think>x"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [*CONTROL, "<think>", "x"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>x"
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("pre_tokenizer", "says", "adds"),
    [("qwen2", None, False), ("qwen2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_is_put_in_front_where_the_file_or_its_rule_says_so(pre_tokenizer, says, adds, tmp_path):
    metadata = {} if says is None else {"tokenizer.ggml.add_bos_token": says}
    tokenizer = tokenizer_of(tmp_path, pre_tokenizer=pre_tokenizer, metadata=metadata)
    assert tokenizer.convert_ids_to_tokens(tokenizer("x")["input_ids"]) == ["<|im_start|>"] * adds + ["x"]
    assert tokenizer("x", add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids("x")]


def test_the_context_length_is_the_models(tmp_path):
    assert tokenizer_of(tmp_path).model_max_length == 64


def test_an_unknown_pre_tokenizer_is_refused_instead_of_guessed(tmp_path):
    with pytest.raises(
        ModelError,
        match="asks for pre-tokenizer 'tekken'; known are .*llama-bpe.*smollm.* Load the model from",
    ):
        tokenizer_of(tmp_path, pre_tokenizer="tekken")


def _write_sentencepiece(path, kind="llama"):
    pieces = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "ab", "▁ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(len(pieces))])
    writer.add_token_types([2, 3, 3] + [1] * (len(pieces) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufCheckpoint.open(path)


def test_a_sentencepiece_vocabulary_goes_to_the_converter_of_transformers(tmp_path):
    tokenizer = _write_sentencepiece(tmp_path / "m.gguf").tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab ba")["input_ids"]) == ["<s>", "▁ab", "▁", "b", "a"]


def test_a_kind_that_nobody_converts_is_refused_with_the_reason(tmp_path):
    with pytest.raises(
        ModelError,
        match=r"tokenizer of kind 'bert'; read here is 'gpt2'.*transformers' converter .* failed \(",
    ):
        _write_sentencepiece(tmp_path / "m.gguf", kind="bert").tokenizer()


def test_a_file_without_a_tokenizer_is_refused(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="holds no tokenizer .* convert the model again, with its tokenizer"):
        GgufCheckpoint.open(tmp_path / "m.gguf").tokenizer()
