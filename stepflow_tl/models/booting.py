"""Put a TransformerBridge around a transformers model that exists only in memory, offline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
else:
    # The run-time type check must not import TransformerLens, which takes seconds.
    TransformerBridge = Any


def boot_bridge(hf_model: Any, tokenizer: Any, name: str, dtype: torch.dtype) -> TransformerBridge:
    """The bridge, in eval mode if the model is.

    TransformerLens reloads a tokenizer from its name unless the tokenizer says that it adds BOS by itself.
    This one exists only in memory. It says so while the bridge is built, and goes on encoding as it did
    before: whether a prompt begins with BOS is its chat template's business.

    Args:
        hf_model: A transformers causal LM on its device.
        tokenizer: Its tokenizer, as it was before on return.
        name: The model's name in results; it need not exist on the hub.
        dtype: Of the parameters.
    """
    from transformer_lens.model_bridge import TransformerBridge

    before = dict(tokenizer.init_kwargs)
    tokenizer.init_kwargs.update(add_bos_token=True, name_or_path=name)
    try:
        return TransformerBridge.boot_transformers(
            name, hf_model=hf_model, tokenizer=tokenizer, device=hf_model.device, dtype=dtype
        )
    finally:
        tokenizer.init_kwargs.clear()
        tokenizer.init_kwargs.update(before)
