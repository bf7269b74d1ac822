"""Tiny models of many families, with the options that make them small, and what their plans say about sharing."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"sliding_window": 5}
ONE_OF_EACH = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
GEMMA = {**WINDOW, **ONE_OF_EACH, "query_pre_attn_scalar": 4}

SHARED = {
    "llama": {"attention_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": WINDOW,
    "gemma2": {**GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": GEMMA,
    "phi3": {},
    "gpt2": {**SPECIAL, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, **NO_DROPOUT},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": EXPERTS,
    "qwen2_moe": {**EXPERTS, **WINDOW, **ONE_OF_EACH, "use_sliding_window": True, "shared_expert_intermediate_size": 8},
    "jetmoe": {**EXPERTS, "num_local_experts": 4, "kv_channels": 4},
    "minicpm3": {**LATENT, "dim_model_base": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
    "deepseek_v3": {
        **LATENT,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 1.5, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "gpt_oss": {**WINDOW, **ONE_OF_EACH, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "phi": {},  # its head has a bias
    "phimoe": {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "starcoder2": {**WINDOW, "residual_dropout": 0.0, "embedding_dropout": 0.0},
}
# These are padded, for the reason that their plan gives.
PADDED = {
    "llama4_text": ({"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 24}, "chunk"),
    "qwen3_next": (
        {
            **EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "shared_expert_intermediate_size": 8,
        },
        "attention interface",
    ),
    "mamba": ({**SPECIAL, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, "attention interface"),
    "bloom": ({**SPECIAL, "hidden_size": 16, "n_layer": 2, "n_head": 4}, "attention interface"),
    "stablelm": ({}, "attention interface"),
    "nemotron": ({}, "does not hand the forest on"),
    "recurrent_gemma": (
        {"num_hidden_layers": 3, "attention_window_size": 5, "logits_soft_cap": 3.0},
        "linear_attention|differ by",  # 5.17 names no kinds of layers
    ),
    "doge": ({"keep_window_size": 64}, "attention mask of its own"),
    "dynamic rope": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "scales its rotary positions with the row's length",
    ),
    "longrope": (
        {
            "original_max_position_embeddings": 32,  # phi3 takes this one before that of rope_parameters
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 4.0],
                "original_max_position_embeddings": 32,
            },
        },
        "scales its rotary positions with the row's length",
    ),
}
TYPES = {"dynamic rope": "llama", "longrope": "phi3"}
BARE = ("gpt2", "mamba", "bloom")
# Only eager attention is a truth for these in transformers 5.17, whose sdpa drops gemma2's soft-cap and doge's mask.
EAGER = ("gemma2", "doge")


def build(name, dtype=torch.float64, seed=0, **changes):
    """A tiny model in eval mode; weights large enough that logits differ by several nats."""
    options = {**SHARED, **{k: v for k, (v, _) in PADDED.items()}}[name]
    options = {**({} if name in BARE else COMMON), **options, **changes}
    if "kv_lora_rank" in options:
        del options["head_dim"]
    config = AutoConfig.for_model(TYPES.get(name, name), **options)
    own = {"attn_implementation": "eager"} if name in EAGER else {}
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager", **own)
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=rng)
        p.data = (noise * 0.3 if p.ndim > 1 else p.data + noise * 0.1).to(dtype)
    for b in model.buffers():
        b.data = b.data.to(dtype) if b.is_floating_point() else b.data
    return model.eval()
