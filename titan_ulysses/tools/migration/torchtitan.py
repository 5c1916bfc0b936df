"""Configs of torchtitan up to 0.2.2 (torchtitan/config/job_config.py; before 0.2.0 it was
torchtitan/config_manager.py), whose sections are like ours.
"""

from __future__ import annotations

from typing import Any

from titan_ulysses.tools.migration.rules import (
    NO_TENSOR,
    REPLICATE,
    SEQUENCE,
    SHARD,
    Flat,
    Format,
    Lost,
    custom,
    lost,
    needless,
    only,
    same,
    words,
)

_DATASETS: dict[Any, Flat | str] = {
    "c4": {"data.source": "hf", "data.path": "allenai/c4", "data.subset": "en"}
    | {"data.streaming": True},
    **dict.fromkeys(("c4_test", "c4_validation"), "set data.path"),
}
_MODEL = "model.path names a folder, whose config.json says it"


def _converters(value: list[str], _: Flat) -> Flat:
    others = [one for one in value if one not in ("float8", "quantize.linear.float8")]
    if others:
        raise Lost(f"{', '.join(others)}: only float8 of linear layers")
    return {"quantize.float8": True} if value else {}


def _tokenizer(value: str, _: Flat) -> Flat:
    if value.endswith(".model"):
        raise Lost("a file of Meta's format: model.path has a tokenizer, or set model.tokenizer")
    return {"model.tokenizer": value}


def _positive(ours: str) -> Any:
    def become(value: int, _: Flat) -> Flat:
        return {ours: max(0, value)}

    return become


