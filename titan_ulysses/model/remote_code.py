"""Checks that code in a model's folder ("remote code" in transformers) is never run.

`auto_map` in the folder's config names such code. No prompt and no setting can allow it. Many
folders on the hub name, under `auto_map`, the code that their model had before transformers adopted
it. If transformers has a class of that name for the model, that class is used, as transformers
itself does unless it is asked to trust the folder. If it has none, the folder is refused, because
it asks for another model or tokenizer.
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
    """Raise UserError if `auto_map` names a class of a model that transformers does not have.

    `settings` are those of the model's config, and `where` is the setting that they come from, with
    its value.
    """
    model_type = settings.get("model_type")
    for name, reference in _model_code(settings).items():
        if own := _own_class(name, model_type):
            # The class in "owner/name--file.Class", in one spelling: MPT is Mpt in transformers.
            names = (reference.split(".")[-1], own)
            if len({name.replace("_", "").casefold() for name in names}) == 1:
                continue
            has = f'for "{model_type}" has {own}'
        else:
            has = f'has no class for "{model_type}"'
        raise UserError(
            f"{where}: the model comes with its own code ({name} = {reference} under auto_map in "
            f"its config), which is not run. transformers {has}. Choose another model; or, if you "
            "mean the class in transformers, remove auto_map from a copy of its config."
        )


def check_tokenizer_code(name: str, where: str) -> None:
    """Raise UserError if a folder or hub name has a tokenizer class that transformers lacks."""
    auto_map = get_tokenizer_config(name).get("auto_map") or {}
    references = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    # A list has the class of the slow tokenizer and that of the fast one.
    listed = references if isinstance(references, list | tuple) else [references]
    references = [reference for reference in listed if reference]
    if references and not any(
        tokenizer_class_from_name(reference.split(".")[-1]) for reference in references
    ):
        raise UserError(
            f"{where}: the tokenizer comes with its own code (AutoTokenizer = {references[-1]} "
            "under auto_map in tokenizer_config.json), which is not run, and transformers has no "
            "such class. Choose another tokenizer."
        )


def describe_unused_code(config: PreTrainedConfig) -> str | None:
    """Return a line about code that a model's config names and that is not run, or None.

    transformers has a class of that name, which is used instead.
    """
    references = _model_code(vars(config))
    if not references:
        return None
    return (
        f"not run: {', '.join(references.values())}, named in the model's config; the class is "
        "transformers' own"
    )


def names_code_in(auto_map: Any, files: set[str]) -> bool:
    """Return whether all code that `auto_map` names is in these files of its folder."""
    references = auto_map.values() if isinstance(auto_map, dict) else ()
    flat = [x for one in references for x in (one if isinstance(one, list | tuple) else [one]) if x]
    return bool(flat) and all(f"{str(x).rpartition('.')[0]}.py" in files for x in flat)


def _model_code(settings: dict[str, Any]) -> dict[str, str]:
    """Return the references under `auto_map` to classes that are built here.

    An example is {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}.
    """
    auto_map = settings.get("auto_map")
    if not isinstance(auto_map, dict):  # transformers ignores it, too
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
