from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

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
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.slow
def test_weights_and_configuration_are_those_of_the_transformers_loader(path, checkpoint):
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


QUANTIZATIONS = ("F32", "F16", "BF16", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
TOKENS = torch.arange(5, 45)[None]


def opened(folder, **options) -> GgufCheckpoint:
    return GgufCheckpoint.open(write_tiny_gguf(folder / "m.gguf", **options))


def read_by_transformers(checkpoint):
    """The oracle: what transformers makes of the file."""
    path = checkpoint.path
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", False), ("qwen2", True)]
)
def test_weights_and_logits_are_those_of_the_transformers_reader(architecture, tied, quantization, tmp_path):
    checkpoint = opened(
        tmp_path, architecture=architecture, tied=tied, quantization=quantization, d_model=256, n_layers=2
    )
    model, oracle = checkpoint.model(torch.float32), read_by_transformers(checkpoint)
    expected, ours = oracle.state_dict(), model.state_dict()
    assert ours.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    biases = [name for name in ours if name.endswith("bias")]
    assert len(biases) == (6 if architecture == "qwen2" else 0) and all(
        ours[name].std() > 0.1 for name in biases
    )
    with torch.no_grad():
        logits = model(TOKENS).logits
        assert torch.equal(logits, oracle(TOKENS).logits)
    assert logits.std() > 0.1


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_configuration_is_that_of_the_transformers_reader(architecture, tmp_path):
    checkpoint = opened(tmp_path, architecture=architecture)
    model, oracle = checkpoint.model(torch.float32), read_by_transformers(checkpoint)
    ours, expected = model.config.to_dict(), oracle.config.to_dict()
    # What no class computes with: where the file was, and two facts under names it does not have.
    origin = {"quantization_config", "_name_or_path", "_model_name_or_path", "head_dim", "unk_token_id"}
    assert {key: ours[key] for key in ours.keys() - origin} == {
        key: expected[key] for key in expected.keys() - origin
    }
    assert ours["rope_parameters"]["rope_theta"] == 5000 and ours["max_position_embeddings"] == 64
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, oracle(TOKENS).logits)


def test_weights_come_in_the_dtype_asked_for_and_the_model_is_ready_to_read(tmp_path):
    model = opened(tmp_path).model(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training and model.config._attn_implementation == "eager"


def test_the_rotary_factors_of_llama_3_are_those_of_its_own_configuration(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    plain = opened(tmp_path).model(torch.float32)
    config = LlamaConfig(**{**plain.config.to_dict(), "rope_parameters": scaling})
    oracle = LlamaForCausalLM(config).eval()
    oracle.load_state_dict(plain.state_dict())
    factors = plain.model.rotary_emb.inv_freq / oracle.model.rotary_emb.inv_freq
    assert factors.min() == 1 and factors.max() > 4, "not every frequency is the same"
    checkpoint = opened(tmp_path, extra_tensors={"rope_freqs.weight": factors.numpy()})
    model = checkpoint.model(torch.float32)
    tokens = torch.arange(70)[None] % 40  # longer than the context: the factors stay
    with torch.no_grad():
        ours, expected = model(tokens).logits, oracle(tokens).logits
        assert torch.allclose(ours, expected, atol=1e-4)
        assert not torch.allclose(plain(tokens).logits, expected, atol=1e-2)


def test_linear_scaling_of_positions_is_kept(tmp_path):
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    rope = opened(tmp_path, metadata=scaled).config().rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 4.0, 5000.0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"llama.rope.scaling.type": "yarn"},
            "scales its rotary positions by 'yarn'; only 'linear' and 'none'",
        ),
        ({"llama.expert_count": 8}, "has llama.expert_count = 8, which is not computed here"),
        (
            {"llama.attention.sliding_window": 16},
            "has llama.attention.sliding_window = 16, which is not computed",
        ),
        (
            {"llama.rope.dimension_count": 4},
            "rotates 4 of the 8 dimensions of a head; only models that rotate",
        ),
        ({"llama.block_count": 3}, "says 3 layers and has the tensors of 1"),
        (
            {"llama.feed_forward_length": 64},
            r"mlp\.down_proj\.weight of shape \(32, 256\); .* asks for \(32, 64\)",
        ),
    ],
)
def test_what_would_compute_other_numbers_is_refused(metadata, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        opened(tmp_path, metadata=metadata).model(torch.float32)


@pytest.mark.parametrize(
    ("without", "missing"),
    [
        ("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ],
)
def test_a_missing_tensor_is_named(without, missing, tmp_path):
    with pytest.raises(ModelError, match=rf"lacks 1 of the model's 11 tensors, first {missing}\. Convert or"):
        opened(tmp_path, without=without).model(torch.float32)


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("blk.0.attn_q.bias", r"model\.layers\.0\.self_attn\.q_proj\.bias"),
        ("blk.0.ffn_gate_inp.weight", r"blk\.0\.ffn_gate_inp\.weight"),
    ],
)
def test_a_tensor_that_the_model_has_no_place_for_is_refused(tensor, named, tmp_path):
    with pytest.raises(ModelError, match=rf"has {named} of shape \(32,\); its .* asks for no such tensor"):
        opened(tmp_path, extra_tensors={tensor: np.zeros(32)}).model(torch.float32)


def test_another_architecture_is_read_by_transformers_and_can_be_saved(tmp_path):
    checkpoint = opened(tmp_path, architecture="starcoder2", tied=False)
    model = checkpoint.model(torch.float32)
    assert type(model).__name__ == "Starcoder2ForCausalLM" and not model.training
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.allclose(again(TOKENS).logits, model(TOKENS).logits, atol=1e-5)


def test_an_unknown_architecture_is_refused_with_those_known_and_why_transformers_failed(tmp_path):
    with pytest.raises(
        ModelError,
        match=r"architecture 'hyena'; read here are llama, qwen2, qwen3\. transformers' reader was tried and "
        r"failed \(ValueError: .*hyena",
    ):
        opened(tmp_path, architecture="hyena").model(torch.float32)


def test_query_rows_are_reordered_within_each_head_and_value_rows_are_not(tmp_path):
    rows = np.arange(32, dtype=np.float32)[:, None].repeat(32, axis=1)
    for architecture in ("llama", "qwen2"):
        checkpoint = GgufCheckpoint.open(
            write_tiny_gguf(
                tmp_path / f"{architecture}.gguf",
                architecture=architecture,
                without="blk.0.attn_q.weight",
                extra_tensors={"blk.0.attn_q.weight": rows},
            )
        )
        query = dict(checkpoint.weights(torch.float64))["model.layers.0.self_attn.q_proj.weight"]
        assert query.dtype == torch.float64
        first_heads = query[:16, 0].tolist()
        if architecture == "llama":
            assert first_heads == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
        else:
            assert first_heads == list(range(16))