TORCHTITAN = Format(
    "torchtitan",
    lambda table: (
        "training" in table
        and bool({"flavor", "hf_assets_path", "name"} & {*table.get("model", {})})
    ),
    [
        same("job.dump_folder", "job.dump_folder"),
        needless("job.*", "job.name"),
        same("profiling.enable_profiling", "profiling.enable_profiling"),
        same("profiling.save_traces_folder", "profiling.save_traces_folder"),
        same("profiling.profile_freq", "profiling.profile_freq"),
        same("profiling.profiler_active", "profiling.profiler_active"),
        same("profiling.profiler_warmup", "profiling.profiler_warmup"),
        same("profiling.enable_memory_snapshot", "profiling.enable_memory_snapshot"),
        same("profiling.save_memory_snapshot_folder", "profiling.save_memory_snapshot_folder"),
        same("metrics.log_freq", "metrics.log_interval"),
        same("metrics.enable_wandb", "metrics.enable_wandb"),
        needless("metrics.*", "TensorBoard is always written, by rank 0"),
        needless("model.name", _MODEL),
        needless("model.flavor", _MODEL),
        same("model.hf_assets_path", "model.path", "it must hold the weights too"),
        custom("model.tokenizer_path", "`model.tokenizer`", _tokenizer),
        needless("model.norm_type", _MODEL),
        custom("model.converters", "`quantize.float8`", _converters),
        needless("model.print_after_conversion", "the summary names what was converted"),
        words(
            "optimizer.name",
            "`optimizer.name`",
            {"adamw": {"optimizer.name": "adamw"}, "adam": "set optimizer.weight_decay = 0"},
        ),
        same("optimizer.lr", "optimizer.lr"),
        custom(
            "optimizer.beta1",
            "`optimizer.betas`",
            lambda v, values: {"optimizer.betas": [v, values.get("optimizer.beta2", 0.95)]},
        ),
        custom(
            "optimizer.beta2",
            "`optimizer.betas`",
            lambda v, values: {"optimizer.betas": [values.get("optimizer.beta1", 0.9), v]},
        ),
        same("optimizer.eps", "optimizer.eps"),
        same("optimizer.weight_decay", "optimizer.weight_decay"),
        needless("optimizer.implementation", "fused"),
        needless("optimizer.fused", "fused"),
        lost("optimizer.early_step_in_backward", "gradients are clipped before the step"),
        same("lr_scheduler.warmup_steps", "lr_scheduler.warmup_steps"),
        words(
            "lr_scheduler.decay_type",
            "`lr_scheduler.decay_type`",
            {kind: {"lr_scheduler.decay_type": kind} for kind in ("linear", "cosine")}
            | {"sqrt": "linear or cosine"},
        ),
        same("lr_scheduler.min_lr_factor", "lr_scheduler.min_lr_ratio"),
        same("lr_scheduler.lr_min", "lr_scheduler.min_lr_ratio", "until 0.1"),
        only("lr_scheduler.decay_ratio", (1.0, 1), "the decay begins after the warmup"),
        lost("lr_scheduler.total_steps", "the decay ends with training.steps"),
        same("training.local_batch_size", "training.local_batch_size"),
        same("training.batch_size", "training.local_batch_size", "before 0.1"),
        same("training.warmup_steps", "lr_scheduler.warmup_steps", "before 0.1"),
        same("training.compile", "compile.enable", "until 0.1"),
        same("training.data_parallel_degree", SHARD, "before 0.1"),
        same("training.data_parallel_shard_degree", SHARD, "before 0.1"),
        same("training.data_parallel_replicate_degree", REPLICATE, "before 0.1"),
        only("training.data_parallel_type", ("fsdp",), "set data_parallel_replicate_degree"),
        only("training.tensor_parallel_degree", (1,), NO_TENSOR),
        needless("training.enable_loss_parallel", "of tensor parallelism"),
        same("training.global_batch_size", "training.global_batch_size"),
        same("training.seq_len", "training.seq_len"),
        same("training.max_norm", "training.max_norm"),
        same("training.steps", "training.steps"),
        same("training.seed", "training.seed"),
        same("training.deterministic", "training.deterministic"),
        words("training.dataset", "`data.source`, `data.path`", _DATASETS),
        same("training.dataset_path", "data.path"),
        same("training.enable_cpu_offload", "memory.parameter_offload"),
        only(
            "training.dtype",
            ("float32",),
            "master weights are in fp32, unless optimizer.stochastic_rounding",
        ),
        same("training.mixed_precision_param", "training.param_dtype"),
        same("training.mixed_precision_reduce", "training.reduce_dtype"),
        needless("training.gc_*", "Python's own"),
        needless("training.dataloader.*", "chosen by the cores of the machine"),
        same("parallelism.data_parallel_replicate_degree", REPLICATE),
        same("parallelism.data_parallel_shard_degree", SHARD),
        same("parallelism.context_parallel_degree", SEQUENCE, "Ulysses in place of a ring"),
        only("parallelism.tensor_parallel_degree", (1,), NO_TENSOR),
        only("parallelism.pipeline_parallel_degree", (1,), "pipelines"),
        only("parallelism.expert_parallel_degree", (1,), "expert parallelism"),
        only("parallelism.expert_tensor_parallel_degree", (1,), "expert parallelism"),
        needless("parallelism.*", "of other kinds of parallelism"),
        same("experimental.context_parallel_degree", SEQUENCE, "before 0.1"),
        only("experimental.pipeline_parallel_degree", (1,), "pipelines"),
        lost("experimental.custom_*", "code of its own"),
        needless("experimental.*", "of other kinds of parallelism"),
        same("checkpoint.enable", "checkpoint.enable"),
        same("checkpoint.enable_checkpoint", "checkpoint.enable", "until 0.1"),
        only("checkpoint.interval_type", ("steps",), "checkpoint.interval is in steps"),
        same("checkpoint.folder", "checkpoint.folder"),
        same("checkpoint.interval", "checkpoint.interval"),
        same("checkpoint.keep_latest_k", "checkpoint.keep_latest_k"),
        words(
            "checkpoint.async_mode",
            "`checkpoint.async_mode`",
            {
                "disabled": {"checkpoint.async_mode": "disabled"},
                **dict.fromkeys(
                    ("async", "async_with_pinned_mem"), {"checkpoint.async_mode": "async"}
                ),
            },
        ),
        same("checkpoint.initial_load_path", "checkpoint.initial_load_path"),
        needless("checkpoint.initial_load_model_*", "weights alone"),
        needless("checkpoint.initial_load_in_hf", "seen from the folder"),
        same("checkpoint.last_save_in_hf", "checkpoint.export"),
        needless("checkpoint.last_save_model_*", "checkpoints resume; export/ has the model"),
        needless("checkpoint.model_weights_only", "checkpoints resume; export/ has the model"),
        needless("checkpoint.export_dtype", "the export has training.param_dtype's bits or fp32"),
        only("checkpoint.load_step", (-1,), "the newest checkpoint is taken"),
        words(
            "activation_checkpoint.mode",
            "`activation_checkpoint.mode`",
            {
                "full": {"activation_checkpoint.mode": "full"},
                "none": {"activation_checkpoint.mode": "none"},
                "selective": {"activation_checkpoint.mode": "full"},
                "memory_budget": "full or none",
            },
            "selective recomputes less than full",
        ),
        needless("activation_checkpoint.*", "of selective checkpoints"),
        same("compile.enable", "compile.enable"),
        needless("compile.*", "MLPs and norms are compiled"),
        needless("quantize.linear.float8.*", "float8 of each linear layer of the blocks"),
        same("float8.enable_float8_linear", "quantize.float8", "before 0.1"),
        needless("float8.*", "float8 of each linear layer of the blocks"),
        same("comm.init_timeout_seconds", "comm.startup_timeout_s"),
        same("comm.train_timeout_seconds", "comm.timeout_s"),
        needless("comm.*", "stacks of all ranks are in stacks/ of the run"),
        same("validation.enable", "validation.enable"),
        words(
            "validation.dataset",
            "`validation.path`",
            {"c4_validation": "set validation.path or validation.split"},
        ),
        custom("validation.dataset_path", "`validation.path`", lambda v, _: {"validation.path": v}),
        same("validation.freq", "validation.interval"),
        custom("validation.steps", "`validation.steps`", _positive("validation.steps")),
        only("validation.local_batch_size", (1,), "that of training"),
        lost("validation.seq_len", "that of training"),
        same("debug.seed", "training.seed"),
        same("debug.deterministic", "training.deterministic"),
    ],
    {
        "training.local_batch_size": 8,
        "training.steps": 10000,
        "optimizer.lr": 8e-4,
        "lr_scheduler.warmup_steps": 200,
        "lr_scheduler.decay_type": "linear",
        "lr_scheduler.min_lr_factor": 0.0,
        "metrics.log_freq": 10,
        "checkpoint.enable": False,
        "checkpoint.keep_latest_k": 10,
        "checkpoint.last_save_in_hf": False,
        "validation.freq": 10,
        "validation.steps": -1,
    },
)
