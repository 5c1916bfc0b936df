"""Prediction layers: multi-token prediction, trained beside the model (DeepSeek-V3, arXiv
2412.19437, section 2.2).

A prediction layer reads the model's last hidden state of token i and the embedding of token i + 1,
and predicts token i + 2 with the model's own head. It is transformers' `MtpLayer`, around one more
unmodified block of the model. It lives in `model.mtp`; in files it is layer N behind the N of the
model. transformers loads it for speculative decoding, and not for training.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from titan_ulysses.distributed.errors import UserError

FAMILIES = ("deepseek_v3", "glm4_moe")
"""Types whose layer N in the released folders is such a layer."""


def check_layer(config: PreTrainedConfig) -> None:
    """Raise UserError if models of config have no prediction layer that can be trained."""
    count = getattr(config, "num_nextn_predict_layers", 0)
    reason = None
    if config.model_type not in FAMILIES:
        reason = f'of "{config.model_type}" none is trained, only of {" and ".join(FAMILIES)}'
    elif count != 1:
        reason = f"config.json has num_nextn_predict_layers = {count}, and only 1 can be trained"
    elif not hasattr(transformers.modeling_layers, "MtpLayer"):
        reason = f"transformers {transformers.__version__} has none: install 5.24 or newer"
    if reason:
        raise UserError(f"loss.prediction_weight: prediction layers: {reason}. Set it to 0.")


def add_layer(model: PreTrainedModel) -> None:
    """Add the prediction layer, on the device of the model."""
    decoder, config = model.get_decoder(), model.config.get_mtp_config()
    block, norm = type(decoder.layers[-1]), type(decoder.norm)
    model.mtp = transformers.modeling_layers.MtpLayer(config, block, norm, 0).to(model.dtype)


def layer_of(model: nn.Module) -> Any:
    """Return the prediction layer of a model, or None."""
    return getattr(model, "mtp", None)


def renamings(model: PreTrainedModel) -> list[WeightRenaming]:
    """Return how names in files become those of the layer: the first renamings of all."""
    if layer_of(model) is None:
        return []
    inside = {name: name for name in ("enorm", "hnorm", "eh_proj")}
    inside["shared_head.norm"] = "post_norm"
    return [
        WeightRenaming(f"model.layers.{model.config.num_hidden_layers}.", "mtp.mtp_block."),
        *(WeightRenaming(f"mtp.mtp_block.{x}.", f"mtp.{y}.") for x, y in inside.items()),
    ]


def copies(model: PreTrainedModel) -> dict[str, str]:
    """Return the names in files of what the layer shares with the model, and of what it is."""
    if layer_of(model) is None:
        return {}
    layer = f"model.layers.{model.config.num_hidden_layers}"
    return {
        f"{layer}.embed_tokens.weight": "model.embed_tokens.weight",
        f"{layer}.shared_head.head.weight": "lm_head.weight",
    }
