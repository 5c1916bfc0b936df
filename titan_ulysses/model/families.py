"""What differs between model families, as far as sharding must know it: head, MLP, attention.

It is read from the model's config and modules, whose names transformers shares between families, or
found by running the family's own forward. A model that needs something unsupported is refused by
name, because a wrong run is worse than none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from titan_ulysses.config.toml import to_toml
from titan_ulysses.distributed.errors import UserError, one_line
from titan_ulysses.memory.losses import shape_scores
from titan_ulysses.model.hf import build_on_meta, has_vision
from titan_ulysses.model.released import check_form
from titan_ulysses.model.router import unknown_router_loss
from titan_ulysses.model.vision import check_vision
from titan_ulysses.ulysses.indexer import INDEXED, has_unknown_indexers
from titan_ulysses.ulysses.linear_attention import KINDS, WITH_STATE, WITHOUT_STATE, described

CHECKED_FAMILIES = {
    *("gemma2", "gemma3_text", "gemma4_text", "glm4", "granite", "hyperclovax", "llama"),
    *("mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"),
    # With mixtures of experts.
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe"),
    *("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "hunyuan_v1_moe", "hy_v3"),
    *("llama4_text", "qwen3_moe", "sarvam_moe", "solar_open"),
    # With layers that carry a state.
    *("bamba", "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "nemotron_h", "olmo_hybrid"),
    *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
    # Of images and text.
    *("glm46v", "glm4v", "glm4v_moe", "idefics3", "internvl", "kimi_k25", "lfm2_vl", "llava"),
    *("llava_next", "llava_onevision", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5"),
    *("qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm"),
}
"""Families that the tests compare with unmodified transformers.

Any other family must pass `Verification` before it trains.
"""

_COMPUTE_WITH_EMBEDDINGS = {
    *("falcon_h1", "gemma4_text", "granite", "granitemoehybrid", "hyperclovax")
}

_WITH_SINKS = {"flint", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "mimo_v2_flash"}
"""Families whose heads have an attention sink, for which there is no key of the config."""

_OTHER_MODES = {"vision_config", "audio_config"}
_TEXT_PARTS = {
    *("deepseek_vl", "gemma3", "got_ocr2", "idefics3", "internvl", "lfm2_vl", "lighton_ocr"),
    *("llava", "llava_next", "llava_onevision", "mistral3", "smolvlm", "video_llama_3"),
    *("video_llava", "vipllava"),
    # transformers itself makes the text part of these from the whole.
    *("apertus1p5", "gemma3n", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "qwen3_5"),
    *("qwen3_5_moe", "qwen4_exp"),
}
"""Multi-modal models whose text part is a causal model that computes the same of text."""


_CHOICES = {
    "deepseek_v4": ": its queries read a window of tokens, and keys that are each made of 4 or 128 "
    "tokens, of which an indexer chooses those of 4",
    "minimax_m3_vl_text": ": its indexer chooses blocks of keys, others for each KV head",
    "qwen4_exp_text": ": its indexer scores means of several keys, chooses among these, and hands "
    "attention a mask of all tokens",
}
"""How the indexers of some families choose, which are refused."""


@dataclass(frozen=True)
class Head:
    """How a family computes its logits: softcap * tanh(scale * x / softcap), x = `lm_head(hidden)`.

    Without a softcap, the logits are scale * x.
    """

    scale: float = 1.0
    softcap: float | None = None


def head_of(model: PreTrainedModel, decoder: nn.Module) -> Head:
    """Find what the family's own forward does to its logits, by running it on known numbers.

    For one call, the decoder returns known hidden states, and `lm_head` copies a hidden state to
    all logits. Names of config keys are not used, because families disagree about them: one divides
    by a key that another multiplies by or does not read. gemma caps its logits, granite divides
    them, cohere multiplies them, and minicpm3 divides the input of `lm_head`. UserError for a head
    that does anything else.
    """
    head, name = model.get_output_embeddings(), type(model).__name__
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"model: the head of {name} is a {type(head).__name__}, which is not a linear layer."
        )
    # tanh leaves the small number unchanged and maps the large one to 1. fp32 holds both.
    small = 2.0**-40
    large = 2.0**100
    known = torch.tensor([small, large, -8, -3, -1, -0.5, 0.5, 2, 4], dtype=torch.float64)
    try:
        logits = _logits_of(model, decoder, head, known).double()
    except Exception as error:  # a family's own code raises whatever it likes
        raise UserError(
            f"model: the forward of {name} does more than call its decoder and its head "
            f"({one_line(error)}), and sequence parallelism computes only those."
        ) from error
    # The small number shows the scale. The large one shows the cap, or grows beyond any cap.
    scale = logits[0].item() / small
    found = Head(
        scale=1.0 if math.isclose(scale, 1.0, rel_tol=1e-6) else scale,
        softcap=logits[1].item() if logits[1] < math.sqrt(large) else None,
    )
    if not torch.allclose(shape_scores(known, found.scale, found.softcap), logits, rtol=1e-5):
        raise UserError(
            f"model: {name} computes its logits from the output of lm_head in a way that this "
            "version does not support: more than scaling and a tanh soft-cap."
        )
    return found


class _DecoderOutput(BaseModelOutputWithPast):
    """The output of the replaced decoder: a hidden state.

    Any other name that a family asks for is None.
    """

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def _logits_of(
    model: PreTrainedModel, decoder: nn.Module, head: nn.Linear, hidden: Tensor
) -> Tensor:
    """Return the logits [N] of the model's forward for known hidden states [N].

    Meanwhile, the decoder returns these hidden states and the head copies them.
    """
    rows = hidden[None, :, None].expand(1, -1, head.in_features)
    stand_ins = {
        decoder: lambda *_, **__: _DecoderOutput(last_hidden_state=rows),
        head: lambda x: x[..., :1].expand(*x.shape[:-1], head.out_features),
    }
    own_forwards = {module: vars(module).get("forward") for module in stand_ins}
    for module, stand_in in stand_ins.items():
        module.forward = stand_in
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.int64)
        # The forward of the class: the caller may have replaced that of the instance.
        outputs = type(model).forward(model, input_ids=ids, use_cache=False, return_dict=True)
    finally:
        for module, forward in own_forwards.items():
            del module.forward
            if forward is not None:
                module.forward = forward
    return outputs.logits[0, :, 0]


@dataclass(frozen=True)
class MLPLayout:
    """A block's MLP, the norm that only feeds it, and the norm that only takes its output."""

    mlp: nn.Module
    before: nn.Module | None = None
    after: nn.Module | None = None
    ends_block: bool = False
    """Whether the rest of the block only adds to their output.

    Backward then does not need that output.
    """


