"""Tiny models, and how they are built without sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from titan_ulysses.data.tokenizer import load_tokenizer
from titan_ulysses.model import hf
from titan_ulysses.model.families import attention_needs

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


# LayerNorm and no step in fp32: transformers' own code stays in fp64, as llama's norms do not. No
# bias: that of the keys has gradients that cancel to almost nothing, and AdamW divides their
# rounding by itself.
STARCODER2 = {
    "model_type": "starcoder2",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "use_bias": False,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def write_byte_model(
    folder: Path, table: dict[str, Any] = LLAMA, **changes: Any
) -> PreTrainedModel:
    """Write a tiny model of bytes, with its tokenizer, in fp32; return it in eval mode."""
    table = table | {"vocab_size": 257, "max_position_embeddings": 256} | changes
    torch.manual_seed(0)
    config = AutoConfig.for_model(**table)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return model


def plain_model(
    table: dict[str, Any], dtype: torch.dtype, *, experts: str | None
) -> PreTrainedModel:
    """Unmodified transformers, with the attention that it chooses; where scores are capped, with
    one that caps them.

    transformers 5.17 chooses sdpa for gemma2, which does not.
    """
    config = hf.load_model_config("", table)
    attention = "eager" if "softcap" in attention_needs(config) else None
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, experts_implementation=experts, attn_implementation=attention
    )
    for parameter in model.parameters():  # routers are in fp32 whatever dtype says
        parameter.data = parameter.data.to(dtype)
    return model
