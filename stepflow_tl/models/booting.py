"""TransformerLens around a transformers model that exists only in memory, offline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
else:
    # The run-time type check must not import TransformerLens, which takes seconds.
    TransformerBridge = Any


def boot_bridge(hf_model: Any, tokenizer: Any, name: str, dtype: torch.dtype) -> TransformerBridge:
    """A TransformerBridge around `hf_model`, in eval mode if that is.

    Args:
        hf_model: A transformers causal LM on its device.
        tokenizer: Its tokenizer, which comes back as it was.
        name: The model's name in results; it need not exist on the hub.
        dtype: Of the parameters.
    """
    from transformer_lens.model_bridge import TransformerBridge

    with tokenizer_in_memory(tokenizer, name):
        return TransformerBridge.boot_transformers(
            name, hf_model=hf_model, tokenizer=tokenizer, device=hf_model.device, dtype=dtype
        )


@contextmanager
def tokenizer_in_memory(tokenizer: Any, name: str) -> Iterator[None]:
    """Let TransformerLens take `tokenizer` as it is while it builds a model inside the block.

    It reloads a tokenizer from its name unless the tokenizer says that it adds BOS by itself. One in memory
    has no name to be found under, so it says so inside the block, and goes on encoding as it did: whether a
    prompt begins with BOS is its chat template's business.
    """
    before = dict(tokenizer.init_kwargs)
    tokenizer.init_kwargs.update(add_bos_token=True, name_or_path=name)
    try:
        yield
    finally:
        tokenizer.init_kwargs.clear()
        tokenizer.init_kwargs.update(before)
