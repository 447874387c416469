"""Complete GGUF files of some kilobytes, of each architecture and quantisation that the tests read."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quantize
from tokenizers import pre_tokenizers

D_MLP, N_HEADS, N_KV_HEADS = 256, 4, 2
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<｜User｜>")
USER_DEFINED = ("<think>",)
# Merges that show where a text was cut, and a token that no merge leads to.
MERGES = ("a b", "Ċ Ċ", "Ġ 1", "1 2", "12 3", "12 34", "3 4", "Ġ a", "' s", "Ġ (", ") ;", "Ġ Ġ")
UNMERGED = "xyz"
# Quantisations that the gguf package decodes but does not write: where a block has its scales, in float16.
_SCALES_AT = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def vocabulary() -> list[str]:
    """The special tokens, the alphabet of bytes, and what the merges make."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*CONTROL, *USER_DEFINED, *alphabet, *(merge.replace(" ", "") for merge in MERGES), UNMERGED]


def write_tiny_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    quantization: str = "Q4_1",
    d_model: int = 32,
    n_layers: int = 1,
    tied: bool = True,
    pre_tokenizer: str | None = None,
    metadata: Mapping[str, int | float | str | bool] | None = None,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
    without: str | None = None,
    seed: int = 0,
) -> Path:
    """A random model and its tokenizer.

    Args:
        path: Where the file goes.
        architecture: "llama", "qwen2" (biases), "qwen3" (norms of queries and keys, heads of 128) or
            "starcoder2"; another name writes Llama's tensors under it.
        quantization: Of the matrices.
        d_model: A multiple of 256 for the K quantisations.
        n_layers: How many.
        tied: Whether the file has no head of its own.
        pre_tokenizer: How text is cut; the architecture's usual one if None.
        metadata: More keys, or other values; those of the architecture start with its name.
        extra_tensors: More tensors, in float32.
        without: A tensor that is left out.
        seed: Of the weights.
    """
    generator = np.random.default_rng(seed)
    tokens = vocabulary()
    head_dim = 128 if architecture == "qwen3" else d_model // N_HEADS
    writer = GGUFWriter(path, architecture)
    facts = {
        f"{architecture}.embedding_length": d_model,
        f"{architecture}.feed_forward_length": D_MLP,
        f"{architecture}.block_count": n_layers,
        f"{architecture}.attention.head_count": N_HEADS,
        f"{architecture}.attention.head_count_kv": N_KV_HEADS,
        f"{architecture}.context_length": 64,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 5_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer or ("smollm" if architecture == "llama" else "qwen2"),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    if architecture == "starcoder2":
        facts["starcoder2.attention.layer_norm_epsilon"] = 1e-5
    if architecture == "qwen3":
        facts["qwen3.attention.key_length"] = head_dim
    for key, value in {**facts, **(metadata or {})}.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add[type(value)](key, value)
    n_special = len(CONTROL) + len(USER_DEFINED)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [4] * len(USER_DEFINED) + [1] * (len(tokens) - n_special))
    writer.add_token_merges(list(MERGES))
    shapes = dict(_matrices(architecture, len(tokens), d_model, head_dim, n_layers, tied))
    for name, shape in shapes.items():
        if name != without:
            blocks = _blocks(generator, shape, quantization)
            writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType[quantization])
    for name, size in _vectors(architecture, d_model, head_dim, n_layers):
        if name != without:
            scale = np.ones(size) if name.endswith("norm.weight") else generator.standard_normal(size)
            writer.add_tensor(name, scale.astype(np.float32))
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _matrices(
    architecture: str, n_tokens: int, d_model: int, head_dim: int, n_layers: int, tied: bool
) -> Iterator[tuple[str, tuple[int, int]]]:
    yield "token_embd.weight", (n_tokens, d_model)
    if not tied:
        yield "output.weight", (n_tokens, d_model)
    for layer in range(n_layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_q.weight", (N_HEADS * head_dim, d_model)
        yield f"{block}.attn_k.weight", (N_KV_HEADS * head_dim, d_model)
        yield f"{block}.attn_v.weight", (N_KV_HEADS * head_dim, d_model)
        yield f"{block}.attn_output.weight", (d_model, N_HEADS * head_dim)
        if architecture != "starcoder2":
            yield f"{block}.ffn_gate.weight", (D_MLP, d_model)
        yield f"{block}.ffn_up.weight", (D_MLP, d_model)
        yield f"{block}.ffn_down.weight", (d_model, D_MLP)


def _vectors(architecture: str, d_model: int, head_dim: int, n_layers: int) -> Iterator[tuple[str, int]]:
    has_biases = architecture == "starcoder2"
    yield "output_norm.weight", d_model
    if has_biases:
        yield "output_norm.bias", d_model
    for layer in range(n_layers):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            yield f"{block}.{norm}.weight", d_model
            if has_biases:
                yield f"{block}.{norm}.bias", d_model
        if architecture == "qwen3":
            yield f"{block}.attn_q_norm.weight", head_dim
            yield f"{block}.attn_k_norm.weight", head_dim
        if architecture in ("qwen2", "starcoder2"):
            yield f"{block}.attn_q.bias", N_HEADS * head_dim
            yield f"{block}.attn_k.bias", N_KV_HEADS * head_dim
            yield f"{block}.attn_v.bias", N_KV_HEADS * head_dim
        if has_biases:
            yield f"{block}.attn_output.bias", d_model
            yield f"{block}.ffn_up.bias", D_MLP
            yield f"{block}.ffn_down.bias", d_model


def _blocks(generator: np.random.Generator, shape: tuple[int, int], quantization: str) -> np.ndarray:
    kind = GGMLQuantizationType[quantization]
    if quantization not in _SCALES_AT:
        return quantize(0.3 * generator.standard_normal(shape).astype(np.float32), kind)
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (shape[0], shape[1] // block_size, block_bytes), dtype=np.uint8)
    for start in _SCALES_AT[quantization]:
        scale = np.full(blocks.shape[:2], 2.0**-12, dtype=np.float16).view(np.uint8)
        blocks[:, :, start : start + 2] = scale.reshape(*blocks.shape[:2], 2)
    return blocks.reshape(shape[0], -1)
