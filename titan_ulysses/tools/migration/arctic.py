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


def _sources(value: list[Any], values: Flat) -> Flat:
    return to.sources([_source(entry, values) for entry in value])


def _validation(value: list[Any], values: Flat) -> Flat:
    if len(value) != 1:
        raise Lost("several validation sets")
    held_out, _ = _source(value[0], values)
    trained = [_source(entry, values)[0]["path"] for entry in values["data.sources"]]
    if [held_out["path"]] != trained or "split" not in held_out:
        raise Lost("set validation.path, or a split of data.path as validation.split")
    return {"validation.enable": True, "validation.split": held_out["split"]}


def _packing(value: bool, values: Flat) -> Flat:
    if values["type"] == "causal":  # documents end to end, and no such key
        return {"data.packing": "concat"}
    return {"data.packing": "best_fit" if value else "none"}


def _filter(value: bool, values: Flat) -> Flat:
    if values["type"] == "causal":
        return {"data.long_documents": "split"}
    if not value:
        raise Lost("conversations longer than data.max_length stay whole there: raise that")
    return {"data.long_documents": "drop"}


def _length(value: Any, _: Flat) -> Flat:
    if value == _POSITIONS:
        raise Lost("set training.seq_len")
    return {"training.seq_len": value}


_POSITIONS = "the model's max_position_embeddings"


def _epochs(value: int, values: Flat) -> Flat:
    if values.get("train_iters") or values.get("min_iterations"):  # the latter repeats the data
        return {}
    return {"training.epochs": value}


def _warmup(share: float, values: Flat) -> Flat:
    if steps := values.get("train_iters"):
        return to.warmup(share, steps)
    found = {"lr_scheduler.warmup_ratio": share}
    if share and values.get("exit_iteration"):
        raise Lost(
            "a share of the steps of all epochs, as is the decay, even if exit_iteration ends the "
            "run before: set lr_scheduler.warmup_steps",
            found,
        )
    return found


def _checkpoint(value: Any, _: Flat) -> Flat:
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


