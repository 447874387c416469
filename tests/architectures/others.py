"""Every family without reasoning models of its own. What each adds over Llama is in the comment."""

from architectures.architecture import (
    EXPERTS,
    GPT,
    HEAD,
    JOINT_HEADS,
    LATENT,
    ROUTED,
    SCALES,
    SLIDING,
    WINDOW,
    Architecture,
)

OTHERS: dict[str, Architecture] = {
    "qwen2_moe": Architecture(
        "Qwen2Moe", dict(num_experts=4, shared_expert_intermediate_size=24, **EXPERTS), "Qwen1.5-MoE"
    ),
    "gemma": Architecture("Gemma", HEAD, "Gemma-2B, 7B"),
    "gemma2": Architecture(  # soft-capped scores and logits, windows in every other layer, own scale
        "Gemma2",
        dict(
            query_pre_attn_scalar=5,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=4.0,
            **HEAD,
            **SLIDING,
        ),
        "Gemma-2-2B, 9B, 27B",
    ),
    "gemma3": Architecture(  # two rotary bases
        "Gemma3Text", dict(query_pre_attn_scalar=5, **HEAD, **SLIDING), "Gemma-3-270M, 1B"
    ),
    "mixtral": Architecture(
        "Mixtral",
        dict(num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"),
        "Mixtral-8x7B",
    ),
    "phi": Architecture("Phi", {}, "Phi-1, 1.5, 2"),
    "phimoe": Architecture(
        "Phimoe",
        dict(num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"),
        "Phi-3.5-MoE",
        adapter="PhiMoEForCausalLM",
    ),
    "olmo": Architecture("Olmo", {}, "OLMo-1B, 7B"),
    "olmo2": Architecture("Olmo2", {}, "OLMo-2-7B, 13B"),  # norm over all heads' queries and keys, post-norm
    "olmoe": Architecture(
        "Olmoe", dict(num_experts=4, num_experts_per_tok=2, experts_implementation="eager"), "OLMoE-1B-7B"
    ),
    "flex_olmo": Architecture(
        "FlexOlmo",
        dict(num_experts=4, num_experts_per_tok=2, experts_implementation="eager"),
        "FlexOlmo-7x7B",
    ),
    "olmo_hybrid": Architecture(
        "OlmoHybrid", dict(layer_types=["linear_attention", "full_attention"] * 2), "OLMo-Hybrid-7B"
    ),
    "glm": Architecture("Glm", HEAD, "GLM-4-9B"),
    "granitemoe": Architecture(
        "GraniteMoe",
        dict(num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager", **SCALES),
        "Granite-3-1B-A400M",
    ),
    "granitemoehybrid": Architecture(  # Mamba-2 in nine of ten layers
        "GraniteMoeHybrid",
        dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=24,
            layer_types=["mamba", "attention"] * 2,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
            position_embedding_type="rope",
            experts_implementation="eager",
        ),
        "Granite-4.0-H",
    ),
    "deepseek_v2": Architecture(  # latent attention
        "DeepseekV2", dict(topk_method="greedy", **LATENT, **ROUTED), "DeepSeek-V2, V2-Lite"
    ),
    "nemotron": Architecture("Nemotron", HEAD, "Minitron-4B, 8B, Nemotron-4"),
    "ernie4_5": Architecture("Ernie4_5", HEAD, "ERNIE-4.5-0.3B"),
    "falcon": Architecture(
        "Falcon", dict(new_decoder_architecture=False, multi_query=True, alibi=False), "Falcon-7B"
    ),
    "cohere": Architecture("Cohere", {}, "Command-R"),
    "stablelm": Architecture("StableLm", {}, "StableLM-2"),
    "starcoder2": Architecture("Starcoder2", {}, "StarCoder2"),
    "arcee": Architecture("Arcee", HEAD, "AFM-4.5B"),
    "afmoe": Architecture(
        "Afmoe", dict(num_experts=4, num_dense_layers=1, **SLIDING, **HEAD, **EXPERTS), "Trinity"
    ),
    "jais2": Architecture("Jais2", HEAD, "Jais-2"),
    "jetmoe": Architecture(
        "JetMoe", dict(kv_channels=8, num_local_experts=4, num_experts_per_tok=2), "JetMoE-8B"
    ),
    "nanochat": Architecture("NanoChat", {}, "nanochat"),
    "vaultgemma": Architecture("VaultGemma", dict(**HEAD, **SLIDING), "VaultGemma-1B"),
    "youtu": Architecture("Youtu", LATENT, "Youtu-LLM-2B"),
    "bitnet": Architecture("BitNet", {}, "BitNet-b1.58-2B"),
    "lfm2": Architecture("Lfm2", dict(layer_types=["conv", "full_attention"] * 2), "LFM2-1.2B"),
    "lfm2_moe": Architecture(
        "Lfm2Moe",
        dict(layer_types=["conv", "full_attention"] * 2, num_experts=4, num_dense_layers=1, **EXPERTS),
        "LFM2-8B-A1B",
    ),
    "llama4": Architecture(
        "Llama4Text",
        dict(
            num_local_experts=4,
            num_experts_per_tok=1,
            intermediate_size_mlp=48,
            attention_chunk_size=16,
            **HEAD,
        ),
        "Llama-4-Scout (text)",
    ),
    "laguna": Architecture("Laguna", dict(num_experts=4, **HEAD, **EXPERTS), "Laguna"),
    "modernbert_decoder": Architecture("ModernBertDecoder", {}, "Ettin decoders"),
    "gpt2": Architecture(
        "GPT2", GPT, "GPT-2", model="GPT2LMHeadModel", drops=JOINT_HEADS
    ),  # learned positions
    "gpt_neo": Architecture(
        "GPTNeo",
        dict(num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=WINDOW),
        "GPT-Neo",
        drops=JOINT_HEADS,
    ),
    "gpt_neox": Architecture("GPTNeoX", {}, "Pythia", drops=JOINT_HEADS),
    "gptj": Architecture("GPTJ", dict(rotary_dim=4, **GPT), "GPT-J", drops=JOINT_HEADS),
    "codegen": Architecture("CodeGen", dict(rotary_dim=4, **GPT), "CodeGen", drops=JOINT_HEADS),
    "gpt_bigcode": Architecture("GPTBigCode", GPT, "SantaCoder", drops=JOINT_HEADS),
    "opt": Architecture("OPT", dict(ffn_dim=48, word_embed_proj_dim=32), "OPT", drops=JOINT_HEADS),
    "bloom": Architecture("Bloom", dict(n_layer=4, n_head=4), "BLOOM", drops=JOINT_HEADS),  # ALiBi
    "mpt": Architecture(
        "Mpt", dict(d_model=32, n_heads=4, n_layers=4, max_seq_len=512), "MPT-7B", drops=JOINT_HEADS
    ),
    "mamba": Architecture("Mamba", dict(state_size=8), "Mamba"),
    "mamba2": Architecture(
        "Mamba2", dict(state_size=8, num_heads=8, head_dim=8, n_groups=2), "Mamba-2, Codestral"
    ),
    "falcon_mamba": Architecture("FalconMamba", dict(state_size=8), "Falcon-Mamba-7B"),
    "rwkv": Architecture("Rwkv", dict(attention_hidden_size=32, context_length=512), "RWKV-4"),
    "recurrent_gemma": Architecture(
        "RecurrentGemma",
        dict(block_types=["recurrent", "attention"], attention_window_size=WINDOW, lru_width=32, **HEAD),
        "RecurrentGemma",
    ),
    "zamba2": Architecture(
        "Zamba2",
        dict(
            layers_block_type=["mamba", "hybrid"] * 2,
            mamba_d_state=8,
            n_mamba_heads=4,
            mamba_headdim=16,
            num_key_value_heads=4,
        ),
        "Zamba2",
    ),
    "bamba": Architecture(
        "Bamba",
        dict(attn_layer_indices=[1, 3], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8),
        "Bamba-9B",
    ),
}
