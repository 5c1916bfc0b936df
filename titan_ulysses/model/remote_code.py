"""Code that a folder brings along (`auto_map`, which transformers calls remote code) is never run,
and nobody is asked.

Many folders on the hub name, under `auto_map`, the code that their model had before transformers
adopted it. Where transformers has a class of that name for the model, its own is used, as
transformers itself does unless it is told to trust the folder. Where it has none the folder is
refused: what it asks for would be another model or tokenizer.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
)
from transformers.models.auto.tokenization_auto import (
    get_tokenizer_config,
    tokenizer_class_from_name,
)

from titan_ulysses.distributed.errors import UserError

_MODELS = {"AutoModel": MODEL_MAPPING, "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING}


def check_model_code(settings: dict[str, Any], where: str) -> None:
    """UserError where `auto_map` among a config's settings names a class of a model that
    transformers does not have.

    where: the setting that they come from, and its value.
    """
    model_type = settings.get("model_type")
    for name, reference in _model_code(settings).items():
        if own := _own_class(name, model_type):
            if _spelled(reference) == own.replace("_", "").casefold():
                continue
            has = f'for "{model_type}" has {own}'
        else:
            has = f'has no class for "{model_type}"'
        raise UserError(
            f"{where}: the model is code of its own ({name} = {reference} under auto_map in its "
            f"config), which is not run. transformers {has}. Choose another model; or, if "
            "transformers' own is meant, remove auto_map from a copy of its config."
        )


def check_tokenizer_code(name: str, where: str) -> None:
    """UserError where the folder or hub name has a tokenizer that transformers does not have."""
    auto_map = get_tokenizer_config(name).get("auto_map") or {}
    references = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    # A slow one, and a fast one.
    references = [reference for reference in _listed(references) if reference]
    if references and not any(
        tokenizer_class_from_name(reference.split(".")[-1]) for reference in references
    ):
        raise UserError(
            f"{where}: the tokenizer is code of its own (AutoTokenizer = {references[-1]} under "
            "auto_map in tokenizer_config.json), which is not run, and transformers has no such "
            "class. Choose another tokenizer."
        )


def describe_unused_code(config: PreTrainedConfig) -> str | None:
    """A line on the code that a model's config names although transformers has a class of that
    name, if it does.
    """
    references = _model_code(vars(config))
    if not references:
        return None
    return (
        f"not run: {', '.join(references.values())}, named in the model's config; the class is "
        "transformers' own"
    )


def _model_code(settings: dict[str, Any]) -> dict[str, str]:
    """What `auto_map` names for what is built here, such as {"AutoModelForCausalLM":
    "modeling_x.XForCausalLM"}.
    """
    auto_map = settings.get("auto_map")
    if not isinstance(auto_map, dict):  # which transformers passes over, too
        return {}
    return {name: str(auto_map[name]) for name in ("AutoConfig", *_MODELS) if auto_map.get(name)}


def _own_class(name: str, model_type: str | None) -> str | None:
    if model_type not in CONFIG_MAPPING:
        return None
    config_class = CONFIG_MAPPING[model_type]
    if name == "AutoConfig":
        return config_class.__name__
    mapping = _MODELS[name]
    return mapping[config_class].__name__ if config_class in mapping else None


def _spelled(reference: str) -> str:
    """The class of a reference such as "owner/name--file.Class", in one spelling: MPT is Mpt in
    transformers.
    """
    return reference.split(".")[-1].replace("_", "").casefold()


def _listed(references: Any) -> list[str | None]:
    return list(references) if isinstance(references, list | tuple) else [references]