_ADAMW = {"optimizer.name": "adamw"}
ARCTIC = to.Format(
    "ArcticTraining",
    "arctic_training/config/ and data/sft_factory.py of 0.8.1.dev0 (b28638e, April 2026)",
    lambda table: isinstance(table.get("model"), dict) and "name_or_path" in table["model"],
    [
        to.only("type", ("sft", "causal"), "for other losses see docs/trainers.md"),
        to.same("micro_batch_size", "training.local_batch_size"),
        to.accumulation(batch="micro_batch_size", sequence=["sequence_parallel_size"]),
        to.same("exit_iteration train_iters", "training.steps"),
        to.needless("min_iterations", "the data is repeated for training.steps"),
        to.computed("epochs", "`training.epochs`, without train_iters and min_iterations", _epochs),
        to.same("seed data.seed", "training.seed"),
        to.same("sequence_parallel_size", to.SEQUENCE),
        to.only("expert_parallel_size", (1,), "no expert parallelism"),
        to.switch("activation_checkpoint_cpu_offload", "activation_checkpoint.offload", "host"),
        to.choice(
            "tiled_mlp_compute",
            "memory.mlp_tile_tokens",
            {True: None, False: "all"},
            why="MLPs are tiled by default",
        ),
        to.same("loss_log_interval", "metrics.log_interval"),
        to.needless("train_log_iter_interval", "metrics.jsonl has each logged step"),
        to.computed(
            "eval_interval",
            "validation.interval",
            lambda n, _: {"validation.enable": bool(n)} | ({"validation.interval": n} if n else {}),
        ),
        to.needless("model.type", "liger is not needed: the loss is tiled"),
        to.same("model.name_or_path", "model.path"),
        to.dtype("model.dtype"),
        to.attention("model.attn_implementation"),
        to.switch("model.disable_activation_checkpoint", "activation_checkpoint.mode", "none"),
        to.only("model.peft_config.peft_type", ("LORA",), "no adapters other than LoRA"),
        to.same("model.peft_config.r", "lora.rank"),
        to.same("model.peft_config.lora_alpha", "lora.alpha"),
        to.same("model.peft_config.lora_dropout", "lora.dropout"),
        to.same("model.peft_config.target_modules", "lora.target_modules"),
        to.same("tokenizer.name_or_path", "model.tokenizer"),
        to.needless("tokenizer.type", "any Hugging Face tokenizer is read"),
        to.needless("data.type", "data.source says it"),
        to.computed("data.sources", "`data.source`, `data.path`, `data.split`", _sources),
        to.computed("data.eval_sources", "validation.split", _validation),
        to.computed("data.max_length", "training.seq_len", _length),
        to.computed(
            "data.pack_samples",
            '`true`: `data.packing = "best_fit"`; of causal `"concat"`, always',
            _packing,
        ),
        to.computed(
            "data.filter_samples",
            '`true`: `data.long_documents = "drop"`; of causal `"split"`, always',
            _filter,
        ),
        to.choice("data.mask_inputs", "data.train_on", {True: "assistant", False: "all"}),
        to.needless("data.div_length data.pad_to", "a sequence is padded to its length"),
        to.same("data.cache_dir", "data.cache_folder"),
        to.needless("data.use_data_cache data.cache_processed_data", "data is cached"),
        to.needless("data.num_proc data.dl_num_workers", "chosen by the cores of the machine"),
        to.choice(
            "optimizer.type",
            "memory.optimizer_offload",
            {
                "cpu_adam cpuadam": _ADAMW | {"memory.optimizer_offload": True},
                "fused_adam fusedadam": _ADAMW,
            },
        ),
        to.same("optimizer.learning_rate optimizer.lr", "optimizer.lr"),
        to.weight_decay(
            "optimizer.weight_decay", lambda values: "model.peft_config.peft_type" in values
        ),
        *to.same_name("optimizer.betas eps"),
        to.choice(
            "scheduler.name",
            "lr_scheduler.decay_type",
            {
                "linear": {"lr_scheduler.decay_type": "linear", "lr_scheduler.min_lr_ratio": 0.0},
                "cosine": {"lr_scheduler.decay_type": "cosine", "lr_scheduler.min_lr_ratio": 0.0},
                "constant constant_with_warmup": "constant",
            },
        ),
        to.needless("scheduler.type", "see [lr_scheduler]"),
        to.of_warmup(
            "scheduler.warmup_ratio",
            "scheduler.name",
            "`lr_scheduler.warmup_ratio`; `lr_scheduler.warmup_steps`, of train_iters",
            _warmup,
        ),
        to.computed("checkpoint", "`checkpoint.*`, `checkpoint.export`", _checkpoint),
        to.same("wandb.enable", "metrics.enable_wandb"),
        to.needless("wandb.*", "set WANDB_PROJECT, WANDB_ENTITY and others in the environment"),
        to.same("logger.output_dir", "job.dump_folder"),
        to.needless("logger.*", "rank 0 prints"),
        *to.deepspeed("deepspeed"),
    ],
    {
        "type": "sft",
        "epochs": 1,
        "optimizer.lr": 5e-4,
        "optimizer.type": "fused_adam",
        "optimizer.betas": [0.9, 0.999],
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.1,
        "micro_batch_size": 1,
        "model.dtype": "bf16",
        "deepspeed.gradient_clipping": 1.0,
        "data.mask_inputs": True,
        "eval_interval": 0,
        "scheduler.name": "linear",
        "scheduler.warmup_ratio": 0.1,
        "data.max_length": _POSITIONS,
        "data.pack_samples": False,
        "data.filter_samples": True,
        "seed": 42,
        "checkpoint": [],
    },
    differs=[
        to.ONE_STEP_LATER,
        "each rank takes the mean over its own labels there, and the mean over ranks is trained",
    ],
)
