"""Recipes of ArcticTraining: arctic_training/config/, of April 2026."""

from __future__ import annotations

from typing import Any

from migration.rules import (
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
    lost,
    needless,
    only,
    same,
    warmup,
    words,
)

_ARCTIC_SOURCES = {
    "huggingface_instruct": {"source": "chat"},
    "huggingface_causal": {"source": "hf"},
    "huggingface": {"source": "chat"},
}


def _arctic_source(entry: Any) -> Flat:
    if isinstance(entry, str):
        entry = {"name_or_path": entry}
    kind = entry.get("type", "huggingface")
    if kind not in _ARCTIC_SOURCES:
        raise Lost(f"the source {kind}: write its rows to a file, and name that in data.path")
    known = {"type", "name_or_path", "split", "role_mapping", "process"}
    if more := sorted(entry.keys() - known):
        raise Lost(f"its {', '.join(more)}: prepare the data in advance")
    roles = {"user": "messages.role.user", "assistant": "messages.role.assistant"}
    if entry.get("role_mapping", roles) != roles:
        raise Lost("its role_mapping: the messages must be a list of {role, content}")
    found = _ARCTIC_SOURCES[kind] | {"path": str(entry["name_or_path"])}
    return found | ({"split": entry["split"]} if entry.get("split") else {})


def _arctic_sources(value: list[Any], _: Flat) -> Flat:
    found = [_arctic_source(entry) for entry in value]
    if len(found) == 1:
        return {f"data.{key}": one for key, one in found[0].items()}
    return {"data.mixture": found}


def _arctic_validation(value: list[Any], values: Flat) -> Flat:
    if len(value) != 1:
        raise Lost("several validation sets")
    held_out = _arctic_source(value[0])
    trained = [_arctic_source(entry)["path"] for entry in values["data.sources"]]
    if [held_out["path"]] != trained or "split" not in held_out:
        raise Lost("set validation.path, or a split of data.path as validation.split")
    return {"validation.enable": True, "validation.split": held_out["split"]}


def _arctic_checkpoint(value: Any, _: Flat) -> Flat:
    found: Flat = {"checkpoint.enable": False, "checkpoint.export": False}
    for one in value if isinstance(value, list) else [value]:
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
        lost("epochs", "set training.steps, or plan.tokens for the cost"),
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
        same("data.max_length", "training.seq_len"),
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
            "`lr_scheduler.decay_type`",
            {
                "linear": {"lr_scheduler.decay_type": "linear"},
                "cosine": {"lr_scheduler.decay_type": "cosine"},
                **dict.fromkeys(
                    ("constant", "constant_with_warmup"), {"lr_scheduler.decay_type": "constant"}
                ),
            },
        ),
        needless("scheduler.type", "lr_scheduler"),
        custom(
            "scheduler.warmup_ratio",
            "`lr_scheduler.warmup_steps`",
            lambda share, values: warmup(share, values.get("exit_iteration") or 0),
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
        "optimizer.lr": 5e-4,
        "optimizer.betas": [0.9, 0.999],
        "lr_scheduler.decay_type": "linear",
        "lr_scheduler.min_lr_ratio": 0.0,
        "training.seed": 42,
        "checkpoint.enable": False,
        "checkpoint.export": False,
    },
)
