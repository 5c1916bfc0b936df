"""Commands (in a .sh) and YAML files of ms-swift."""

from __future__ import annotations

from typing import Any

from titan_ulysses.tools.migration import key_rules as to
from titan_ulysses.tools.migration import training_arguments as hf
from titan_ulysses.tools.migration.key_rules import Flat, Lost

OF_TUNER = "1e-5 of all weights, 1e-4 of adapters"
CONFIG = "that of config.json"
MODEL = "the model's"
SIXTEEN = "16 / batch / GPUs"
_BETAS = {"dpo": 0.1, "orpo": 0.1, "kto": 0.1, "simpo": 2.0}


def _stage(values: Flat) -> str:
    return str(values["command"]).split()[-1]


def tuner(_: str, values: Flat) -> Flat:
    name = values.get("train_type", values["tuner_type"])
    if name not in ("full", "lora"):
        raise Lost("there is LoRA, and training of all weights")
    return {}


def learning_rate(value: Any, values: Flat) -> Any:
    chosen = 1e-4 if to.has_adapters(values) else 1e-5
    return chosen if value == OF_TUNER else value


def accumulation(value: Any, values: Flat) -> Flat:
    """Without a number there are as many micro-batches as make 16 sequences on all GPUs."""
    ranks = values["--ranks"] or values.get("env.NPROC_PER_NODE", 0) * values.get("env.NNODES", 1)
    batch = int(values["per_device_train_batch_size"])
    if value == SIXTEEN and ranks:
        value = max(1, -(-16 // (batch * ranks)))
    if value == SIXTEEN:
        raise Lost("training.global_batch_size depends on the number of GPUs: give --ranks")
    return to.accumulation(value, values | {"--ranks": ranks})


def _dataset(name: str, values: Flat) -> tuple[Flat, str]:
    path, _, count = str(name).partition("#")
    is_file = path.endswith((".json", ".jsonl", ".parquet"))
    path, _, subset = (
        (path, "", "") if is_file or path.startswith(("/", ".")) else path.partition(":")
    )
    found = {"path": path} | ({"subset": subset} if subset else {})
    if _stage(values) == "rlhf" and values["rlhf_type"] in (*_BETAS, "rm"):
        kind = "unpaired" if values["rlhf_type"] == "kto" else "preference"
        return found | {"source": kind}, f"{path}: its columns: name them (data.chosen_field)"
    lost = [f"#{count}: a part of its rows"] if count else []
    if _stage(values) == "pt":
        found["source"] = "jsonl" if is_file else "hf"
        lost.append("its column: name it in data.text_field")
    else:
        found["source"] = "chat"
    return found, f"{path}: {', '.join(lost)}" if lost else ""


def datasets(value: Any, values: Flat) -> Flat:
    names = value if isinstance(value, list) else [value]
    found = [_dataset(name, values) for name in names]
    return to.sources(found, values.get("interleave_prob"))


def length(value: Any, _: Flat) -> Any:
    if value == MODEL:
        raise Lost("set training.seq_len")
    return value


def packing(value: bool, values: Flat) -> Flat:
    streams = bool(values.get("streaming"))
    if value and not streams and values.get("packing_strategy", "binpack") != "binpack":
        raise Lost("packing_strategy: documents are reordered", {"data.packing": "best_fit"})
    return to.packing(value, streams=streams)


def long(value: str, values: Flat) -> Flat:
    known = {"split": "split"} if values.get("streaming") else {"delete": "drop", "split": "split"}
    if value not in known:
        what = "left out" if value == "delete" else "cut, and the rest is lost"
        raise Lost(f"what is too long is {what} there", {"data.long_documents": "split"})
    return {"data.long_documents": known[value]}


def trained(value: str, values: Flat) -> Flat:
    if value == "of the command":
        value = "all" if _stage(values) == "pt" else "default"
    names = {"default": "assistant", "last_round": "last", "all": "all"}
    if _stage(values) == "rlhf":
        return {"data.train_on": "assistant"}
    if value not in names:
        raise Lost("there are no other weights of tokens", {"data.train_on": "assistant"})
    return {"data.train_on": names[value]}


def precision(value: str, _: Flat) -> Flat:
    if value == CONFIG:
        raise Lost(f"{CONFIG} is not known here", {"training.param_dtype": "bfloat16"})
    if value == "float16":
        raise Lost(to.FP16)
    return {"training.param_dtype": value}


def evaluates(_: Any, values: Flat) -> Flat:
    """As checkpoints are saved, if there is validation data."""
    if not (values.get("val_dataset") or values["split_dataset_ratio"]):
        return {"validation.enable": False}
    how = values["eval_strategy"]
    steps = values.get("eval_steps") or values["save_steps"]
    more = {"eval_strategy": values["save_strategy"] if how == "as save_strategy" else how}
    return hf.evaluates(how, values | more | {"eval_steps": steps})


def held_out(share: float, values: Flat) -> Flat:
    if share:
        raise Lost(to.SHARE_HELD_OUT, evaluates(None, values))
    return evaluates(None, values)


def loss(value: str, values: Flat) -> Flat:
    if _stage(values) != "rlhf":
        return {}
    if value == "rm":
        return {"loss.name": "reward"}
    if value not in _BETAS:
        raise Lost(to.OTHER_LOSSES)
    found = {"loss.name": value, "loss.beta": float(values.get("beta", _BETAS[value]))}
    if value == "simpo":
        found["loss.simpo_gamma"] = float(values.get("simpo_gamma", 1))
        if values.get("cpo_alpha") != 0:
            raise Lost(to.CPO_ALPHA, found)
    return found


def deepspeed(value: str, _: Flat) -> Flat:
    name, offload = (*str(value).split("_", 1), "")[:2]
    if name not in ("zero0", "zero1", "zero2", "zero3") or offload not in ("", "offload"):
        raise Lost("no such file beside the recipe")
    found = {"memory.optimizer_offload": True} if offload else {}
    return found | ({"memory.parameter_offload": True} if offload and name == "zero3" else {})
