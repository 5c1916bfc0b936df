"""Recipes of ArcticTraining."""

from __future__ import annotations

from typing import Any

from titan_ulysses.tools.migration import key_rules as to
from titan_ulysses.tools.migration.key_rules import Flat, Lost

_SOURCES = {"huggingface_instruct": {"source": "chat"}, "huggingface_causal": {"source": "hf"}}
_IN_MESSAGES = {"HuggingFaceH4/ultrachat_200k", "THUDM/LongAlign-10k"}
"""Data sets whose rows have lists of {role, content}, as its own table of data sets says."""
_ROLES = {"user": "messages.role.user", "assistant": "messages.role.assistant"}


def _source(entry: Any, values: Flat) -> tuple[Flat, str]:
    """Return our keys of a source, and what of it is lost."""
    if isinstance(entry, str):
        entry = {"name_or_path": entry}
    is_causal = values["type"] == "causal"
    kind = entry.get("type", "huggingface")
    if kind == "huggingface":  # what its trainer takes where no type is given
        kind = "huggingface_causal" if is_causal else "huggingface_instruct"
    if kind not in _SOURCES:
        raise Lost(f"the source {kind}: write its rows to a file, and name that in data.path")
    path, missing = str(entry["name_or_path"]), ""
    found = _SOURCES[kind] | {"path": path}
    if entry.get("split"):
        found["split"] = entry["split"]
    known = {"type", "name_or_path", "split", "role_mapping", "process"}
    roles = entry.get("role_mapping", _ROLES if path in _IN_MESSAGES else None)
    if more := sorted(entry.keys() - known):
        missing = f"of {path}: {', '.join(more)}: prepare the data in advance"
    elif found["source"] == "chat" and roles != _ROLES:
        missing = f"of {path}: its role_mapping: make each row a list of {{role, content}}"
    return found, missing


def sources(value: list[Any], values: Flat) -> Flat:
    return to.sources([_source(entry, values) for entry in value])


def validation(value: list[Any], values: Flat) -> Flat:
    if len(value) != 1:
        raise Lost("several validation sets")
    held_out, _ = _source(value[0], values)
    trained = [_source(entry, values)[0]["path"] for entry in values["data.sources"]]
    if [held_out["path"]] != trained or "split" not in held_out:
        raise Lost("set validation.path, or a split of data.path as validation.split")
    return {"validation.enable": True, "validation.split": held_out["split"]}


def packing(value: bool, values: Flat) -> Flat:
    if values["type"] == "causal":  # documents end to end, and no such key
        return {"data.packing": "concat"}
    return {"data.packing": "best_fit" if value else "none"}


def filter(value: bool, values: Flat) -> Flat:
    if values["type"] == "causal":
        return {"data.long_documents": "split"}
    if not value:
        raise Lost("conversations longer than data.max_length stay whole there: raise that")
    return {"data.long_documents": "drop"}


def length(value: Any, _: Flat) -> Any:
    if value == POSITIONS:
        raise Lost("set training.seq_len")
    return value


POSITIONS = "the model's max_position_embeddings"


def epochs(value: int, values: Flat) -> Any:
    if values.get("train_iters") or values.get("min_iterations"):  # the latter repeats the data
        return {}
    return value


@to.unless_constant
def warmup(share: float, values: Flat) -> Flat:
    if steps := values.get("train_iters"):
        return to.warmup_of(share, steps)
    found = {"lr_scheduler.warmup_ratio": share}
    if share and values.get("exit_iteration"):
        raise Lost(
            "a share of the steps of all epochs, as is the decay, even if exit_iteration ends the "
            "run before: set lr_scheduler.warmup_steps",
            found,
        )
    return found


def checkpoint(value: Any, _: Flat) -> Flat:
    found: Flat = {"checkpoint.enable": False, "checkpoint.export": False}
    for one in value if isinstance(value, list) else [value]:
        if one.get("enabled") is False:
            continue
        if epochs := one.get("save_every_n_epochs"):
            every = "epoch" if epochs == 1 else f"{epochs} epoch"
            found |= {"checkpoint.enable": True, "checkpoint.interval": every}
        if one.get("type") == "huggingface":
            found["checkpoint.export"] = True
        else:
            found["checkpoint.enable"] = True
        if one.get("save_every_n_steps"):
            found |= {"checkpoint.enable": True, "checkpoint.interval": one["save_every_n_steps"]}
    if found["checkpoint.enable"]:
        found["checkpoint.keep_latest_k"] = 0
    return found


def validations(every: int, _: Flat) -> Flat:
    return {"validation.enable": bool(every)} | ({"validation.interval": every} if every else {})
