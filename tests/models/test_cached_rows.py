"""Rows that are read token by token and leave: each has the logits of one pass over its own tokens."""

import pytest
import torch
from tiny_models import TINY_MODEL_KINDS

from stepflow_tl.errors import ModelError
from stepflow_tl.models.cached_rows import _TransformersRows, cached_rows, takes_padding

TOKENS = torch.arange(2, 2 + 36).reshape(3, 12) % 23


def whole(model, tokens):
    """Logits after the last of these tokens, by a plain pass."""
    with torch.no_grad():
        if hasattr(model, "hook_dict"):
            return model(tokens[None], return_type="logits")[0, -1]
        return model(input_ids=tokens[None]).logits[0, -1]


def check(model, lengths, atol=1e-4):
    """Read prompts of these lengths and some more tokens; drop the middle row, then another, on the way."""
    prompts = [row[:n].tolist() for row, n in zip(TOKENS, lengths, strict=True)]
    held, at = [0, 1, 2], list(lengths)
    with torch.no_grad():
        rows, logits = cached_rows(model, prompts, 0)
        for kept in (None, None, [2, 0], None, None, [1], None):
            for row, found in zip(held, logits, strict=True):
                torch.testing.assert_close(found, whole(model, TOKENS[row, : at[row]]), atol=atol, rtol=0)
            if kept is not None:
                assert rows.can_drop
                rows.keep(kept)
                held = [held[place] for place in kept]
            logits = rows.read(torch.stack([TOKENS[row, at[row]] for row in held])[:, None])
            for row in held:
                at[row] += 1
    assert held == [0]


@pytest.mark.parametrize("kind", [kind for kind in TINY_MODEL_KINDS if kind != "native"])
def test_rows_have_the_logits_of_a_pass_of_their_own(tiny_model, kind):
    check(tiny_model(kind), (4, 4, 4), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_padding_enters_no_row(tiny_model, kind):
    check(tiny_model(kind, dtype=torch.float32), (3, 5, 4))


def test_where_padding_would_spoil_rows_it_is_refused(tiny_model):
    model = tiny_model("llama")
    assert not takes_padding(model) and takes_padding(tiny_model("llama", dtype=torch.float32))
    with pytest.raises(ModelError, match="differ in length"):
        cached_rows(model, [[1, 2], [3]], 0)


def test_a_plain_transformers_model_is_decoded_too(tiny_model):
    check(tiny_model("llama", dtype=torch.float32).original_model, (3, 5, 4))


def test_a_model_without_a_cache_reads_everything_again(tiny_model, monkeypatch):
    read, widths = _TransformersRows.read, []

    def forgetful(self, tokens):
        logits = read(self, tokens)
        widths.append(self._tokens.shape[1])
        self._cache = None
        return logits

    monkeypatch.setattr(_TransformersRows, "read", forgetful)
    check(tiny_model("llama", dtype=torch.float32), (3, 5, 4))
    assert widths == [5, 6, 7, 8, 9, 10, 11, 12]
