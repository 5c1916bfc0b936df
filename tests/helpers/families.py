"""A tiny model of each family that is checked against unmodified transformers."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

# Few parameters: AdamW divides a gradient by its own size, so that rounding shows where one is
# almost 0, and among ten times as many there is one ten times nearer to it.
WIDTHS: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
SMALL: dict[str, Any] = {
    **WIDTHS,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 5}
ALTERNATING = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
LATENT |= {"num_key_value_heads": 6}
# One layer without experts and one with, of which each token gets two: of the better group, where
# there are groups.
SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {**SPARSE, "n_routed_experts": 4, "n_shared_experts": 1, "routed_scaling_factor": 1.5}
ROUTED |= {"first_k_dense_replace": 1}
GROUPS = {"n_group": 2, "topk_group": 1}
# Each query reads 4 keys. With so many heads no key has a score of 0 from all of them: of equal
# scores topk may take any.
INDEXER = {"index_topk": 4, "index_n_heads": 32, "index_head_dim": 8}
# What makes each family itself. No attention bias in glm4, whose RoPE turns only half of a head:
# the bias of the keys' other half adds the same to all scores of a query, its gradient cancels, and
# AdamW divides rounding by rounding. The key biases of qwen2 and gpt_oss are turned as a whole, and
# have gradients.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        **WINDOW,
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**ALTERNATING, "query_pre_attn_scalar": 4},
    "phi3": WINDOW,
    "olmo2": {},
    "granite": {
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "glm4": {"attention_bias": False},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gpt_oss": {
        **ALTERNATING,
        **EXPERTS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama4_text": {
        **EXPERTS,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 7,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 32,
        "attn_temperature_tuning": True,
        "floor_scale": 4,
        "attn_scale": 0.5,
    },
    "deepseek_v2": {**LATENT, **ROUTED, **GROUPS, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**LATENT, **ROUTED, **GROUPS},
    "deepseek_v32": {**LATENT, **ROUTED, **GROUPS, **INDEXER},
    "glm_moe_dsa": {
        **LATENT,
        **ROUTED,
        **INDEXER,
        "num_hidden_layers": 3,
        "indexer_types": ["full", "shared", "full"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "dots1": {**ROUTED, **GROUPS, **WINDOW, "max_window_layers": 1},
    "glm4_moe": {**ROUTED, **GROUPS, "use_qk_norm": True},
    "glm4_moe_lite": {**LATENT, **ROUTED, "mlp_layer_types": ["dense", "sparse"]},
    "ernie4_5_moe": {**SPARSE, "moe_num_experts": 4, "moe_num_shared_experts": 1},
    "exaone_moe": {**SPARSE, **GROUPS, **WINDOW, "num_experts": 4, "sliding_window_pattern": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v3": {**SPARSE, "num_experts": 4},
    "solar_open": {**ROUTED, **GROUPS},
    "sarvam_moe": {**ROUTED, **GROUPS},
    "hyperclovax": {
        "use_post_norm": True,
        "logits_scaling": 0.5,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "gemma4_text": {
        **ALTERNATING,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": 61,
        "final_logit_softcapping": 3.0,
    },
}
# Layers that carry a state, and one of attention beside them. Heads that two and four ranks do not
# divide, value heads that share key heads, groups that share B and C.
_DELTA = {"linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_conv_kernel_dim": 4}
_DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 6}
_DELTA |= {"layer_types": ["linear_attention", "full_attention"], "rms_norm_eps": 1e-3}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_EXPERTS |= {"shared_expert_intermediate_size": 16}
_MAMBA = {"mamba_n_heads": 6, "mamba_n_groups": 3, "mamba_d_state": 5, "mamba_chunk_size": 8}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_DELTA, **_EXPERTS},
    "qwen3_5_text": {**_DELTA, "head_dim": 16},
    "qwen3_5_moe_text": {**_DELTA, **_EXPERTS, "head_dim": 16},
    "olmo_hybrid": _DELTA,
    "granitemoehybrid": {
        **_MAMBA,
        "num_local_experts": 4,
        "shared_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "position_embedding_type": "rope",
        "residual_multiplier": 0.5,
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {
        **_MAMBA,
        "mamba_d_ssm": 24,
        "mamba_rms_norm": True,
        "ssm_multipliers": [0.5, 2.0, 0.75, 1.5, 1.25],
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.8,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 6,
        "mamba_head_dim": 4,
        "n_groups": 3,
        "ssm_state_size": 5,
        "chunk_size": 8,
        **ROUTED,
        "moe_shared_expert_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "conv_L_cache": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
    },
}
VERIFIED: dict[str, dict[str, Any]] = {
    family: {**LATENT, **ROUTED, **INDEXER} for family in ("axk2", "dots3_note_text", "hy_v4")
}
"""Families with indexers that are verified at each start: `model_of` makes them too."""
# 5.17 has no sarvam_moe; it leaves a router of ernie4_5_moe without random numbers, and gemma4_text
# has no fp64 there.
LACKING = (
    {"ernie4_5_moe", "gemma4_text"}
    if Version(transformers.__version__) < Version("5.24")
    else set()
)
FAMILIES |= HYBRIDS
FAMILIES = {
    name: own for name, own in FAMILIES.items() if name in CONFIG_MAPPING and name not in LACKING
}


def model_of(family: str) -> dict[str, Any]:
    return {**SMALL, "model_type": family, **(FAMILIES | VERIFIED)[family]}
