"""A complete GGUF file of a few kilobytes, in the shape that `gguf_checkpoint` reads."""

from pathlib import Path

import numpy as np

D_MODEL, D_MLP, N_HEADS, N_KV_HEADS = 32, 64, 4, 2


def write_tiny_gguf(path: Path, *, seed: int = 0) -> Path:
    """One layer, a byte-level vocabulary without merges beyond one, quantised as the real file is (Q4_1)."""
    from gguf import GGMLQuantizationType, GGUFWriter, quantize
    from tokenizers import pre_tokenizers

    generator = np.random.default_rng(seed)
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "ab",
    ]
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(D_MLP)
    writer.add_block_count(1)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    kv = D_MODEL // N_HEADS * N_KV_HEADS
    matrices = {
        "token_embd": (len(tokens), D_MODEL),
        "blk.0.attn_q": (D_MODEL, D_MODEL),
        "blk.0.attn_k": (kv, D_MODEL),
        "blk.0.attn_v": (kv, D_MODEL),
        "blk.0.attn_output": (D_MODEL, D_MODEL),
        "blk.0.ffn_gate": (D_MLP, D_MODEL),
        "blk.0.ffn_up": (D_MLP, D_MODEL),
        "blk.0.ffn_down": (D_MODEL, D_MLP),
    }
    for name, shape in matrices.items():
        values = generator.standard_normal(shape).astype(np.float32)
        quantised = quantize(values, GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", quantised, raw_dtype=GGMLQuantizationType.Q4_1)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(D_MODEL, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