_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp")
_NORMS_BEFORE = ("pre_feedforward_layernorm", "pre_mlp_layernorm", "pre_ff_layernorm", "ffn_norm")
_NORMS_AFTER = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_norm2")


def mlp_layout(block: nn.Module) -> MLPLayout | None:
    """Return the MLP of a transformers block, or None; it is found by names that families share.

    A mixture of experts counts as an MLP. For an unchecked family, `Verification` tests whether
    the names mean the same.
    """
    parts = dict(block.named_children())
    mlp = next((parts[name] for name in _MLPS if name in parts), None)
    if mlp is None:
        mixer = parts.get("mixer")  # nemotron_h: a block is one layer, some of them an MLP
        if type(mixer).__name__.endswith(("MLP", "MoE")):
            return MLPLayout(mixer, parts.get("norm"), ends_block=True)
        return None
    has_experts = "experts" in parts  # gemma4: the last norm takes the sum of MLP and experts
    after = (
        None if has_experts else next((parts[name] for name in _NORMS_AFTER if name in parts), None)
    )
    before = next((parts[name] for name in _NORMS_BEFORE if name in parts), None)
    # In other families `post_attention_layernorm` feeds the MLP, with two exceptions: families that
    # norm the output of attention (olmo2), and blocks whose MLP shares its input with another part.
    shared = mlp is not parts.get("shared_mlp") and "shared_mlp" in parts
    if before is None and "post_feedforward_layernorm" not in parts and not shared:
        before = parts.get("post_attention_layernorm")
    return MLPLayout(
        mlp, before, after, ends_block=not has_experts and "per_layer_input_gate" not in parts
    )


def is_checked(config: PreTrainedConfig) -> bool:
    """Return whether the tests compare models of this config with unmodified transformers.

    A model of images and text may have the text and the tower of other families, and was compared
    with the usual ones.
    """
    if config.model_type not in CHECKED_FAMILIES or not has_vision(config):
        return config.model_type in CHECKED_FAMILIES
    usual = type(config)()
    text = config.get_text_config().model_type
    is_known = text in {usual.get_text_config().model_type, *CHECKED_FAMILIES}
    return is_known and config.vision_config.model_type == usual.vision_config.model_type


def extra_block_outputs(config: PreTrainedConfig) -> tuple[None, ...] | None:
    """Return what the family's blocks return after their hidden states; None: no tuple."""
    return {"bamba": (None,), "falcon_h1": ()}.get(config.model_type)


def computes_with_embeddings(config: PreTrainedConfig) -> bool:
    """Return whether the family's decoder does more with embeddings and rotary embeddings than to
    hand them to its blocks. granite multiplies embeddings, for one. True where this has not been
    checked.
    """
    family = config.model_type
    return family in _COMPUTE_WITH_EMBEDDINGS or family not in CHECKED_FAMILIES


def attention_needs(config: PreTrainedConfig) -> set[str]:
    """Return the keywords that a core must take for this model, of "window", "softcap", "sinks",
    "chosen".
    """
    needs = set()
    if getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    ):
        needs.add("window")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        needs.add("softcap")
    if config.model_type in _WITH_SINKS:
        needs.add("sinks")
    if INDEXED in (layer_types(config) or ()):
        needs.add("chosen")
    return needs


