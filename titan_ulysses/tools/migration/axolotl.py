"""Recipes of axolotl, with the arguments that it makes of them for transformers' trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from titan_ulysses.config.schema import PAIRED, PREFERENCES
from titan_ulysses.tools.migration import key_rules as to
from titan_ulysses.tools.migration import training_arguments as hf
from titan_ulysses.tools.migration.key_rules import Flat, Lost

_PAIRS = ("chat_template", "chat_template.default")
_TEXTS = ("completion", "pretrain")
_SAME = {
    "chat_template": "tokenizer_default",
    "roles_to_train": ["assistant"],
    "train_on_eos": "turn",
    "message_field_role": "role",
    "message_field_content": "content",
}
"""Keys of a dataset, with the values that mean what we do."""


def _kind(entry: Any) -> str:
    kind = entry.get("type", "completion")
    return kind if isinstance(kind, str) else "a format of its own"


def _dataset(entry: Any, values: Flat) -> tuple[Flat, str]:
    """Return the keys of a source for one of the datasets, none if it has no counterpart, and what
    of it is lost.
    """
    kind, path = _kind(entry), str(entry["path"])
    if entry.get("data_files"):
        return {}, f"of {path}: data_files: download them, and name the folder in data.path"
    found: Flat = {"path": path}
    if values.get("rl") in PAIRED and kind in _PAIRS:
        found |= {"source": "preference", "prompt_field": entry.get("field_messages") or "messages"}
        for name in ("chosen", "rejected"):
            found[f"{name}_field"] = entry.get(f"field_{name}") or name
    elif values.get("rl") == "kto":
        found |= {"source": "unpaired"}
        return found, f"of {path}: its fields: name them (data.prompt_field and others)"
    elif kind == "chat_template":
        found |= {"source": "chat", "messages_field": entry.get("field_messages") or "messages"}
        found |= _names_of(entry)
    elif kind in ("sharegpt", "alpaca"):
        found |= {"source": "chat"}
    elif kind in _TEXTS:
        found |= {"source": "hf", "text_field": entry.get("field") or "text"}
    else:
        return {}, f"of {path}: type {kind}: write prompts and completions to a file, or chats"
    if path.endswith((".jsonl", ".json", ".parquet")) and found["source"] == "hf":
        found["source"] = "jsonl"
    elif entry.get("split") not in (None, "train"):
        found["split"] = entry["split"]
    if entry.get("name"):
        found["subset"] = entry["name"]
    return found, _lost_of(entry)


def _names_of(entry: Any) -> Flat:
    """Return the names of fields and roles of a dataset of chats, where they are not ours."""
    mapping = entry.get("message_property_mappings") or {}
    mapping |= {
        name: entry[f"message_field_{name}"]
        for name in ("role", "content")
        if entry.get(f"message_field_{name}")
    }
    fields = {ours: theirs for ours, theirs in mapping.items() if ours != theirs}
    roles = {
        theirs: ours
        for ours, names in (entry.get("roles") or {}).items()
        for theirs in names
        if theirs != ours
    }
    found = {"message_fields": fields, "roles": roles}
    return {key: value for key, value in found.items() if value}


def _lost_of(entry: Any) -> str:
    """Return what a dataset has beyond its rows, and we do not."""
    known = {"path", "type", "field", "split", "name", "ds_type"}
    known |= {"field_messages", "field_chosen", "field_rejected"}
    if _kind(entry) == "chat_template" or not _names_of(entry):
        known |= {"message_property_mappings", "message_field_role", "message_field_content"}
        known.add("roles")
    if _kind(entry) == "alpaca":
        return f"of {entry['path']}: type alpaca: prompts are those of the chat template"
    others = [key for key in entry if key not in known and entry[key] != _SAME.get(key)]
    more = sorted(key for key in others if entry[key] not in (None, False, [], {}))
    return f"of {entry['path']}: {', '.join(more)}" if more else ""


def datasets(value: Any, values: Flat) -> Flat:
    entries = value if isinstance(value, list) else [value]
    return to.sources([_dataset(entry, values) for entry in entries])


def pretraining(value: Any, values: Flat) -> Flat:
    entry = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(entry, list):
        raise Lost("several data sets that are read during training")
    entry = {"path": entry} if isinstance(entry, str) else dict(entry)
    found = {"field": entry.pop("text_column", "text"), "type": "completion"} | entry
    return datasets(found, values) | {"data.streaming": True}


def plugins(value: list[str], _: Flat) -> Flat:
    others = [one for one in value if not any(k in one.lower() for k in ("liger", "cut_cross"))]
    if others:
        raise Lost(f"{', '.join(others)}: its code is not run")
    return {}


def _streams(values: Flat) -> bool:
    return bool(values.get("pretraining_dataset") or values.get("streaming"))


def packing(value: bool, values: Flat) -> Flat:
    return to.packing(value, streams=_streams(values))


def long(value: str, values: Flat) -> Flat:
    """Rows of text are split before long ones are dropped, and streams are not looked at."""
    if value == "truncate":
        raise Lost("it cuts and drops the rest")
    if value == "raise":
        raise Lost("look for long rows in advance")
    entries = values.get("datasets") or []
    kinds = {_kind(one) in _TEXTS for one in (entries if isinstance(entries, list) else [entries])}
    if _streams(values) or kinds <= {True}:
        return {"data.long_documents": "split"}
    if len(kinds) == 2:
        raise Lost(
            "chats are dropped there and texts split; data.long_documents is one for all",
            {"data.long_documents": "split"},
        )
    return {"data.long_documents": "drop"}


def _of_epoch(section: str, value: float) -> Flat:
    """Return the interval of so many validations or checkpoints an epoch."""
    share = "epoch" if value == 1 else f"{1 / value:.6g} epoch"
    return {f"{section}.enable": True, f"{section}.interval": share}


def saves_per_epoch(value: float, _: Flat) -> Flat:
    return _of_epoch("checkpoint", value) if value else {}


def validations_per_epoch(value: float, values: Flat) -> Flat:
    return _of_epoch("validation", value) if value and _is_validated(values) else {}


def _is_validated(values: Flat) -> bool:
    return bool(values.get("val_set_size") or values.get("test_datasets"))


def evaluates(_: Any, values: Flat) -> Flat:
    """Without held-out data there are no validations, and without an interval none either."""
    if not _is_validated(values):
        return {"validation.enable": False}
    found: Flat = {"validation.enable": bool(values.get("evals_per_epoch"))}
    if values.get("eval_steps"):
        found = hf.every("validation", values["eval_steps"])
    elif values.get("eval_strategy") == "epoch":
        found = {"validation.enable": True, "validation.interval": "epoch"}
    return found


def held_out(share: float, values: Flat) -> Flat:
    if share:
        raise Lost(to.SHARE_HELD_OUT, evaluates(None, values))
    return evaluates(None, values)


def saves(value: Any, values: Flat) -> Flat:
    """save_steps and save_strategy: an epoch, unless something is set."""
    if values.get("save_steps"):
        return hf.every("checkpoint", values["save_steps"])
    if values.get("saves_per_epoch"):
        return {}
    if value in ("no", False):
        return {"checkpoint.enable": False}
    if value != "epoch":
        raise Lost("set checkpoint.interval")
    return {"checkpoint.enable": True, "checkpoint.interval": "epoch"}


epochs = hf.epochs


def schedule(name: str, values: Flat) -> Flat:
    found = hf.schedule(name, values)
    least = {"lr_scheduler.min_lr_ratio": float(values["cosine_min_lr_ratio"])}
    return found | least if name == "cosine" else found


AT_MOST = "0.03, at most 100 steps"


@to.unless_constant
def warmup(value: float, values: Flat) -> Flat:
    if 0 < value < 1:
        return warmup_ratio(value, values)
    return {"lr_scheduler.warmup_steps": 2 if value == 1 else int(value)}


@to.unless_constant
def warmup_ratio(share: float | str, values: Flat) -> Flat:
    if share == AT_MOST and values.get("warmup_steps") is not None:
        return {}
    if not values.get("max_steps"):
        if share == AT_MOST:
            raise Lost("its share is of at most 100 steps", {"lr_scheduler.warmup_ratio": 0.03})
        return {"lr_scheduler.warmup_ratio": float(share)}
    found = to.warmup_of(0.03 if share == AT_MOST else float(share), values.get("max_steps") or 0)
    steps = found["lr_scheduler.warmup_steps"]
    if share == AT_MOST:
        steps = min(steps, 100)
    return {"lr_scheduler.warmup_steps": 2 if steps == 1 else steps}  # it makes 2 of 1


def rl(value: str, values: Flat) -> Flat:
    if value and value not in PREFERENCES:
        raise Lost(to.OTHER_LOSSES)
    found: Flat = {"loss.name": value} if value else {}
    if value:
        betas = (values.get(key) for key in ("rl_beta", "trl.beta", "orpo_alpha"))
        found["loss.beta"] = next((one for one in betas if one is not None), 0.1)  # TRL's
    if value == "simpo" and values.get("cpo_alpha") != 0:
        raise Lost(to.CPO_ALPHA, found)
    return found


def _of_loss(*losses: str) -> Callable[[Any, Flat], Any]:
    """Return the rule of a key that some of the losses read."""

    def become(value: Any, values: Flat) -> Any:
        if values.get("rl") not in losses:
            raise Lost(to.OTHER_LOSSES)
        return value

    return become


of_preferences, of_orpo, of_simpo = _of_loss(*PREFERENCES), _of_loss("orpo"), _of_loss("simpo")
of_dpo_and_simpo, of_kto = _of_loss("dpo", "simpo"), _of_loss("kto")


def wandb(project: Any, _: Flat) -> Flat:
    return {"metrics.enable_wandb": True} if project else {}
