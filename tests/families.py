"""A tiny model of each family that is checked against unmodified transformers."""

from __future__ import annotations

from typing import Any

# Few parameters: AdamW divides a gradient by its own size, so that rounding shows where one is almost 0, and among ten
# times as many there is one ten times nearer to it.
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
# What makes each family itself. No attention bias in glm4, whose RoPE turns only half of a head: the bias of the keys'
# other half adds the same to all scores of a query, its gradient cancels, and AdamW divides rounding by rounding. The
# key biases of qwen2 and gpt_oss are turned as a whole, and have gradients.
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
    "gpt_oss": {**ALTERNATING, **EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
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
}


def model_of(family: str) -> dict[str, Any]:
    return {**SMALL, "model_type": family, **FAMILIES[family]}
