"""Tiny random causal LMs, in float64, of every decoder family that reasons, and of most others.

A family is here if TransformerLens has an adapter for it and transformers a configuration.

Four layers, grouped queries where the family has them, windows shorter than the traces, experts in plain
PyTorch (the grouped kernels take no float64). A family's size is the same whatever its checkpoints are: what
differs is the code that runs.
"""

import functools
import os
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from architectures.architecture import N_LAYERS as N_LAYERS
from architectures.architecture import SHAPE, Architecture
from architectures.others import OTHERS
from architectures.reasoning import REASONING
from tiny_models import build_tiny_tokenizer
from transformer_lens.model_bridge import TransformerBridge

ARCHITECTURES: dict[str, Architecture] = {**REASONING, **OTHERS}

# Every variety of attention that the fused backend claims: windows, caps, sinks, joint projections, scales.
ATTENTION_VARIETIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "phi3",
    "olmo2",
    "smollm3",
    "granite",
    "glm4",
)


def build_hf_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A fresh transformers model with weights wide enough that attention is far from uniform."""
    family = ARCHITECTURES[name]
    shape = {key: value for key, value in SHAPE.items() if key not in family.drops}
    config = getattr(transformers, f"{family.prefix}Config")(**{**shape, **family.options, **options})
    config.architectures = [family.adapter or family.model_class]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, family.model_class)._from_config(config, attn_implementation="eager")
        model = model.to(dtype).eval()
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64)
            if parameter.ndim == 1:
                centre = 0.0 if "bias" in key or "sinks" in key or "gemma" in name else 1.0
                value = centre + 0.2 * noise
            else:
                value = 1.5 * noise / parameter.shape[-1] ** 0.5
            parameter.data.copy_(value)
    return model


def build_bridge(
    name: str, *, compatibility_mode: bool = False, tokenizer: Any = None, **options: Any
) -> Any:
    """The same model behind a TransformerBridge."""
    model = build_hf_model(name, **options)
    bridge = TransformerBridge.boot_transformers(
        f"tiny-{name}",
        hf_model=model,
        tokenizer=tiny_tokenizer() if tokenizer is None else tokenizer,
        device="cpu",
        dtype=options.get("dtype", torch.float64),
    )
    if compatibility_mode:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*does not support fold_ln", UserWarning)
            bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


@functools.cache
def tiny_tokenizer() -> Any:
    """The tokenizer of every tiny bridge here; one object."""
    return build_tiny_tokenizer()
