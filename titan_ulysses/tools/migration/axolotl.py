"""Recipes of axolotl, with the arguments that it makes of them for transformers' trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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


def _datasets(value: Any, values: Flat) -> Flat:
    entries = value if isinstance(value, list) else [value]
    return to.sources([_dataset(entry, values) for entry in entries])


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
        raise Lost(f"{', '.join(others)}: its code is not run")
    return {}


def _streams(values: Flat) -> bool:
    return bool(values.get("pretraining_dataset") or values.get("streaming"))


def _packing(value: bool, values: Flat) -> Flat:
    return to.packing(value, streams=_streams(values))


def _long(value: str, values: Flat) -> Flat:
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


def _of_epoch(section: str, value: float, values: Flat) -> Flat:
    """Return the interval of so many validations or checkpoints an epoch."""
    if not value or (section == "validation" and not _is_validated(values)):
        return {}
    share = "epoch" if value == 1 else f"{1 / value:.6g} epoch"
    return {f"{section}.enable": True, f"{section}.interval": share}


def _is_validated(values: Flat) -> bool:
    return bool(values.get("val_set_size") or values.get("test_datasets"))


def _evaluates(_: Any, values: Flat) -> Flat:
    """Without held-out data there are no validations, and without an interval none either."""
    if not _is_validated(values):
        return {"validation.enable": False}
    found: Flat = {"validation.enable": bool(values.get("evals_per_epoch"))}
    if values.get("eval_steps"):
        found = hf.every("validation", values["eval_steps"])
    elif values.get("eval_strategy") == "epoch":
        found = {"validation.enable": True, "validation.interval": "epoch"}
    return found


def _held_out(share: float, values: Flat) -> Flat:
    if share:
        raise Lost(to.SHARE_HELD_OUT, _evaluates(None, values))
    return _evaluates(None, values)


def _saves(value: Any, values: Flat) -> Flat:
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


def _schedule(name: str, values: Flat) -> Flat:
    found = hf.schedule(name, values)
    least = {"lr_scheduler.min_lr_ratio": float(values["cosine_min_lr_ratio"])}
    return found | least if name == "cosine" else found


_AT_MOST = "0.03, at most 100 steps"


def _warmup(value: float, values: Flat) -> Flat:
    if 0 < value < 1:
        return _warmup_ratio(value, values)
    return {"lr_scheduler.warmup_steps": 2 if value == 1 else int(value)}


def _warmup_ratio(share: float | str, values: Flat) -> Flat:
    if share == _AT_MOST and values.get("warmup_steps") is not None:
        return {}
    if not values.get("max_steps"):
        if share == _AT_MOST:
            raise Lost("its share is of at most 100 steps", {"lr_scheduler.warmup_ratio": 0.03})
        return {"lr_scheduler.warmup_ratio": float(share)}
    found = to.warmup(0.03 if share == _AT_MOST else float(share), values.get("max_steps") or 0)
    steps = found["lr_scheduler.warmup_steps"]
    if share == _AT_MOST:
        steps = min(steps, 100)
    return {"lr_scheduler.warmup_steps": 2 if steps == 1 else steps}  # it makes 2 of 1


def _rl(value: str, values: Flat) -> Flat:
    if value and value not in PREFERENCES:
        raise Lost(to.OTHER_LOSSES)
    found: Flat = {"loss.name": value} if value else {}
    if value:
        betas = (values.get(key) for key in ("rl_beta", "trl.beta", "orpo_alpha"))
        found["loss.beta"] = next((one for one in betas if one is not None), 0.1)  # TRL's
    if value == "simpo" and values.get("cpo_alpha") != 0:
        raise Lost(to.CPO_ALPHA, found)
    return found


def _of_loss(ours: str, *losses: str) -> Callable[[Any, Flat], Flat]:
    """Return the rule of a key that some of the losses read."""

    def become(value: Any, values: Flat) -> Flat:
        if values.get("rl") not in losses:
            raise Lost(to.OTHER_LOSSES)
        return {ours: value}

    return become


def _has_adapters(values: Flat) -> bool:
    return bool(values.get("adapter"))


_FULL = {"activation_checkpoint.mode": "full"}
_RING = "Ulysses in place of a ring"
AXOLOTL = to.Format(
    "axolotl",
    "src/axolotl/utils/schemas/ and core/builders/base.py of 0.18.0 (067b021, July 2026)",
    lambda table: "base_model" in table,
    [
        to.same("base_model", "model.path"),
        to.same("tokenizer_config", "model.tokenizer"),
        to.needless("model_type", "config.json says it"),
        to.needless("tokenizer_type", "tokenizer_config.json says it"),
        to.lost("trust_remote_code", "code of a model folder is never run"),
        to.same("sequence_len", "training.seq_len"),
        to.computed(
            "sample_packing",
            '`true`: `data.packing = "best_fit"`, or `"concat"` where data is streamed',
            _packing,
        ),
        to.computed("datasets", "`data.source` and others, or `data.mixture`", _datasets),
        to.computed("pretraining_dataset", "`data.streaming = true` and the same", _pretraining),
        to.computed("val_set_size", "validation.enable", _held_out, to.SHARE_HELD_OUT),
        to.computed("eval_steps eval_strategy", "validation.interval", _evaluates),
        to.lost("test_datasets", "name the file in validation.path"),
        to.choice("train_on_inputs", "data.train_on", {True: "all", False: "assistant"}),
        to.lost("min_sample_len", "filter the data in advance"),
        to.computed(
            "excess_length_strategy",
            '`drop`: `data.long_documents = "drop"`, of chats; texts are split',
            _long,
        ),
        to.computed("rl", "`loss.name`, with datasets of type chat_template.default", _rl),
        to.computed("rl_beta trl.beta", "loss.beta", _of_loss("loss.beta", *PREFERENCES)),
        to.computed("orpo_alpha", "`loss.beta`, of orpo", _of_loss("loss.beta", "orpo")),
        to.computed("simpo_gamma", "loss.simpo_gamma", _of_loss("loss.simpo_gamma", "simpo")),
        to.needless("cpo_alpha", "see rl"),
        to.computed(
            "dpo_label_smoothing",
            "loss.label_smoothing",
            _of_loss("loss.label_smoothing", "dpo", "simpo"),
        ),
        *(
            to.computed(f"kto_{kind}_weight", ours, _of_loss(ours, "kto"))
            for kind in ("desirable", "undesirable")
            for ours in [f"loss.{kind}_weight"]
        ),
        to.same("micro_batch_size", "training.local_batch_size"),
        to.accumulation(
            batch="micro_batch_size", sequence=["context_parallel_size", "sequence_parallel_degree"]
        ),
        to.computed("num_epochs", "`training.epochs`, without max_steps", hf.epochs),
        to.computed("lr_scheduler", "`lr_scheduler.*`, with lr_scheduler_kwargs", _schedule),
        to.of_warmup(
            "warmup_steps",
            "lr_scheduler",
            "`lr_scheduler.warmup_steps`; a share: of max_steps",
            _warmup,
        ),
        to.of_warmup(
            "warmup_ratio",
            "lr_scheduler",
            "`lr_scheduler.warmup_ratio`; `lr_scheduler.warmup_steps`, of max_steps",
            _warmup_ratio,
        ),
        to.needless("cosine_min_lr_ratio", "it is lr_scheduler.min_lr_ratio of cosine"),
        to.lost("cosine_constant_lr_ratio", "the decay ends with the run"),
        to.choice("optimizer", "optimizer.name", hf.ADAMW),
        to.choice(
            "bf16",
            "training.param_dtype",
            {True: "bfloat16", "auto full": "bfloat16", False: "float32"},
        ),
        to.switch("fp8", "quantize.float8"),
        to.choice(
            "gradient_checkpointing",
            "activation_checkpoint.mode",
            {
                True: "full",
                False: "none",
                "offload": _FULL | {"activation_checkpoint.offload": "host"},
                "offload_disk": _FULL | {"activation_checkpoint.offload": "disk"},
            },
        ),
        to.choice(
            "activation_offloading",
            "activation_checkpoint.offload",
            {True: "host", "legacy hidden_states": "host", "disk": "disk", False: None},
        ),
        to.needless("tiled_mlp*", "MLPs are tiled by default (memory.mlp_tile_tokens)"),
        to.needless("chunked_cross_entropy* flash_attn_cross_entropy liger_*", "the loss is tiled"),
        to.attention("attn_implementation"),
        to.needless("flash_attention", to.FLASH),
        to.switch("sdp_attention", "model.attention", "sdpa"),
        to.switch("flex_attention", "model.attention", "flex"),
        to.same("context_parallel_size sequence_parallel_degree", to.SEQUENCE, _RING),
        to.needless("ring_attn_func heads_k_stride", _RING),
        to.same("dp_shard_size", to.SHARD),
        to.same("dp_replicate_size", to.REPLICATE),
        to.only("tensor_parallel_size", (1,), to.NO_TENSOR),
        to.choice("torch_compile", "compile.enable", {True: True, False: None, "auto": None}),
        to.choice("adapter", "lora.quantize_base", {"lora": None, "qlora": "nf4", "": None}),
        *to.adapters("lora_r", "lora_target_modules", _has_adapters, prefix="peft_"),
        to.in_list("lora_target_parameters", "lora.target_parameters"),
        to.needless("lora_mlp_kernel lora_qkv_kernel lora_o_kernel", "axolotl's own kernels"),
        to.switch("lora_target_linear", "lora.target_modules", []),
        to.switch("load_in_4bit", "lora.quantize_base", "nf4"),
        to.lost("load_in_8bit", "no weights in 8 bits"),
        to.lost("unfrozen_parameters", "name what is frozen in model.freeze"),
        to.same("overrides_of_model_config.rope_scaling", "model.rope_scaling"),
        to.same("dataset_prepared_path", "data.cache_folder"),
        to.computed("save_strategy save_steps", "checkpoint.interval", _saves),
        to.computed("saves_per_epoch", "checkpoint.interval", partial(_of_epoch, "checkpoint")),
        to.computed("evals_per_epoch", "validation.interval", partial(_of_epoch, "validation")),
        to.computed(
            "wandb_project",
            "`metrics.enable_wandb`, and WANDB_PROJECT in the environment",
            lambda name, _: {"metrics.enable_wandb": True} if name else {},
        ),
        to.needless("wandb_*", "set WANDB_PROJECT and others in the environment"),
        to.lost("special_tokens*", "add them to the tokenizer (docs/fine-tuning.md)"),
        to.only("chat_template", ("tokenizer_default",), "put it into the folder of the tokenizer"),
        to.computed("plugins", "liger and cut cross entropy are not needed", _plugins),
        to.needless("auto_resume_from_checkpoints", "the same command resumes"),
        to.needless("pad_to_sequence_len", "sequences have one length"),
        to.needless("eval_sample_packing eval_batch_size", "held-out data is read as [data] says"),
        to.lost("eot_tokens", "the chat template marks what is trained"),
        to.lost("loss_watchdog_*", "training.skip_nonfinite, and loss_spike in the metrics"),
        to.needless("fsdp_version fsdp_final_state_dict_type", "FSDP2 is always used"),
        to.needless("strict", "each key is checked"),
        to.needless("shuffle_merged_datasets streaming_multipack_buffer_size", "data is shuffled"),
        to.only("pretrain_multipack_attn", (True,), "documents never see each other"),
        *hf.rules(
            sequence=["context_parallel_size", "sequence_parallel_degree"],
            has_adapters=_has_adapters,
        ),
    ],
    {
        "sequence_len": 512,
        "sample_packing": False,
        "excess_length_strategy": "drop",
        "train_on_inputs": False,
        "micro_batch_size": 1,
        "num_epochs": 1,
        "lr_scheduler": "cosine",
        "cosine_min_lr_ratio": 0.0,
        "warmup_ratio": _AT_MOST,
        "optimizer": "adamw_torch_fused",
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": "auto",
        "seed": 42,
        "save_strategy": "epoch",
        "save_total_limit": 4,
        "val_set_size": 0.0,
        "(final-model)": "saved",
        "lora_dropout": 0.0,
    },
    includes={"deepspeed": "deepspeed"},
    differs=[
        to.ONE_STEP_LATER,
        "each rank takes the mean over its own labels there, and the mean over ranks is trained",
        to.BF16_WEIGHTS,
    ],
)
