from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from stepflow_tl.errors import MissingExtraError, ModelError
from stepflow_tl.models.gguf import GgufCheckpoint
from stepflow_tl.models.loading import _default_model_path

TEXTS = (
    "The quick brown fox. It's ours; we'll see!",
    "<|im_start|>user\nWhat is 17*23?<|im_end|>\n<|im_start|>assistant\n",
    "<think>\nLet x be 3.14, so $\\frac{1}{2}x^2 = 4.93$.\n</think>\n\nDone.",
    "é🙂 答案\u200b\t x \u00a0y",
    "a\r\n\r\nb  c   d\n\n\n",
    "```python\ndef f(x):\n    return x[1:-1]\n```",
    "",
    " ",
)
NUMBERED_STEPS = "Tips:\n\n1. Sleep.\n\n2. Eat.  3 times."


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return _default_model_path()
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def checkpoint(path):
    return GgufCheckpoint.open(path)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return checkpoint.tokenizer()


@pytest.fixture(scope="module")
def oracle_tokenizer(path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.slow
def test_weights_and_configuration_are_those_of_the_transformers_loader(path, checkpoint):
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model = checkpoint.model(torch.float32)
    expected, ours = oracle.state_dict(), model.state_dict()
    assert ours.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(ours[name], expected[name])]
    assert different == []
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.config.rope_parameters == oracle.config.rope_parameters
    assert model.config.rms_norm_eps == oracle.config.rms_norm_eps
    assert not model.training


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_and_offsets_are_those_of_the_transformers_tokenizer(text, tokenizer, oracle_tokenizer):
    ours = tokenizer(text, return_offsets_mapping=True)
    expected = oracle_tokenizer(text, return_offsets_mapping=True)
    assert ours["input_ids"] == expected["input_ids"]
    assert ours["offset_mapping"] == expected["offset_mapping"]
    assert tokenizer.decode(ours["input_ids"]) == text


def test_white_space_before_a_digit_stays_one_token_where_transformers_cuts_it(tokenizer, oracle_tokenizer):
    ours, theirs = tokenizer.tokenize(NUMBERED_STEPS), oracle_tokenizer.tokenize(NUMBERED_STEPS)
    assert ours != theirs, "transformers now honours the file's pre-tokenizer: this module may drop its own"
    assert "ĊĊ" in ours and "ĊĊ" not in theirs
    assert tokenizer.decode(tokenizer(NUMBERED_STEPS)["input_ids"]) == NUMBERED_STEPS


@pytest.mark.slow
def test_the_model_expects_the_tokens_of_the_files_own_pre_tokenizer(checkpoint, tokenizer, oracle_tokenizer):
    # The evidence that ours is the cut the model was trained on: the same text is more probable under it.
    model = checkpoint.model(torch.float32)

    def nll(ids: list[int]) -> float:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            log_probs = model(tokens).logits.log_softmax(-1)
        return -log_probs[0, :-1].gather(1, tokens[0, 1:, None]).sum().item()

    prompt = "<|im_start|>user\nGive me tips for good sleep.<|im_end|>\n<|im_start|>assistant\n"
    text = prompt + "Here are three tips:\n\n1. Keep a schedule.\n\n2. Avoid coffee.\n\n3. Exercise."
    assert nll(tokenizer(text)["input_ids"]) < nll(oracle_tokenizer(text)["input_ids"]) - 1.0


def test_a_file_of_another_kind_is_refused(tmp_path):
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ModelError, match=r"is not a GGUF file: it starts with b'not '"):
        GgufCheckpoint.open(other)


@pytest.mark.parametrize("n_bytes", [10, 30, 200, 100_000])
def test_a_truncated_header_is_refused(n_bytes, path, tmp_path):
    cut = tmp_path / "cut.gguf"
    with path.open("rb") as whole:
        cut.write_bytes(whole.read(n_bytes))
    with pytest.raises(ModelError, match="is truncated or damaged; install it again"):
        GgufCheckpoint.open(cut)


def test_truncated_tensors_are_refused_by_name(path, checkpoint, tmp_path):
    cut = tmp_path / "cut.gguf"
    with path.open("rb") as whole:
        cut.write_bytes(whole.read(checkpoint.data_start + 1000))
    with pytest.raises(ModelError, match=r"ends inside tensor token_embd\.weight"):
        dict(GgufCheckpoint.open(cut).weights(torch.float32))


def test_an_old_version_is_refused(tmp_path):
    old = tmp_path / "old.gguf"
    old.write_bytes(b"GGUF" + (2).to_bytes(4, "little") + bytes(16))
    with pytest.raises(ModelError, match="is GGUF version 2; only version 3 is read"):
        GgufCheckpoint.open(old)


def _write_gguf(path: Path, architecture: str, pre_tokenizer: str = "smollm") -> Path:
    writer = GGUFWriter(path, architecture)
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    query_rows = np.arange(8, dtype=np.float32)[:, None].repeat(32, axis=1)
    writer.add_tensor("blk.0.attn_q.weight", query_rows)
    writer.add_tensor("blk.0.attn_v.weight", query_rows[:4], raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_unknown_architecture_is_refused(tmp_path):
    with pytest.raises(ModelError, match="holds architecture 'mamba'; only 'llama' is read"):
        GgufCheckpoint.open(_write_gguf(tmp_path / "m.gguf", "mamba"))


def test_an_unknown_pre_tokenizer_is_refused_instead_of_guessed(tmp_path):
    checkpoint = GgufCheckpoint.open(_write_gguf(tmp_path / "m.gguf", "llama", pre_tokenizer="tekken"))
    with pytest.raises(ModelError, match="asks for pre-tokenizer 'tekken'; only 'smollm' is known"):
        checkpoint.tokenizer()


def test_query_rows_are_reordered_within_each_head_and_value_rows_are_not(tmp_path):
    weights = dict(GgufCheckpoint.open(_write_gguf(tmp_path / "m.gguf", "llama")).weights(torch.float64))
    query = weights["model.layers.0.self_attn.q_proj.weight"]
    assert query[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert weights["model.layers.0.self_attn.v_proj.weight"][:, 0].tolist() == [0, 1, 2, 3]
    assert query.dtype == torch.float64
