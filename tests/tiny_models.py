"""Tiny random models and tokenizers for the tests: offline, seeded, float64, a few milliseconds each.

Four layers or more, grouped-query attention and rotary positions by default: with one layer the per-token and
the mean-loss objective coincide, and without grouping a wrong head-to-KV-head mapping would go unseen.

Kinds of model (`TINY_MODEL_KINDS` lists those that the installed TransformerLens can build, the first is the
default):
    native   TransformerBridge over TransformerLens' own module (4.x). Float64 throughout.
    hooked   HookedTransformer (3.x). Float64 throughout.
    llama    TransformerBridge over transformers' LlamaForCausalLM. Norm and softmax inside run in float32.
    qwen2    The same over Qwen2ForCausalLM, whose projections have biases.
"""

from importlib.metadata import version
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TL_GENERATION = int(version("transformer-lens").split(".")[0])
TINY_MODEL_KINDS = ("native", "llama", "qwen2") if TL_GENERATION >= 4 else ("hooked", "llama", "qwen2")
# Kinds in which no value ever passes through float32, so a float64 comparison at 1e-10 means something.
FLOAT64_KINDS = tuple(kind for kind in TINY_MODEL_KINDS if kind in ("native", "hooked"))

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TAGS = ("<think>", "</think>")


def build_tiny_tokenizer(
    *, think_tags: str = "added", chat_template: str | None = CHATML_TEMPLATE
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a byte, so every string has a token sequence and offsets are exact.

    A character of several bytes spans several tokens, whose character spans overlap: the hard case for step
    spans.

    Args:
        think_tags: How `<think>` and `</think>` are tokenised. "special": one special token each, dropped by
            `decode(skip_special_tokens=True)`; "added": one token each but not special, as in Qwen3 and the
            R1 distills; "plain": spelled out in bytes, as in a model that never met them.
        chat_template: Jinja source, or None for a tokenizer without a template.
    """
    if think_tags not in ("special", "added", "plain"):
        raise ValueError(f"think_tags is {think_tags!r}; expected 'special', 'added' or 'plain'")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    if think_tags == "special":
        backend.add_special_tokens([AddedToken(tag, normalized=False, special=True) for tag in THINK_TAGS])
    elif think_tags == "added":
        backend.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in THINK_TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    # TransformerLens reloads a tokenizer from its path unless it says that it adds BOS by itself. This one
    # has no path. The mark changes nothing else: encoding still adds no BOS.
    tokenizer.init_kwargs.update(add_bos_token=True, name_or_path="tiny")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def build_tiny_model(
    kind: str | None = None,
    *,
    n_layers: int = 4,
    n_heads: int = 4,
    n_key_value_heads: int = 2,
    d_head: int = 8,
    d_mlp: int = 48,
    d_vocab: int = 264,
    n_ctx: int = 256,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Any:
    """A random decoder with `hook_pattern` live in every layer, in eval mode, its parameters frozen.

    Weights are drawn wide enough that attention is far from uniform and every layer moves the logits.
    """
    kind = TINY_MODEL_KINDS[0] if kind is None else kind
    tokenizer = build_tiny_tokenizer() if tokenizer is None else tokenizer
    shape = dict(n_layers=n_layers, n_heads=n_heads, d_head=d_head, n_ctx=n_ctx, d_vocab=d_vocab, d_mlp=d_mlp)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "native":
            model = _native(dict(shape, n_key_value_heads=n_key_value_heads), dtype, tokenizer)
        elif kind == "hooked":
            model = _hooked(dict(shape, n_key_value_heads=n_key_value_heads), dtype, tokenizer)
        elif kind in ("llama", "qwen2"):
            model = _bridged(kind, shape, n_key_value_heads, dtype, tokenizer)
        else:
            raise ValueError(f"no tiny model of kind {kind!r}; kinds here: {', '.join(TINY_MODEL_KINDS)}")
        _draw_weights(model)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def count_hooks(model: Any) -> int:
    """Forward and backward hooks now attached at the model's hook points."""
    return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_dict.values())


def _native(shape: dict[str, int], dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources import native

    config = TransformerBridgeConfig(
        **shape,
        d_model=shape["n_heads"] * shape["d_head"],
        act_fn="silu",
        gated_mlp=True,
        normalization_type="LN",  # its RMS norm works in float32
        positional_embedding_type="rotary",
        rotary_dim=shape["d_head"],
        dtype=dtype,
    )
    return native.boot(config, tokenizer=tokenizer, device="cpu", dtype=dtype, model_name="tiny-native")


def _hooked(shape: dict[str, int], dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        **shape,
        d_model=shape["n_heads"] * shape["d_head"],
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=shape["d_head"],
        dtype=dtype,
        device="cpu",
        model_name="tiny-hooked",
    )
    return HookedTransformer(config, tokenizer=tokenizer, move_to_device=False)


def _bridged(
    kind: str,
    shape: dict[str, int],
    n_key_value_heads: int,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerFast,
) -> Any:
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    config = config_class(
        vocab_size=shape["d_vocab"],
        hidden_size=shape["n_heads"] * shape["d_head"],
        intermediate_size=shape["d_mlp"],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=n_key_value_heads,
        max_position_embeddings=shape["n_ctx"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    hf_model = model_class(config).to(dtype).eval()
    return TransformerBridge.boot_transformers(
        f"tiny-{kind}", hf_model=hf_model, tokenizer=tokenizer, device="cpu", dtype=dtype
    )


def _draw_weights(model: Any) -> None:
    """Matrices: normal, gain 1.5 over the square root of the fan-in. Norm gains near 1, small biases."""
    for name, parameter in model.named_parameters():
        leaf = name.split(".")[-1]
        noise = torch.randn(parameter.shape, dtype=torch.float64)
        # "bias", and b_K or _b_K in HookedTransformer, which have one row per head.
        if leaf.startswith(("b", "_b")):
            value = 0.1 * noise
        elif parameter.ndim == 1:
            value = 1.0 + 0.1 * noise
        else:  # torch.nn.Linear stores [out, in]; HookedTransformer stores [..., in, out]
            is_torch_layout = leaf == "weight" or leaf == "W_E"
            fan_in = parameter.shape[-1] if is_torch_layout else parameter.shape[-2]
            value = 1.5 * noise / fan_in**0.5
        parameter.data.copy_(value.to(parameter.dtype))
