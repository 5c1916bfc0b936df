"""What differs between model families, as far as sharding must know it: attention, head, positions.

All of it is read from the model's config and modules, whose names transformers shares between families. A model that
needs what nothing here can do is refused by name: better no run than a wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from titan_ulysses.errors import UserError
from titan_ulysses.model.router import unknown_router_loss

CHECKED_FAMILIES = {
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt_oss",
    "granite",
    "llama",
    "llama4_text",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
}
"""Families that the tests compare with unmodified transformers. Any other must prove itself before it trains."""

_OTHER_MODES = {"vision_config", "audio_config"}
_KNOWN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Head:
    """How a family makes logits from `lm_head(hidden)`: logits * scale, then softcap * tanh(logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


def head_of(config: PreTrainedConfig) -> Head:
    """gemma caps its logits, granite divides them, cohere multiplies them."""
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


@dataclass(frozen=True)
class MLPLayout:
    """A block's MLP and the norms that do nothing but feed it, and take its output, alone."""

    mlp: nn.Module
    before: nn.Module | None
    after: nn.Module | None


def mlp_layout(block: nn.Module) -> MLPLayout | None:
    """The MLP of a transformers block, by the names that families share; None where there is none of them.

    Whatever follows it in the block only adds to its output. A mixture of experts counts as an MLP.
    """
    parts = dict(block.named_children())
    mlp = next((parts[name] for name in ("mlp", "feed_forward", "block_sparse_moe") if name in parts), None)
    if mlp is None:
        return None
    after = parts.get("post_feedforward_layernorm", parts.get("post_mlp_layernorm"))
    before = parts.get("pre_feedforward_layernorm")
    # Elsewhere this one feeds the MLP, unless the family norms what comes out of attention (olmo2), or its MLP shares
    # what it is fed with another part of the block.
    if before is None and "post_feedforward_layernorm" not in parts and "shared_mlp" not in parts:
        before = parts.get("post_attention_layernorm")
    return MLPLayout(mlp, before, after)


def attention_needs(config: PreTrainedConfig) -> set[str]:
    """Which keywords a core must take for this model: of "window", "softcap", "sinks"."""
    needs = set()
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        needs.add("window")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        needs.add("softcap")
    if config.model_type == "gpt_oss":
        needs.add("sinks")
    return needs


def check_family(config: PreTrainedConfig) -> None:
    """Raise UserError for a model that would train wrongly: what it needs, by name."""
    if _OTHER_MODES & config.sub_configs.keys():
        raise UserError(
            f'model: "{config.model_type}" is multi-modal, of which this version trains no part. Save its text part as '
            "a model of its own, if transformers has one for it (gemma3_text, llama4_text), and train that."
        )
    if quantization := getattr(config, "quantization_config", None):
        method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
        raise UserError(
            f'model: the weights are quantized ("{getattr(method, "value", method)}", by quantization_config of '
            "config.json), and cannot be trained so. Take the model in bf16, or save it dequantized by transformers."
        )
    needs = []
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if others:
        needs.append(f"layers of type {', '.join(others)}, which carry state along the sequence or choose what to see")
    if reason := unknown_router_loss(config):
        needs.append(reason)
    if needs:
        raise UserError(f'model: "{config.model_type}" needs {"; ".join(needs)}. This version cannot do that exactly.')
