"""`load_testbed_model`: the miniature reasoning model, ready for TransformerLens."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from stepflow_tl.errors import ModelError
from stepflow_tl.testbed.weights import SHIPPED, read_weights

NAME = "stepflow-testbed"


def load_testbed_model(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    hooked_transformer: bool = False,
    folder: str | Path = SHIPPED,
) -> Any:
    """The trained testbed model as a TransformerBridge, in eval mode, offline.

    It solves the problems of `stepflow_tl.testbed.problems` and nothing else; `card.md` beside the weights
    says how well. Takes about a second.

    Args:
        device: Where the model goes.
        dtype: Of the parameters.
        hooked_transformer: Return TransformerLens 3.9's HookedTransformer instead, weights as they are
            (no folding, no centring).
        folder: Another folder that `python -m stepflow_tl.testbed.train` wrote.

    Raises:
        ModelError: If a file is missing or damaged, or `hooked_transformer` is asked of TransformerLens 4,
            which has none.
    """
    hf_model, tokenizer = read_weights(Path(folder))
    # TransformerLens reloads a tokenizer by name unless it says that it adds BOS by itself. This one has no
    # name; it says so and still adds none, the chat template does.
    tokenizer.init_kwargs.update(add_bos_token=True)
    hf_model = hf_model.to(device=device, dtype=dtype)
    if hooked_transformer:
        return _hooked(hf_model, tokenizer, device, dtype)
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(
        "Qwen/Qwen2-0.5B", hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype
    )
    model.cfg.model_name = (
        NAME  # the name above says only which architecture it is; tables and files say this
    )
    return model


def _hooked(hf_model: Any, tokenizer: Any, device: str | torch.device, dtype: torch.dtype) -> Any:
    import transformer_lens as lens

    try:
        conversions = importlib.import_module("transformer_lens.pretrained.weight_conversions")
        build: Any = lens.HookedTransformer
        build_config: Any = lens.HookedTransformerConfig
    except (ImportError, AttributeError):
        raise ModelError(
            "hooked_transformer=True needs TransformerLens 3.9: version 4 has TransformerBridge only. Leave "
            "the argument out, or pip install 'transformer-lens<4'."
        ) from None
    config = hf_model.config
    d_head = config.hidden_size // config.num_attention_heads
    hooked = build_config(
        d_model=config.hidden_size,
        d_head=d_head,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        n_layers=config.num_hidden_layers,
        n_ctx=config.max_position_embeddings,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        act_fn="silu",
        gated_mlp=True,
        final_rms=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=int(config.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
        original_architecture="Qwen2ForCausalLM",
        model_name=NAME,
        device=str(device),
        dtype=dtype,
        default_prepend_bos=False,
    )
    model = build(hooked, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        conversions.convert_qwen2_weights(hf_model, hooked),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()
