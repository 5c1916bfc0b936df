"""Files of `trl sft --config` and `trl dpo --config`, or such a command (also `trl reward`) in a
.sh. The mixtures of alignment-handbook and open-r1 are read too.
"""

from __future__ import annotations

from typing import Any

from titan_ulysses.tools.migration import key_rules as to
from titan_ulysses.tools.migration.key_rules import Flat, Lost

OF_TRAINER = "2e-5 of sft, 1e-6 of dpo, 1e-4 of reward"
_CUT = "what is longer than max_length is cut there, and the rest is lost"
_UNSAID = "of chats there; rows of a prompt and a completion are trained on the completion alone"


def _is_dpo(values: Flat) -> bool:
    return values["command"] == "trl dpo" or "beta" in values


def _is_reward(values: Flat) -> bool:
    return bool(values["command"] == "trl reward")


def _has_pairs(values: Flat) -> bool:
    return _is_dpo(values) or _is_reward(values)


def _source(entry: Flat, values: Flat) -> tuple[Flat, str]:
    """Return the keys of a source for {path or id, name or config, split, columns}."""
    path = str(entry.get("path") or entry["id"])
    found: Flat = {"path": path}
    if subset := entry.get("name") or entry.get("config"):
        found["subset"] = subset
    if entry.get("split", "train") != "train":
        found["split"] = entry["split"]
    known = {"path", "id", "name", "config", "split", "columns"}
    lost = [key for key in entry if key not in known and entry[key] not in (None, 1, 1.0)]
    columns = entry.get("columns") or []
    if _has_pairs(values):
        found["source"] = "preference"
        if "prompt" not in columns:
            lost.append("the prompt: it may be within chosen and rejected there")
    elif "dataset_text_field" in values:
        found |= {"source": "hf", "text_field": values["dataset_text_field"]}
    else:
        found["source"] = "chat"
        if not {"messages", "prompt"} & {*columns}:
            lost.append('whether its rows are chats: for texts, set data.source = "hf"')
    return found, f"{path}: {', '.join(lost)}" if lost else ""


def datasets(value: list[Flat], values: Flat) -> Flat:
    return to.sources([_source(entry, values) for entry in value])


def name(value: str, values: Flat) -> Flat:
    split, subset = values["dataset_train_split"], values.get("dataset_config")
    return datasets([{"path": value, "name": subset, "split": split}], values)


OF_PEFT = "those that peft chooses for the type of the model"


def targets(value: Any, values: Flat) -> Any:
    if value == OF_PEFT and to.has_adapters(values):
        kept = {"lora.target_modules": ["q_proj", "v_proj"]}
        raise Lost("of llama, mistral, qwen and gemma they are q_proj and v_proj", kept)
    return to.targets(value, values)


def command(_: str, values: Flat) -> Flat:
    dpo = {"loss.name": "dpo", "data.packing": "none"}
    if values["command"] == "trl dpo":
        return dpo
    if _is_reward(values):
        return {"loss.name": "reward", "data.packing": "none"}
    if values["command"] != "trl sft":
        raise Lost(to.OTHER_LOSSES)
    if _is_dpo(values):
        raise Lost("the file does not say whose it is, and has beta: loss.name = dpo is taken", dpo)
    return {}


def learning_rate(value: Any, values: Flat) -> Any:
    chosen = 1e-4 if _is_reward(values) else 1e-6 if _is_dpo(values) else 2e-5
    return chosen if value == OF_TRAINER else value


def packing(value: bool | str, values: Flat) -> Flat:
    """packing and packing_strategy."""
    if _is_reward(values):  # pairs that are too long are left out there too
        return {"data.packing": "none", "data.long_documents": "drop"}
    if _is_dpo(values):
        return {"data.packing": "none", "data.long_documents": "split"}
    how = values["packing_strategy"] if values["packing"] else ""
    found = {
        "data.packing": {"wrapped": "concat", "": "none"}.get(how, "best_fit"),
        "data.long_documents": "split",
    }
    if values.get("dataset_streaming"):
        found["data.packing"] = "concat"
    if how in ("wrapped", "bfd_split") or not isinstance(value, bool):
        return found  # of packing alone, what is lost is said
    raise Lost(_CUT, found)


def trained(value: Any, values: Flat) -> Flat:
    """assistant_only_loss and completion_only_loss."""
    if _has_pairs(values) or values.get("assistant_only_loss") is True or values.get(_COMPLETION):
        return {"data.train_on": "assistant"}
    if values.get(_COMPLETION) is False:
        return {"data.train_on": "all"}
    raise Lost(_UNSAID, {"data.train_on": "all"})


_COMPLETION = "completion_only_loss"


def beta(value: Any, values: Flat) -> Any:
    return value if _is_dpo(values) else {}


def loss_type(value: Any, values: Flat) -> Flat:
    names = value if isinstance(value, list) else [value]
    known = {"sigmoid": "dpo", "ipo": "ipo", "nll": "cross_entropy", "chunked_nll": "cross_entropy"}
    if len(names) > 1 or names[0] not in known:
        raise Lost(f"there are {', '.join(known)}")
    return {"loss.name": known[names[0]]}
