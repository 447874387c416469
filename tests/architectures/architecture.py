"""What says how to build a tiny model of a family, and the options that several families share."""

from dataclasses import dataclass, field
from typing import Any

N_LAYERS, N_HEADS, N_KV_HEADS, D_HEAD, WINDOW = 4, 4, 2, 8, 11


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        prefix: Class prefix of the transformers configuration: `Llama` for `LlamaConfig`.
        options: What its configuration needs besides `SHAPE`.
        examples: Checkpoints of this architecture.
        formats: Formats of the reasoning models among them, names in the package's table.
        model: transformers class of the causal LM; by default `<prefix>ForCausalLM`.
        adapter: Name under which TransformerLens knows it, where that is another one.
        drops: Keys of `SHAPE` that its configuration gives another meaning.
    """

    prefix: str
    options: dict[str, Any] = field(default_factory=dict)
    examples: str = ""
    formats: tuple[str, ...] = ()
    model: str = ""
    adapter: str = ""
    drops: tuple[str, ...] = ()

    @property
    def model_class(self) -> str:
        """transformers class of the causal LM."""
        return self.model or f"{self.prefix.removesuffix('Text')}ForCausalLM"


SHAPE = dict(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=N_HEADS,
    num_key_value_heads=N_KV_HEADS,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
HEAD = dict(head_dim=D_HEAD)
SLIDING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=24, experts_implementation="eager")
ROUTED = dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, **EXPERTS)
LATENT = dict(
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=8,
    num_key_value_heads=4,
)
LINEAR = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"] * 2,
)
SCALES = dict(embedding_multiplier=3.0, attention_multiplier=0.5, residual_multiplier=0.7, logits_scaling=2.5)
GPT = dict(n_embd=32, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=512)
JOINT_HEADS = ("num_key_value_heads",)
