"""The model's files: written whole, checked when read."""

import hashlib
import json

import pytest
import torch
import transformers
from tiny_models import TL_GENERATION

from stepflow_tl.errors import ModelError
from stepflow_tl.testbed import load_testbed_model
from stepflow_tl.testbed.model import check_files, new_model, read_weights
from stepflow_tl.testbed.vocabulary import build_tokenizer


@pytest.fixture
def folder(tmp_path, training):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    for _ in range(2):  # the second replaces the first
        training.save_weights(
            new_model(len(tokenizer)).eval(),
            tokenizer,
            tmp_path / "model",
            settings={"tokens": 2e6, "seed": 3, "graded": 40, "long_steps": True, "other": False},
            accuracy={2: 1.0, 16: 0.625},
            minutes=12.3,
        )
    return tmp_path / "model"


def test_what_is_written_is_read_back(folder):
    assert sorted(file.name for file in folder.parent.iterdir()) == ["model"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
    model, tokenizer = read_weights(folder)
    assert not model.training and tokenizer.decode(tokenizer("a = A + B").input_ids) == "a = A + B"
    assert tokenizer.chat_template and tokenizer.padding_side == "left"
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (
        model.config.eos_token_id,
        model.config.bos_token_id,
    )
    card = (folder / "card.md").read_text()
    for said in (
        "scripts/train_testbed.py --tokens 2e+06 --seed 3 --graded 40 --long-steps --out",
        "in 12 minutes",
        "| 16 | 0.625 |",
        "40 fresh problems per row",
    ):
        assert said in card


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json is not the file that was written"),
        (lambda f: (f / "checksums.json").unlink(), "checksums.json is missing.*train_testbed.py --out"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ModelError, match=message):
        read_weights(folder)


def test_every_file_has_a_checksum(folder):
    listed = json.loads((folder / "checksums.json").read_text())
    assert set(listed) == {file.name for file in folder.iterdir()} - {"checksums.json"}


def test_a_folder_loads_as_a_bridge_and_gives_the_same_logits(folder):
    plain, tokenizer = read_weights(folder)
    model = load_testbed_model(folder=folder)
    tokens = torch.tensor([tokenizer("a = A + B = 4 + 7 = 1").input_ids])
    with torch.no_grad():
        expected = plain(input_ids=tokens).logits
        assert torch.allclose(model(tokens, return_type="logits"), expected, atol=1e-4)
    assert model.tokenizer("a").input_ids == tokenizer("a").input_ids


def test_hooked_transformer_where_there_is_one(folder):
    if TL_GENERATION >= 4:
        with pytest.raises(ModelError, match="needs TransformerLens 3.9"):
            load_testbed_model(hooked_transformer=True, folder=folder)
        return
    plain, tokenizer = read_weights(folder)
    model = load_testbed_model(hooked_transformer=True, folder=folder)
    tokens = torch.tensor([tokenizer("a = A + B = 4 + 7 = 1").input_ids])
    with torch.no_grad():
        expected = plain(input_ids=tokens).logits
        assert torch.allclose(model(tokens, return_type="logits"), expected, atol=1e-4)


def reseal(folder, **files):
    """Write these files and make the checksums agree with them."""
    listed = json.loads((folder / "checksums.json").read_text())
    for name, text in files.items():
        (folder / name).write_text(text)
        listed[name] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(listed))


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
def test_sizes_that_are_not_the_testbeds_are_refused_before_they_are_allocated(folder, name, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    reseal(folder, **{"config.json": json.dumps({**config, name: 2**30})})

    def allocate(config):
        raise AssertionError("the model was built")

    monkeypatch.setattr(transformers, "Qwen2ForCausalLM", allocate)
    with pytest.raises(ModelError, match=f"{name} is {2**30}, expected"):
        read_weights(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "does not list config.json, model.safetensors, tokenizer.json"),
        ("{}", "does not list"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_list_of_checksums_that_is_none_is_refused(folder, text, message):
    (folder / "checksums.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=message):
        check_files(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", "C:\\x", ""])
def test_checksums_name_files_of_their_folder_only(folder, name):
    listed = json.loads((folder / "checksums.json").read_text())
    (folder / "checksums.json").write_text(json.dumps({name: "0" * 64, **listed}))
    with pytest.raises(ModelError, match="which is not a file of its folder"):
        check_files(folder)
