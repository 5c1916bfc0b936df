"""Recipes of LLaMA-Factory, with the data sets of its dataset_info.json."""

from __future__ import annotations

from typing import Any

from titan_ulysses.tools.migration import key_rules as to
from titan_ulysses.tools.migration.key_rules import Flat, Lost

_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_SHAREGPT = {"messages": "conversations"}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_ROLES = {"user": "user", "assistant": "assistant", "observation": "tool", "system": "system"}
_TRUNCATED = "what is longer than cutoff_len is cut there, and the rest is lost"


def _dataset(name: str, values: Flat) -> tuple[Flat, str]:
    """Return the keys of a source for an entry of dataset_info.json, and what of it is lost."""
    if "--dataset_info" not in values:
        return {}, f"{name}: there is no dataset_info.json in a dataset_dir near the recipe"
    if (entry := values["--dataset_info"].get(name)) is None:
        return {}, f"{name}: dataset_info.json does not name it"
    columns, lost = dict(entry.get("columns", {})), []
    if path := entry.get("hf_hub_url"):
        found: Flat = {"path": path}
    elif "file_name" in entry:
        found = {"path": f"{values['dataset_dir']}/{entry['file_name']}"}
    else:
        return {}, f"{name}: it is neither a file nor a data set of the Hugging Face hub"
    if "split" in entry and entry["split"] != "train":
        found["split"] = entry["split"]
    if "subset" in entry:
        found["subset"] = entry["subset"]
    is_file = str(found["path"]).endswith((".json", ".jsonl", ".parquet"))
    is_sharegpt = entry.get("formatting", "alpaca") in ("sharegpt", "openai")
    if values["stage"] == "pt":
        found |= {"source": "jsonl" if is_file else "hf"}
        found["text_field"] = columns.pop("prompt", "instruction")
    elif values["stage"] in ("dpo", "rm"):
        prompt = columns.pop("messages" if is_sharegpt else "prompt", None)
        found |= {"source": "preference"}
        found["prompt_field"] = prompt or ("conversations" if is_sharegpt else "instruction")
        found |= {f"{one}_field": columns.pop(one, one) for one in ("chosen", "rejected")}
    elif values["stage"] == "kto":
        return found | {"source": "unpaired"}, f"{name}: its columns: name them (data.label_field)"
    elif is_sharegpt:
        found |= _conversations(entry, columns)
    else:
        found |= _instructions(columns)
    lost += [f"columns.{key}" for key in columns if key not in ("images", "videos")]
    lost += [key for key in ("num_samples", "folder") if key in entry]
    return found, f"{name}: {', '.join(lost)}" if lost else ""


def _conversations(entry: Flat, columns: Flat) -> Flat:
    tags = _TAGS | entry.get("tags", {})
    found: Flat = {"source": "chat"}
    found["messages_field"] = columns.pop("messages", _SHAREGPT["messages"])
    if "tools" in columns:
        found["tools_field"] = columns.pop("tools")
    fields = {"role": tags["role_tag"], "content": tags["content_tag"]}
    if fields not in ({"role": "from", "content": "value"}, {"role": "role", "content": "content"}):
        found["message_fields"] = fields
    roles = {tags[f"{theirs}_tag"]: ours for theirs, ours in _ROLES.items()}
    known = {"human": "user", "gpt": "assistant"} | {one: one for one in _ROLES.values()}
    if others := {k: v for k, v in roles.items() if known.get(k) != v and k != "observation"}:
        found["roles"] = others
    return found


def _instructions(columns: Flat) -> Flat:
    names = {key: columns.pop(key) for key in _ALPACA if key in columns}
    if not names or names == _ALPACA:
        return {"source": "chat"}  # rows of Alpaca are known
    if names.get("query"):
        columns["query"] = names["query"]
    found: Flat = {"source": "chat", "prompt_field": names.get("prompt", _ALPACA["prompt"])}
    return found | {"completion_field": names.get("response", _ALPACA["response"])}


def _names(value: Any) -> list[str]:
    return value if isinstance(value, list) else [one.strip() for one in str(value).split(",")]


def datasets(value: Any, values: Flat) -> Flat:
    shares = values.get("interleave_probs")
    found = [_dataset(name, values) for name in _names(value)]
    return to.sources(found, _names(shares) if shares else None)


def stage(_: str, values: Flat) -> Flat:
    value = values["stage"]
    if value in ("sft", "pt"):
        return {}
    if value == "rm":
        raise Lost("its head of scores has a bias and dropout there", {"loss.name": "reward"})
    names = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
    name = "kto" if value == "kto" else names.get(values["pref_loss"]) if value == "dpo" else None
    if not name:
        raise Lost(to.OTHER_LOSSES)
    return {"loss.name": name}


def of_pairs(value: Any, values: Flat) -> Any:
    return value if values["stage"] in ("dpo", "kto") else {}


TWICE_THE_RANK = "twice the rank"


def alpha(value: Any, values: Flat) -> Any:
    return to.of_adapters(
        2 * int(values["lora_rank"]) if value == TWICE_THE_RANK else value, values
    )


def packing(value: Any, values: Flat) -> Flat:
    """packing and neat_packing: those of pretraining are packed unless they say no."""
    stage, neat = values["stage"], values.get("neat_packing")
    packs = neat or (stage == "pt" if value == "of pretraining" else value)
    if values.get("streaming"):
        return to.packing(packs, streams=True)
    if stage == "pt":
        return {"data.packing": "concat" if packs else "none"}
    if stage != "sft" or not packs:
        return {"data.packing": "none"}
    if not neat:
        why = "without neat_packing, documents see each other there"
        raise Lost(why, {"data.packing": "best_fit"})
    return {"data.packing": "best_fit"}


def trained(_: bool, values: Flat) -> Flat:
    if values["train_on_prompt"]:
        return {"data.train_on": "all"}
    return {"data.train_on": "last" if values.get("mask_history") else "assistant"}


def length(value: int, values: Flat) -> Flat:
    found = {"training.seq_len": value, "data.long_documents": "split"}
    if values["stage"] == "pt" and values.get("packing") is not False:
        return found
    raise Lost(_TRUNCATED, found)


def precision(value: bool, values: Flat) -> Flat:
    if value or values.get("pure_bf16"):
        return {"training.param_dtype": "bfloat16"}
    raise Lost("the dtype of config.json", {"training.param_dtype": "bfloat16"})
