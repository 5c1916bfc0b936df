"""Recipes of ArcticTraining: arctic_training/config/, of April 2026."""

from __future__ import annotations

from typing import Any

from titan_ulysses.tools.migration.rules import (
    ATTENTION,
    DTYPE,
    FLASH,
    SEQUENCE,
    Flat,
    Format,
    Lost,
    accumulation,
    custom,
    deepspeed,
    needless,
    only,
    same,
    warmup,
    words,
)

_ARCTIC_SOURCES = {
    "huggingface_instruct": {"source": "chat"},
    "huggingface_causal": {"source": "hf"},
}
_IN_MESSAGES = {
    "HuggingFaceH4/ultrachat_200k",
    "THUDM/LongAlign-10k",
}
"""Data sets whose rows have lists of {role, content}, as its own table of data sets says."""
_ROLES = {"user": "messages.role.user", "assistant": "messages.role.assistant"}


def _arctic_source(entry: Any, values: Flat) -> tuple[Flat, str]:
    """Return our keys of a source, and what of it is lost."""
    if isinstance(entry, str):
        entry = {"name_or_path": entry}
    is_causal = values["type"] == "causal"
    kind = entry.get("type", "huggingface")
    if kind == "huggingface":  # what its trainer takes where no type is given
        kind = "huggingface_causal" if is_causal else "huggingface_instruct"
    if kind not in _ARCTIC_SOURCES:
        raise Lost(f"the source {kind}: write its rows to a file, and name that in data.path")
    path, missing = str(entry["name_or_path"]), ""
    found = _ARCTIC_SOURCES[kind] | {"path": path}
    if entry.get("split"):
        found["split"] = entry["split"]
    known = {"type", "name_or_path", "split", "role_mapping", "process"}
    roles = entry.get("role_mapping", _ROLES if path in _IN_MESSAGES else None)
    if more := sorted(entry.keys() - known):
        missing = f"of {path}: {', '.join(more)}: prepare the data in advance"
    elif found["source"] == "chat" and roles != _ROLES:
        missing = f"of {path}: its role_mapping: make each row a list of {{role, content}}"
    return found, missing


def _arctic_sources(value: list[Any], values: Flat) -> Flat:
    found = [_arctic_source(entry, values) for entry in value]
    if len(found) == 1:
        data = {f"data.{key}": one for key, one in found[0][0].items()}
    else:
        data = {"data.mixture": [one for one, _ in found]}
    if missing := "; ".join(why for _, why in found if why):
        raise Lost(missing, data)
    return data


def _arctic_validation(value: list[Any], values: Flat) -> Flat:
    if len(value) != 1:
        raise Lost("several validation sets")
    held_out, _ = _arctic_source(value[0], values)
    trained = [_arctic_source(entry, values)[0]["path"] for entry in values["data.sources"]]
    if [held_out["path"]] != trained or "split" not in held_out:
        raise Lost("set validation.path, or a split of data.path as validation.split")
    return {"validation.enable": True, "validation.split": held_out["split"]}


def _arctic_packing(value: bool, values: Flat) -> Flat:
    if values["type"] == "causal":  # documents end to end, and no such key
        return {"data.packing": "concat"}
    return {"data.packing": "best_fit" if value else "none"}


def _arctic_filter(value: bool, values: Flat) -> Flat:
    if values["type"] == "causal":
        return {"data.long_documents": "split"}
    if not value:
        raise Lost("conversations longer than data.max_length stay whole there: raise that")
    return {"data.long_documents": "drop"}


def _arctic_length(value: Any, _: Flat) -> Flat:
    if value == _POSITIONS:
        raise Lost("set training.seq_len")
    return {"training.seq_len": value}


_POSITIONS = "the model's max_position_embeddings"


def _arctic_epochs(value: int, values: Flat) -> Flat:
    if values.get("train_iters") or (value == 1 and values.get("exit_iteration")):
        return {}
    raise Lost("set training.steps, or plan.tokens for the cost")


def _arctic_warmup(share: float, values: Flat) -> Flat:
    steps = values.get("train_iters") or 0
    if share and not steps:
        raise Lost(
            "a share of the steps of all epochs, as is the decay, even if exit_iteration ends the "
            "run before: set lr_scheduler.warmup_steps"
        )
    return warmup(share, steps)


def _arctic_checkpoint(value: Any, _: Flat) -> Flat:
    found: Flat = {"checkpoint.enable": False, "checkpoint.export": False}
    for one in value if isinstance(value, list) else [value]:
        if one.get("enabled") is False:
            continue
        if one.get("save_every_n_epochs"):
            raise Lost("save_every_n_epochs: set checkpoint.interval, in steps")
        if one.get("type") == "huggingface":
            found["checkpoint.export"] = True
        else:
            found["checkpoint.enable"] = True
        if one.get("save_every_n_steps"):
            found |= {"checkpoint.enable": True, "checkpoint.interval": one["save_every_n_steps"]}
    return found