def layer_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the config of each layer, where layers differ (gemma4), else config alone."""
    return config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]


def head_sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the head sizes D of queries and keys, and Dv of values, of a layer's config.

    In latent attention, `head_dim` is the size of the part with RoPE alone.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if (without_rope := getattr(config, "qk_nope_head_dim", None)) is not None:
        size = without_rope + config.qk_rope_head_dim
    return size, getattr(config, "v_head_dim", None) or size


def largest_head(config: PreTrainedConfig) -> int | None:
    """Return the largest head size of the model; None where its config does not say."""
    if not hasattr(config, "num_attention_heads"):
        return None
    return max(max(head_sizes(layer)) for layer in layer_configs(config))


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the language model in a multi-modal one, if it is known to compute the
    same of text as the whole does. Otherwise return config.
    """
    text = config.get_text_config()
    if config.model_type not in _TEXT_PARTS or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    # What the whole says of itself is meant for its parts.
    text.tie_word_embeddings |= config.tie_word_embeddings
    if quantization := getattr(config, "quantization_config", None):
        text.quantization_config = quantization
    return text


def check_family(config: PreTrainedConfig) -> None:
    """Raise UserError for a model that would train wrongly; the message names what it needs."""
    if has_vision(config):
        check_vision(config)
    elif _OTHER_MODES & config.sub_configs.keys():
        raise UserError(
            f'model: "{config.model_type}" is multi-modal, and this version trains at most the '
            "text part of such a model, from a model.path of the whole. It knows that of "
            f"{', '.join(sorted(_TEXT_PARTS))}. For others, save the text part as a separate "
            "model, if transformers has a class for it (llama4_text), and train that."
        )
    check_form(config)
    ahead = _looks_ahead(config)
    whole, config = config, config.get_text_config()
    _check_rope(config)
    states = None
    types = layer_types(config) or []
    others = sorted({*types} - WITH_STATE - WITHOUT_STATE)
    if INDEXED in types and has_unknown_indexers(build_on_meta(whole, torch.float32)):
        others.append(INDEXED)
    if others:
        states = (
            f"layers of type {_named(whole, types, others)}, which carry state along the sequence "
            f"or choose what to see (known are {KINDS}){_CHOICES.get(config.model_type, '')}"
        )
    if needs := [
        *filter(None, (ahead or _looks_ahead(config), states, unknown_router_loss(config)))
    ]:
        raise UserError(
            f'model: "{config.model_type}" needs {"; ".join(needs)}. This version cannot do that '
            "exactly."
        )


def _named(whole: PreTrainedConfig, every: list[str], types: list[str]) -> str:
    """Return some of the types of layers that a model has, each with the classes of its first
    block.
    """
    text = build_on_meta(whole, torch.float32)
    text = text.get_decoder() if has_vision(whole) else text
    blocks = next(
        (x for x in text.modules() if isinstance(x, nn.ModuleList) and len(x) == len(every)), None
    )
    if blocks is None:
        return ", ".join(types)
    return ", ".join(f"{kind}, as in {described(blocks[every.index(kind)])}" for kind in types)


def _check_rope(config: PreTrainedConfig) -> None:
    """Raise UserError if a RoPE setting is not a finite number; JSON and TOML can express NaN."""

    def check(value: Any, place: str) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"model: {place} = {value} in its config: needs a finite number.")
        if isinstance(value, dict | list | tuple):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                check(inner, f"{place}.{key}")

    for key in ("rope_parameters", "rope_theta", "partial_rotary_factor"):
        check(getattr(config, key, None), key)


def declared_value(config: PreTrainedConfig, key: str) -> Any:
    """Return the value of a key that config's class declares, and None for any other key.

    The family does not read a key that its class does not declare.
    """
    own = {field.name for field in fields(config)} if is_dataclass(config) else ()
    return getattr(config, key, None) if hasattr(type(config), key) or key in own else None


def layer_types(config: PreTrainedConfig) -> list[str] | None:
    """Return the type of each layer as the family's config has it; None if it has no types."""
    for key in ("layer_types", "layers_block_type"):  # one is an alias of the other in some
        if types := declared_value(config, key):
            return list(types)
    return None


def attention_layers(config: PreTrainedConfig) -> int:
    """Return the number of layers that have attention."""
    types = layer_types(config) or ["full_attention"] * config.num_hidden_layers
    return sum(kind not in {"linear_attention", "conv", "mlp", "moe"} for kind in types)


def _looks_ahead(config: PreTrainedConfig) -> str | None:
    """Describe the part of config that lets tokens attend to later ones; None if there is none."""
    key = "use_bidirectional_attention"
    value = declared_value(config, key)
    if not value or value == "vision":  # gemma4: for image tokens only
        # transformers' masks obey is_causal in any family.
        key, value = "is_causal", getattr(config, "is_causal", True)
        if value:
            return None
    return (
        f"attention to later tokens ({key} = {to_toml(value)} in its config), but only causal "
        "attention is supported"
    )
