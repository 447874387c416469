"""Every family with reasoning models among its checkpoints. What each adds over Llama is in the comment."""

from architectures.architecture import (
    D_HEAD,
    EXPERTS,
    HEAD,
    LATENT,
    LINEAR,
    ROUTED,
    SCALES,
    SLIDING,
    WINDOW,
    Architecture,
)

REASONING: dict[str, Architecture] = {
    "llama": Architecture(
        "Llama",
        examples="Llama-3.x, R1-Distill-Llama, Llama-Nemotron-Nano, SmolLM2",
        formats=("llama-3", "deepseek-r1", "chatml"),
    ),
    "qwen2": Architecture(  # projection biases
        "Qwen2",
        examples="QwQ-32B, R1-Distill-Qwen, Qwen2.5, OpenThinker",
        formats=("qwq", "deepseek-r1", "chatml"),
    ),
    "qwen3": Architecture(  # norm on each head's query and key
        "Qwen3", HEAD, "Qwen3-0.6B … 32B, R1-0528-Qwen3-8B", ("qwen3", "qwq", "deepseek-r1")
    ),
    "qwen3_moe": Architecture(
        "Qwen3Moe", dict(num_experts=4, **HEAD, **EXPERTS), "Qwen3-30B-A3B, 235B-A22B", ("qwen3", "qwq")
    ),
    "qwen3_next": Architecture(  # gated delta nets in three of four layers
        "Qwen3Next",
        dict(num_experts=4, shared_expert_intermediate_size=24, **LINEAR, **HEAD, **EXPERTS),
        "Qwen3-Next-80B-A3B-Thinking",
        ("qwq",),
    ),
    "qwen3_5": Architecture("Qwen3_5Text", dict(**LINEAR, **HEAD), "Qwen3.5", ("qwen3",)),
    "qwen3_5_moe": Architecture(
        "Qwen3_5MoeText",
        dict(num_experts=4, shared_expert_intermediate_size=24, **LINEAR, **HEAD, **EXPERTS),
        "Qwen3.5-35B-A3B",
        ("qwen3",),
    ),
    "gpt_oss": Architecture(  # sinks, windows, biases, a mixture of experts
        "GptOss",
        dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            experts_implementation="eager",
            **HEAD,
            **SLIDING,
        ),
        "gpt-oss-20b, 120b",
        ("gpt-oss",),
    ),
    "gemma4": Architecture(
        "Gemma4Text",
        dict(
            global_head_dim=D_HEAD,
            vocab_size_per_layer_input=264,
            hidden_size_per_layer_input=8,
            **HEAD,
            **SLIDING,
        ),
        "Gemma-4 (text)",
        ("gemma-4",),
    ),
    "mistral": Architecture(  # a window in every layer
        "Mistral",
        dict(sliding_window=WINDOW, **HEAD),
        "Mistral-7B, Magistral-Small-2506",
        ("magistral", "mistral"),
    ),
    "ministral3": Architecture("Ministral3", HEAD, "Ministral-3-Reasoning (text)", ("magistral",)),
    "phi3": Architecture(  # one joint QKV projection
        "Phi3", {}, "Phi-4-reasoning, Phi-4-mini-reasoning, Phi-4, Phi-3", ("phi-4-reasoning", "phi-3")
    ),
    "olmo3": Architecture("Olmo3", SLIDING, "Olmo-3-7B-Think, 32B-Think", ("chatml", "qwq")),
    "smollm3": Architecture(  # layers without positions
        "SmolLM3", dict(no_rope_layers=[1, 0, 1, 0]), "SmolLM3-3B", ("smollm3",)
    ),
    "glm4": Architecture("Glm4", HEAD, "GLM-Z1-9B, 32B, GLM-4-0414"),  # rotates adjacent pairs of half a head
    "glm4_moe": Architecture(
        "Glm4Moe", dict(use_qk_norm=True, **HEAD, **ROUTED), "GLM-4.5, 4.5-Air, 4.6, 4.7", ("glm-4.5",)
    ),
    "glm4_moe_lite": Architecture(  # latent attention
        "Glm4MoeLite", dict(**LATENT, **ROUTED), "GLM-4.7-Flash", ("glm-4.5",)
    ),
    "glm_moe_dsa": Architecture(  # an indexer chooses which keys a query sees
        "GlmMoeDsa",
        dict(index_topk=16, index_head_dim=8, index_n_heads=2, **LATENT, **ROUTED),
        "GLM-5",
        ("glm-4.5",),
    ),
    "granite": Architecture(  # scales on embedding, attention, residual and logits
        "Granite", SCALES, "Granite-3.x (thinking=True)", ("granite",)
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3", dict(**LATENT, **ROUTED), "DeepSeek-R1, R1-0528, V3, V3.1", ("deepseek-r1",)
    ),
    "nemotron_h": Architecture(  # Mamba-2, attention and MLPs as layers of their own
        "NemotronH",
        dict(
            layers_block_type=["mamba", "attention", "mlp", "mamba"],
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=2,
            **HEAD,
        ),
        "Nemotron-Nano-9B-v2, Nemotron-3-Nano",
        ("qwen3",),
        drops=("num_hidden_layers",),
    ),
    "hunyuan_v1_dense": Architecture("HunYuanDenseV1", HEAD, "Hunyuan-0.5B … 7B-Instruct"),
    "exaone4": Architecture("Exaone4", SLIDING, "EXAONE-4.0-1.2B, 32B"),  # no rotation in full layers
    "ernie4_5_moe": Architecture(
        "Ernie4_5_Moe",
        dict(moe_num_experts=4, moe_k=2, moe_layer_start_index=1, **EXPERTS),
        "ERNIE-4.5-21B-A3B-Thinking",
    ),
    "falcon_h1": Architecture(  # attention and Mamba-2 side by side in every layer
        "FalconH1",
        dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, **HEAD),
        "Falcon-H1R-7B",
    ),
    "cohere2": Architecture(
        "Cohere2", dict(**SLIDING, **HEAD), "Command-A-Reasoning, Command-R7B", ("command-a",)
    ),
    "seed_oss": Architecture("SeedOss", HEAD, "Seed-OSS-36B-Instruct", ("seed-oss",)),
    "apertus": Architecture("Apertus", {}, "Apertus-8B, 70B"),
    "minimax_m2": Architecture(
        "MiniMaxM2",
        dict(
            num_local_experts=4, num_experts_per_tok=2, rotary_dim=4, experts_implementation="eager", **HEAD
        ),
        "MiniMax-M2",
        ("minimax-m2",),
    ),
    "jamba": Architecture(
        "Jamba",
        dict(
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            use_mamba_kernels=False,
            mamba_d_state=8,
            experts_implementation="eager",
        ),
        "Jamba-Reasoning-3B",
    ),
}