ARCTIC = Format(
    "ArcticTraining",
    lambda table: isinstance(table.get("model"), dict) and "name_or_path" in table["model"],
    [
        only("type", ("sft", "causal"), "its trainers for other losses: docs/trainers.md"),
        same("micro_batch_size", "training.local_batch_size"),
        custom(
            "gradient_accumulation_steps",
            "`training.global_batch_size`, with `--ranks`",
            lambda n, values: accumulation(
                n, values, batch="micro_batch_size", sequence=("sequence_parallel_size",)
            ),
        ),
        same("exit_iteration", "training.steps"),
        same("train_iters", "training.steps"),
        needless("min_iterations", "the data is repeated for training.steps"),
        custom("epochs", "set `training.steps`, or `plan.tokens` for the cost", _arctic_epochs),
        same("seed", "training.seed"),
        same("sequence_parallel_size", SEQUENCE),
        only("expert_parallel_size", (1,), "expert parallelism"),
        words(
            "activation_checkpoint_cpu_offload",
            '`activation_checkpoint.offload = "host"`',
            {True: {"activation_checkpoint.offload": "host"}, False: {}},
        ),
        words(
            "tiled_mlp_compute",
            '`false`: `memory.mlp_tile_tokens = "all"`',
            {True: {}, False: {"memory.mlp_tile_tokens": "all"}},
            "MLPs are tiled by default",
        ),
        same("loss_log_interval", "metrics.log_interval"),
        needless("train_log_iter_interval", "metrics.jsonl has each logged step"),
        custom(
            "eval_interval",
            "`validation.interval`",
            lambda n, _: {"validation.enable": True, "validation.interval": n} if n else {},
        ),
        needless("model.type", "liger is not needed: the loss is tiled"),
        same("model.name_or_path", "model.path"),
        words("model.dtype", "`training.param_dtype`", DTYPE),
        words("model.attn_implementation", "`model.attention`", ATTENTION, FLASH),
        words(
            "model.disable_activation_checkpoint",
            '`true`: `activation_checkpoint.mode = "none"`',
            {True: {"activation_checkpoint.mode": "none"}, False: {}},
        ),
        only("model.peft_config.peft_type", ("LORA",), "adapters other than LoRA"),
        same("model.peft_config.r", "lora.rank"),
        same("model.peft_config.lora_alpha", "lora.alpha"),
        same("model.peft_config.lora_dropout", "lora.dropout"),
        same("model.peft_config.target_modules", "lora.target_modules"),
        same("tokenizer.name_or_path", "model.tokenizer"),
        needless("tokenizer.type", "any Hugging Face tokenizer"),
        needless("data.type", "data.source"),
        custom("data.sources", "`data.source`, `data.path`, `data.split`", _arctic_sources),
        custom("data.eval_sources", "`validation.split`", _arctic_validation),
        custom("data.max_length", "`training.seq_len`", _arctic_length),
        custom(
            "data.pack_samples",
            '`true`: `data.packing = "best_fit"`; of causal `"concat"`, always',
            _arctic_packing,
        ),
        custom(
            "data.filter_samples",
            '`true`: `data.long_documents = "drop"`; of causal `"split"`, always',
            _arctic_filter,
        ),
        words(
            "data.mask_inputs",
            "`data.train_on`",
            {True: {"data.train_on": "assistant"}, False: {"data.train_on": "all"}},
        ),
        needless("data.div_length", "a sequence is padded to its length"),
        needless("data.pad_to", "a sequence is padded to its length"),
        same("data.seed", "training.seed"),
        same("data.cache_dir", "data.cache_folder"),
        needless("data.num_proc", "chosen by the cores of the machine"),
        needless("data.dl_num_workers", "chosen by the cores of the machine"),
        words(
            "optimizer.type",
            "`cpu_adam`: `memory.optimizer_offload = true`",
            {
                **dict.fromkeys(("cpu_adam", "cpuadam"), {"memory.optimizer_offload": True}),
                **dict.fromkeys(("fused_adam", "fusedadam"), {}),
            },
        ),
        same("optimizer.learning_rate", "optimizer.lr"),
        same("optimizer.lr", "optimizer.lr"),
        same("optimizer.weight_decay", "optimizer.weight_decay"),
        same("optimizer.betas", "optimizer.betas"),
        words(
            "scheduler.name",
            "`lr_scheduler.decay_type`, to 0",
            {
                **{
                    kind: {"lr_scheduler.decay_type": kind, "lr_scheduler.min_lr_ratio": 0.0}
                    for kind in ("linear", "cosine")
                },
                **dict.fromkeys(
                    ("constant", "constant_with_warmup"), {"lr_scheduler.decay_type": "constant"}
                ),
            },
        ),
        needless("scheduler.type", "lr_scheduler"),
        custom(
            "scheduler.warmup_ratio",
            "`lr_scheduler.warmup_steps`, of `train_iters`",
            _arctic_warmup,
        ),
        custom(
            "checkpoint",
            "`checkpoint.*`; of type huggingface: `checkpoint.export`",
            _arctic_checkpoint,
        ),
        same("wandb.enable", "metrics.enable_wandb"),
        needless("wandb.*", "WANDB_PROJECT, WANDB_ENTITY and others in the environment"),
        same("logger.output_dir", "job.dump_folder"),
        needless("logger.*", "rank 0 prints"),
        *deepspeed("deepspeed"),
    ],
    {
        "type": "sft",
        "epochs": 1,
        "optimizer.lr": 5e-4,
        "optimizer.betas": [0.9, 0.999],
        "scheduler.name": "linear",
        "scheduler.warmup_ratio": 0.1,
        "data.max_length": _POSITIONS,
        "data.pack_samples": False,
        "data.filter_samples": True,
        "seed": 42,
        "checkpoint": [],
    },
)
