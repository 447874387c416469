"""The model's files: written whole, checked when read."""

import json

import pytest
import torch


@pytest.fixture
def folder(tmp_path):
    from stepflow_tl.testbed.vocabulary import build_tokenizer
    from stepflow_tl.testbed.weights import new_model, save_weights

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    for _ in range(2):  # the second replaces the first
        save_weights(
            new_model(len(tokenizer)).eval(),
            tokenizer,
            tmp_path / "model",
            settings={"tokens": 2e6, "seed": 3},
            accuracy={2: 1.0, 16: 0.625},
            n_graded=40,
            minutes=12.3,
        )
    return tmp_path / "model"


def test_what_is_written_is_read_back(folder):
    from stepflow_tl.testbed.weights import read_weights

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
        "train --tokens 2e+06 --seed 3",
        "in 12 minutes",
        "| 16 | 0.625 |",
        "40 fresh problems a row",
    ):
        assert said in card


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json is not the file that was written"),
        (lambda f: (f / "checksums.json").unlink(), "checksums.json is missing.*testbed.train --out"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(folder, damage, message):
    from stepflow_tl.errors import ModelError
    from stepflow_tl.testbed.weights import read_weights

    damage(folder)
    with pytest.raises(ModelError, match=message):
        read_weights(folder)


def test_every_file_has_a_checksum(folder):
    listed = json.loads((folder / "checksums.json").read_text())
    assert set(listed) == {file.name for file in folder.iterdir()} - {"checksums.json"}


def test_a_folder_loads_as_a_bridge_and_gives_the_same_logits(folder):
    from stepflow_tl.testbed import load_testbed_model
    from stepflow_tl.testbed.weights import read_weights

    plain, tokenizer = read_weights(folder)
    model = load_testbed_model(folder=folder)
    tokens = torch.tensor([tokenizer("a = A + B = 4 + 7 = 1").input_ids])
    with torch.no_grad():
        expected = plain(input_ids=tokens).logits
        assert torch.allclose(model(tokens, return_type="logits"), expected, atol=1e-4)
    assert model.tokenizer("a").input_ids == tokenizer("a").input_ids


def test_hooked_transformer_where_there_is_one(folder):
    from tiny_models import TL_GENERATION

    from stepflow_tl.errors import ModelError
    from stepflow_tl.testbed import load_testbed_model
    from stepflow_tl.testbed.weights import read_weights

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
