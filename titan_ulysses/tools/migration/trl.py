"""Files of `trl sft --config` and `trl dpo --config`, or such a command (also `trl reward`) in a
.sh. The mixtures of alignment-handbook and open-r1 are read too.
"""

from __future__ import annotations

from typing import Any

from titan_ulysses.tools.migration import key_rules as to
from titan_ulysses.tools.migration import training_arguments as hf
from titan_ulysses.tools.migration.key_rules import Flat, Lost

_OF_TRAINER = "2e-5 of sft, 1e-6 of dpo, 1e-4 of reward"
_CUT = "what is longer than max_length is cut there, and the rest is lost"
_UNSAID = "of chats there; rows of a prompt and a completion are trained on the completion alone"


def _is_dpo(values: Flat) -> bool:
    return values["command"] == "trl dpo" or "beta" in values


def _is_reward(values: Flat) -> bool:
    return bool(values["command"] == "trl reward")


def _has_pairs(values: Flat) -> bool:
    return _is_dpo(values) or _is_reward(values)


def _has_adapters(values: Flat) -> bool:
    return bool(values.get("use_peft"))


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


def _datasets(value: list[Flat], values: Flat) -> Flat:
    return to.sources([_source(entry, values) for entry in value])


def _name(value: str, values: Flat) -> Flat:
    split, subset = values["dataset_train_split"], values.get("dataset_config")
    return _datasets([{"path": value, "name": subset, "split": split}], values)


def _command(_: str, values: Flat) -> Flat:
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


def _learning_rate(value: Any, values: Flat) -> Flat:
    chosen = 1e-4 if _is_reward(values) else 1e-6 if _is_dpo(values) else 2e-5
    return {"optimizer.lr": chosen if value == _OF_TRAINER else value}


def _packing(value: bool | str, values: Flat) -> Flat:
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


def _trained(value: Any, values: Flat) -> Flat:
    """assistant_only_loss and completion_only_loss."""
    if _has_pairs(values) or values.get("assistant_only_loss") is True or values.get(_COMPLETION):
        return {"data.train_on": "assistant"}
    if values.get(_COMPLETION) is False:
        return {"data.train_on": "all"}
    raise Lost(_UNSAID, {"data.train_on": "all"})


_COMPLETION = "completion_only_loss"


def _beta(value: float, values: Flat) -> Flat:
    return {"loss.beta": value} if _is_dpo(values) else {}


def _loss_type(value: Any, values: Flat) -> Flat:
    names = value if isinstance(value, list) else [value]
    known = {"sigmoid": "dpo", "ipo": "ipo", "nll": "cross_entropy", "chunked_nll": "cross_entropy"}
    if len(names) > 1 or names[0] not in known:
        raise Lost(f"there are {', '.join(known)}")
    return {"loss.name": known[names[0]]}


TRL = to.Format(
    "TRL",
    "trl/trainer/{base,sft,dpo,model}_config.py and trl/scripts/utils.py of 1.10.0.dev0 (f2cd577, "
    f"July 2026); what stands there in neither, in {hf.SOURCE}",
    lambda table: (
        str(table.get("command", "")).startswith("trl")
        or (
            "model_name_or_path" in table
            and bool({"dataset_name", "datasets", "dataset_mixture", "dataset_mixer"} & {*table})
        )
    ),
    [
        to.computed("command", "loss.name", _command, "sft is cross_entropy"),
        to.needless("env.CUDA_VISIBLE_DEVICES accelerate_config num_processes", "torchrun"),
        to.lost("env.*", "no such variable is read"),
        to.same("model_name_or_path", "model.path"),
        to.only("model_revision", ("main",), "download that revision"),
        to.lost("trust_remote_code model_init_kwargs*", "code of a model folder is never run"),
        to.choice(
            "dtype torch_dtype",
            "",
            {"float32": None, "auto": None},
            {
                "bfloat16": "its weights are bf16; the master weights here are in fp32",
                "float16": to.FP16,
            },
            "master weights are in fp32",
        ),
        to.attention("attn_implementation"),
        to.choice("use_peft", "", {True: None, False: None}, why="see lora.rank"),
        *to.adapters("lora_r", "lora_target_modules", _has_adapters),
        to.in_list("lora_target_parameters", "lora.target_parameters"),
        to.switch("load_in_4bit", "lora.quantize_base", "nf4"),
        to.lost("load_in_8bit", "no weights in 8 bits"),
        to.only("bnb_4bit_quant_type", ("nf4",), "only nf4"),
        to.computed("dataset_name", "`data.source`, `data.path` and others", _name),
        to.needless("dataset_config dataset_train_split dataset_text_field", "see dataset_name"),
        to.computed("datasets dataset_mixture.datasets", "the same, or `data.mixture`", _datasets),
        to.needless("dataset_mixture.seed", "see training.seed"),
        to.lost("dataset_mixer", "name its sources in [[data.mixture]]"),
        to.lost("dataset_mixture.test_split_size test_split_size", to.SHARE_HELD_OUT),
        to.lost("dataset_test_split dataset_splits", "name it in validation.split"),
        to.same("dataset_streaming streaming", "data.streaming"),
        to.needless("dataset_num_proc dataset_kwargs* preprocessing_num_workers", "chosen"),
        to.lost("chat_template chat_template_path eos_token pad_token", "the tokenizer's is used"),
        to.same("max_length max_seq_length", "training.seq_len"),
        to.only("truncation_mode", ("keep_start",), "it is dropped or split"),
        to.computed("packing packing_strategy", "`data.packing`, `data.long_documents`", _packing),
        to.needless("eval_packing padding_free pad_to_multiple_of", "see data.packing"),
        to.computed(f"assistant_only_loss {_COMPLETION}", "data.train_on", _trained),
        to.computed("learning_rate", "optimizer.lr", _learning_rate),
        to.computed("loss_type", "loss.name", _loss_type),
        to.computed("beta", "loss.beta", _beta, "of dpo"),
        to.same("center_rewards_coefficient", "loss.center_rewards_coefficient", "of reward"),
        to.same("label_smoothing", "loss.label_smoothing"),
        to.same("precompute_ref_log_probs", "loss.precompute_reference"),
        to.needless("precompute_ref_batch_size disable_dropout", "it is that of training"),
        to.lost("router_aux_loss_coef", "config.json says it (output_router_logits)"),
        to.switch("activation_offloading", "activation_checkpoint.offload", "host"),
        *hf.rules(sequence=[], has_adapters=_has_adapters),
    ],
    hf.DEFAULTS
    | {
        "command": "trl sft",
        "learning_rate": _OF_TRAINER,
        "bf16": True,
        "logging_steps": 10,
        "gradient_checkpointing": True,
        "max_length": 1024,
        "packing": False,
        "packing_strategy": "bfd",
        "assistant_only_loss": False,
        "dataset_train_split": "train",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": to.OF_PEFT,
    },
    differs=[
        to.ONE_STEP_LATER,
        "experts have a router loss there, of router_aux_loss_coef = 0.001; here they have "
        "what its config.json says (output_router_logits)",
    ],
)
