"""Recipes of axolotl: src/axolotl/utils/schemas/, of July 2026."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from titan_ulysses.tools.migration.rules import (
    ATTENTION,
    FLASH,
    NO_TENSOR,
    REPLICATE,
    SEQUENCE,
    SHARD,
    Flat,
    Format,
    Lost,
    accumulation,
    custom,
    deepspeed,
    lost,
    needless,
    only,
    same,
    warmup,
    words,
)

_OPTIMIZERS: dict[Any, Flat | str] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), {"optimizer.name": "adamw"}),
    **dict.fromkeys(
        ("adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit"), {"optimizer.name": "adamw8bit"}
    ),
    "adamw_torch_4bit": {"optimizer.name": "adamw4bit"},
}
_PER_EPOCH = "an interval in steps is needed"


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
    if values.get("rl") == "dpo" and kind in _PAIRS:
        found |= {"source": "preference", "prompt_field": entry.get("field_messages") or "messages"}
        for name in ("chosen", "rejected"):
            found[f"{name}_field"] = entry.get(f"field_{name}") or name
    elif kind == "chat_template":
        found |= {"source": "chat", "messages_field": entry.get("field_messages") or "messages"}
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


def _lost_of(entry: Any) -> str:
    """Return what a dataset has beyond its rows, and we do not."""
    known = {"path", "type", "field", "split", "name", "ds_type"}
    known |= {"field_messages", "field_chosen", "field_rejected"}
    mapping = entry.get("message_property_mappings") or {}
    if all(ours == theirs for ours, theirs in mapping.items()):
        known.add("message_property_mappings")
    others = [key for key in entry if key not in known and entry[key] != _SAME.get(key)]
    more = sorted(key for key in others if entry[key] not in (None, False, [], {}))
    if not more:
        return ""
    renamed = any(key.startswith(("message_property", "message_field")) for key in more)
    advice = ": make each row a list of {role, content}" if renamed else ""
    return f"of {entry['path']}: {', '.join(more)}{advice}"


def _datasets(value: Any, values: Flat) -> Flat:
    entries = value if isinstance(value, list) else [value]
    each = [_dataset(entry, values) for entry in entries]
    found = [keys for keys, _ in each if keys]
    data: Flat = {"data.mixture": found} if found else {}
    if len(found) == 1:
        data = {f"data.{key}": one for key, one in found[0].items()}
    if lost := "; ".join(why for _, why in each if why):
        raise Lost(lost, data)
    return data


def _pretraining(value: Any, values: Flat) -> Flat:
    entry = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(entry, list):
        raise Lost("several data sets that are read during training")
    entry = {"path": entry} if isinstance(entry, str) else dict(entry)
    found = {"field": entry.pop("text_column", "text"), "type": "completion"} | entry
    return _datasets(found, values) | {"data.streaming": True}


def _plugins(value: list[str], _: Flat) -> Flat:
    others = [one for one in value if not any(k in one.lower() for k in ("liger", "cut_cross"))]
    if others:
        raise Lost(f"{', '.join(others)}: code of its own")
    return {}


def _held_out(value: float, _: Flat) -> Flat:
    if not value:
        return {}
    raise Lost("the share held out is one document of a hundred: set validation.enable = true")


def _betas(second: Any, values: Flat) -> Flat:
    first = float(values.get("adam_beta1") or 0.9)
    return {"optimizer.betas": [first, float(values.get("adam_beta2") or 0.999)]}


def _streams(values: Flat) -> bool:
    return bool(values.get("pretraining_dataset") or values.get("streaming"))


def _packing(value: bool, values: Flat) -> Flat:
    if not _streams(values):
        return {"data.packing": "best_fit" if value else "none"}
    found = {"data.packing": "concat"}
    if not value:
        raise Lost("documents that are read during training are packed, end to end", found)
    return found


def _long(value: str, values: Flat) -> Flat:
    """Rows of text are split before long ones are dropped, and streams are not looked at."""
    if value == "truncate":
        raise Lost("it cuts and drops the rest")
    if value == "raise":
        raise Lost("look for long rows in advance")
    entries = values.get("datasets") or []
    kinds = {_kind(one) in _TEXTS for one in (entries if isinstance(entries, list) else [entries])}
    if _streams(values) or kinds <= {True}:
        return {}
    if len(kinds) == 2:
        raise Lost("chats are dropped there and texts split; data.long_documents is one for all")
    return {"data.long_documents": "drop"}


def _epochs(value: float, values: Flat) -> Flat:
    if values.get("max_steps"):
        return {}
    raise Lost("set training.steps, or plan.tokens for the cost")


_AT_MOST = "0.03, at most 100 steps"


def _warmup(value: float, values: Flat) -> Flat:
    if 0 < value < 1:
        return _warmup_ratio(value, values)
    return {"lr_scheduler.warmup_steps": 2 if value == 1 else int(value)}


def _warmup_ratio(share: float | str, values: Flat) -> Flat:
    if share == _AT_MOST and values.get("warmup_steps") is not None:
        return {}
    found = warmup(0.03 if share == _AT_MOST else float(share), values.get("max_steps") or 0)
    steps = found["lr_scheduler.warmup_steps"]
    if share == _AT_MOST:
        steps = min(steps, 100)
    return {"lr_scheduler.warmup_steps": 2 if steps == 1 else steps}  # it makes 2 of 1


_OTHERS = "docs/trainers.md has TRL's trainers in sequence parallelism"


def _rl(value: str, _: Flat) -> Flat:
    if value and value != "dpo":
        raise Lost(_OTHERS)
    return {"loss.name": "dpo"} if value else {}


def _rl_beta(value: float, values: Flat) -> Flat:
    if values.get("rl") != "dpo":
        raise Lost(_OTHERS)
    return {"loss.beta": value}


def _template(name: str, _: Flat) -> Flat:
    if name != "tokenizer_default":
        raise Lost(f"put the template {name} into the folder of the tokenizer")
    return {}


def _output(value: str, _: Flat) -> Flat:
    path = PurePosixPath(value)
    return {"job.dump_folder": str(path.parent), "job.name": path.name}


_LR: dict[Any, Flat | str] = {
    "cosine": {"lr_scheduler.decay_type": "cosine"},
    "linear": {"lr_scheduler.decay_type": "linear"},
    **dict.fromkeys(("constant", "constant_with_warmup"), {"lr_scheduler.decay_type": "constant"}),
}
_CHECKPOINTS: dict[Any, Flat | str] = {
    True: {"activation_checkpoint.mode": "full"},
    False: {"activation_checkpoint.mode": "none"},
    "offload": {"activation_checkpoint.mode": "full", "activation_checkpoint.offload": "host"},
    "offload_disk": {"activation_checkpoint.mode": "full", "activation_checkpoint.offload": "disk"},
}
_OFFLOAD: dict[Any, Flat | str] = {
    **dict.fromkeys((True, "legacy", "hidden_states"), {"activation_checkpoint.offload": "host"}),
    "disk": {"activation_checkpoint.offload": "disk"},
    False: {},
}
_CLOSED = "adapters of another kind than LoRA"

AXOLOTL = Format(
    "axolotl",
    lambda table: "base_model" in table,
    [
        same("base_model", "model.path"),
        same("tokenizer_config", "model.tokenizer"),
        needless("model_type", "config.json says it"),
        needless("tokenizer_type", "tokenizer_config.json says it"),
        lost("trust_remote_code", "code of a model folder is never run"),
        same("sequence_len", "training.seq_len"),
        custom(
            "sample_packing",
            '`true`: `data.packing = "best_fit"`, or `"concat"` where data is streamed',
            _packing,
        ),
        custom("datasets", "`data.source`, `data.path` and others, or `data.mixture`", _datasets),
        custom("pretraining_dataset", "`data.streaming = true` and the same", _pretraining),
        custom("val_set_size", "`validation.enable`", _held_out),
        lost("test_datasets", "name the file in validation.path"),
        words(
            "train_on_inputs",
            "`data.train_on`",
            {True: {"data.train_on": "all"}, False: {"data.train_on": "assistant"}},
        ),
        lost("min_sample_len", "filter the data in advance"),
        custom(
            "excess_length_strategy",
            '`drop`: `data.long_documents = "drop"`, of chats; texts are split',
            _long,
        ),
        custom(
            "rl", '`dpo`: `loss.name = "dpo"`, with datasets of type chat_template.default', _rl
        ),
        custom("rl_beta", "`loss.beta`, of dpo", _rl_beta),
        custom("trl.beta", "`loss.beta`, of dpo", _rl_beta),
        same("micro_batch_size", "training.local_batch_size"),
        custom(
            "gradient_accumulation_steps",
            "`training.global_batch_size`, with `--ranks`",
            lambda n, values: accumulation(
                n,
                values,
                batch="micro_batch_size",
                sequence=("context_parallel_size", "sequence_parallel_degree"),
            ),
        ),
        custom("num_epochs", "set `training.steps`, or `plan.tokens` for the cost", _epochs),
        same("max_steps", "training.steps"),
        same("learning_rate", "optimizer.lr"),
        words("lr_scheduler", "`lr_scheduler.decay_type`", _LR),
        custom("warmup_steps", "`lr_scheduler.warmup_steps`; a share: of max_steps", _warmup),
        custom("warmup_ratio", "`lr_scheduler.warmup_steps`, of max_steps", _warmup_ratio),
        same("cosine_min_lr_ratio", "lr_scheduler.min_lr_ratio"),
        words("optimizer", "`optimizer.name`", _OPTIMIZERS),
        same("weight_decay", "optimizer.weight_decay"),
        custom("adam_beta1", "`optimizer.betas`", _betas),
        custom("adam_beta2", "`optimizer.betas`", _betas),
        same("adam_epsilon", "optimizer.eps"),
        same("max_grad_norm", "training.max_norm"),
        same("seed", "training.seed"),
        words(
            "bf16",
            '`training.param_dtype = "bfloat16"`',
            {
                **dict.fromkeys((True, "auto", "full"), {"training.param_dtype": "bfloat16"}),
                False: {"training.param_dtype": "float32"},
            },
        ),
        words("fp8", "`quantize.float8`", {True: {"quantize.float8": True}, False: {}}),
        lost("fp16", "fp16 needs loss scaling: take bf16"),
        needless("tf32", "of fp32 products on a GPU"),
        words("gradient_checkpointing", "`activation_checkpoint.mode`, `.offload`", _CHECKPOINTS),
        needless("gradient_checkpointing_kwargs*", "checkpoints are not reentrant"),
        words("activation_offloading", "`activation_checkpoint.offload`", _OFFLOAD),
        needless("tiled_mlp*", "MLPs are tiled by default (memory.mlp_tile_tokens)"),
        needless("chunked_cross_entropy*", "the loss is tiled (memory.loss_tile_tokens)"),
        needless("flash_attn_cross_entropy", "the loss is tiled (memory.loss_tile_tokens)"),
        needless("liger_*", "the loss is tiled (memory.loss_tile_tokens)"),
        words("attn_implementation", "`model.attention`", ATTENTION, FLASH),
        needless("flash_attention", FLASH),
        words("sdp_attention", "`model.attention`", {True: {"model.attention": "sdpa"}, False: {}}),
        words(
            "flex_attention", "`model.attention`", {True: {"model.attention": "flex"}, False: {}}
        ),
        same("context_parallel_size", SEQUENCE, "Ulysses in place of a ring"),
        same("sequence_parallel_degree", SEQUENCE, "Ulysses in place of a ring"),
        needless("ring_attn_func", "Ulysses in place of a ring"),
        needless("heads_k_stride", "Ulysses in place of a ring"),
        same("dp_shard_size", SHARD),
        same("dp_replicate_size", REPLICATE),
        only("tensor_parallel_size", (1,), NO_TENSOR),
        words(
            "torch_compile",
            "`compile.enable`",
            {True: {"compile.enable": True}, False: {}, "auto": {}},
        ),
        words(
            "adapter",
            "`lora.rank`, from `lora_r`; of `qlora` `lora.quantize_base` too",
            {"lora": {}, "qlora": {"lora.quantize_base": "nf4"}, "": {}},
        ),
        same("lora_r", "lora.rank"),
        same("lora_alpha", "lora.alpha"),
        same("lora_dropout", "lora.dropout"),
        custom(
            "lora_target_modules",
            "`lora.target_modules`",
            lambda v, _: {"lora.target_modules": [v] if isinstance(v, str) else v},
        ),
        needless("lora_mlp_kernel", "kernels of its own"),
        needless("lora_qkv_kernel", "kernels of its own"),
        needless("lora_o_kernel", "kernels of its own"),
        needless("lora_target_linear", "without lora.target_modules, all linear layers"),
        words(
            "load_in_4bit",
            "`lora.quantize_base`",
            {True: {"lora.quantize_base": "nf4"}, False: {}},
        ),
        lost("load_in_8bit", "weights in 8 bits"),
        lost("peft_use_dora", _CLOSED),
        lost("unfrozen_parameters", "name what is frozen in model.freeze"),
        same("overrides_of_model_config.rope_scaling", "model.rope_scaling"),
        custom("output_dir", "`job.dump_folder`, `job.name`", _output),
        same("dataset_prepared_path", "data.cache_folder"),
        same("logging_steps", "metrics.log_interval"),
        same("save_steps", "checkpoint.interval"),
        same("save_total_limit", "checkpoint.keep_latest_k"),
        lost("saves_per_epoch", f"checkpoint.interval: {_PER_EPOCH}"),
        custom(
            "eval_steps",
            "`validation.interval`",
            lambda n, _: {"validation.enable": True, "validation.interval": n},
        ),
        lost("evals_per_epoch", f"validation.interval: {_PER_EPOCH}"),
        custom(
            "wandb_project",
            "`metrics.enable_wandb`, and WANDB_PROJECT in the environment",
            lambda name, _: {"metrics.enable_wandb": True} if name else {},
        ),
        needless("wandb_*", "WANDB_PROJECT and others in the environment"),
        lost("special_tokens*", "add them to the tokenizer (docs/fine-tuning.md)"),
        custom("chat_template", "`tokenizer_default` alone", _template),
        custom("plugins", "liger and cut cross entropy are not needed", _plugins),
        needless("resume_from_checkpoint", "the same command resumes"),
        needless("auto_resume_from_checkpoints", "the same command resumes"),
        needless("pad_to_sequence_len", "sequences have one length"),
        needless("eval_sample_packing", "held-out data is packed as data.packing says"),
        needless("ddp_find_unused_parameters", "FSDP2"),
        lost("eot_tokens", "the chat template marks what is trained"),
        lost("loss_watchdog_*", "training.skip_nonfinite, and loss_spike in the metrics"),
        needless("fsdp_version", "FSDP2"),
        same("fsdp_config.offload_params", "memory.parameter_offload"),
        needless("fsdp_config.*", "FSDP2 of each block, whose checkpoints are sharded"),
        needless("fsdp", "FSDP2"),
        lost("deepspeed", "there is no such file beside the recipe"),
        *deepspeed("deepspeed"),
    ],
    {
        "sequence_len": 512,
        "sample_packing": False,
        "excess_length_strategy": "drop",
        "num_epochs": 1,
        "cosine_min_lr_ratio": 0.0,
        "warmup_ratio": _AT_MOST,
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "seed": 42,
    },
    {"deepspeed": "deepspeed"},
)
