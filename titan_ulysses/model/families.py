"""What differs between model families, as far as sharding must know it; what it cannot do yet is refused by name."""

from __future__ import annotations

from transformers import PreTrainedConfig

from titan_ulysses.errors import UserError

_FULL_ATTENTION = {"full_attention", "sliding_attention"}


def check_family(config: PreTrainedConfig, seq_len: int) -> None:
    """Raise UserError for a model whose attention or head would train wrongly: better no run than a wrong one."""
    needs = [*_attention_needs(config, seq_len), *_head_needs(config), *_position_needs(config)]
    if needs:
        raise UserError(
            f'model: "{config.model_type}" needs {"; ".join(needs)}. '
            "This version trains models with plain causal attention and a plain linear head, such as llama or qwen3."
        )


def _attention_needs(config: PreTrainedConfig, seq_len: int) -> list[str]:
    needs = []
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < seq_len:
        needs.append(f"sliding-window attention (window {window} < training.seq_len {seq_len})")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        needs.append("soft-capped attention")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _FULL_ATTENTION)
    if others:
        needs.append(f"layers of type {', '.join(others)}")
    if config.model_type == "gpt_oss":
        needs.append("attention sinks")
    return needs


def _head_needs(config: PreTrainedConfig) -> list[str]:
    needs = []
    if getattr(config, "final_logit_softcapping", None) is not None:
        needs.append("soft-capped logits (final_logit_softcapping)")
    for factor in ("logits_scaling", "logit_scale"):
        if getattr(config, factor, None) not in (None, 1):
            needs.append(f"scaled logits ({factor})")
    if getattr(config, "output_router_logits", False):
        needs.append("router losses (output_router_logits)")
    return needs


def _position_needs(config: PreTrainedConfig) -> list[str]:
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]  # one for each type of layer
    kinds = sorted({parameters.get("rope_type", "default") for parameters in nested or [rope]})
    # These two look at the largest position of what they are given, which is one rank's slice.
    return [f'RoPE of type "{kind}"' for kind in kinds if kind in ("dynamic", "longrope")]
