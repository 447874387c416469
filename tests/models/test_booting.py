"""A bridge around a model in memory."""

import pytest
import torch
from tiny_models import build_tiny_tokenizer

from stepflow_tl.models.booting import boot_bridge
from stepflow_tl.models.facts import is_bridge, model_facts
from stepflow_tl.testbed.model import new_model


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
