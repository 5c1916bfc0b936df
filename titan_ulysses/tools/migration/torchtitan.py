"""Configs of torchtitan up to 0.2.2, whose sections are like ours. Later ones are in Python."""

from __future__ import annotations

from typing import Any

from titan_ulysses.tools.migration import key_rules as to
from titan_ulysses.tools.migration.key_rules import Flat, Lost

_C4 = {"data.source": "hf", "data.path": "allenai/c4", "data.subset": "en", "data.streaming": True}


def _converters(value: list[str], _: Flat) -> Flat:
    others = [one for one in value if one not in ("float8", "quantize.linear.float8")]
    if others:
        raise Lost(f"{', '.join(others)}: only float8 of linear layers")
    return {"quantize.float8": True} if value else {}


def _tokenizer(value: str, _: Flat) -> Flat:
    if value.endswith(".model"):
        raise Lost("a file of Meta's format: model.path has a tokenizer, or set model.tokenizer")
    return {"model.tokenizer": value}


_ANY = "any: each run has another"


def _seed(value: Any, values: Flat) -> Flat:
    if value == _ANY and values.get("training.seed") is not None:
        return {}
    if value == _ANY:
        raise Lost("training.seed is 0 unless it is set", {"training.seed": 0})
    return {"training.seed": value}


TORCHTITAN = to.Format(
    "torchtitan",
    "torchtitan/config/job_config.py of 0.2.2; before 0.2.0, torchtitan/config_manager.py",
    lambda table: (
        "training" in table
        and bool({"flavor", "hf_assets_path", "name"} & {*table.get("model", {})})
    ),
    [
        *to.same_name(
            "job.dump_folder",
            "profiling.enable_profiling save_traces_folder profile_freq profiler_active",
            "profiling.profiler_warmup enable_memory_snapshot save_memory_snapshot_folder",
            "metrics.enable_wandb",
            "optimizer.lr eps weight_decay",
            "lr_scheduler.warmup_steps",
            "training.local_batch_size global_batch_size seq_len max_norm steps seed deterministic",
            "parallelism.data_parallel_replicate_degree data_parallel_shard_degree",
            "checkpoint.enable folder interval keep_latest_k initial_load_path",
            "compile.enable",
            "validation.enable",
        ),
        to.needless("job.*", "job.name names a run"),
        to.same("metrics.log_freq", "metrics.log_interval"),
        to.needless("metrics.*", "TensorBoard is always written, by rank 0"),
        to.needless("model.name model.flavor model.norm_type", "config.json of model.path says it"),
        to.same("model.hf_assets_path", "model.path", "it must hold the weights too"),
        to.computed("model.tokenizer_path", "model.tokenizer", _tokenizer),
        to.computed("model.converters", "quantize.float8", _converters),
        to.needless("model.print_after_conversion", "the summary names what was converted"),
        to.choice(
            "optimizer.name",
            "optimizer.name",
            {"adamw": "adamw"},
            {"adam": "set optimizer.weight_decay = 0"},
        ),
        to.betas("optimizer.beta1", "optimizer.beta2", defaults=(0.9, 0.95)),
        to.needless("optimizer.implementation optimizer.fused", "AdamW is fused"),
        to.lost("optimizer.early_step_in_backward", "gradients are clipped before the step"),
        to.choice(
            "lr_scheduler.decay_type",
            "lr_scheduler.decay_type",
            {"linear": "linear", "cosine": "cosine", "sqrt": "sqrt"},
        ),
        to.same("lr_scheduler.min_lr_factor", "lr_scheduler.min_lr_ratio"),
        to.same("lr_scheduler.lr_min", "lr_scheduler.min_lr_ratio", "until 0.1"),
        to.same("lr_scheduler.decay_ratio", "lr_scheduler.decay_ratio"),
        to.lost("lr_scheduler.total_steps", "the decay ends with training.steps"),
        to.same("training.batch_size", "training.local_batch_size", "before 0.1"),
        to.same("training.warmup_steps", "lr_scheduler.warmup_steps", "before 0.1"),
        to.same("training.compile", "compile.enable", "until 0.1"),
        to.same(
            "training.data_parallel_degree training.data_parallel_shard_degree",
            to.SHARD,
            "before 0.1",
        ),
        to.same("training.data_parallel_replicate_degree", to.REPLICATE, "before 0.1"),
        to.only("training.data_parallel_type", ("fsdp",), "set data_parallel_replicate_degree"),
        to.only(
            "training.tensor_parallel_degree parallelism.tensor_parallel_degree", (1,), to.NO_TENSOR
        ),
        to.needless("training.enable_loss_parallel", "it belongs to tensor parallelism"),
        to.choice("training.dataset", "", {"c4": _C4}, {"c4_test c4_validation": "set data.path"}),
        to.same("training.dataset_path", "data.path"),
        to.same("training.enable_cpu_offload", "memory.parameter_offload"),
        to.only("training.dtype", ("float32",), "set optimizer.stochastic_rounding"),
        to.same("training.mixed_precision_param", "training.param_dtype"),
        to.same("training.mixed_precision_reduce", "training.reduce_dtype"),
        to.needless("training.gc_*", "Python decides when to collect garbage"),
        to.needless("training.dataloader.*", "chosen by the cores of the machine"),
        to.same("parallelism.context_parallel_degree", to.SEQUENCE, "Ulysses in place of a ring"),
        to.only(
            "parallelism.pipeline_parallel_degree experimental.pipeline_parallel_degree",
            (1,),
            "no pipeline parallelism",
        ),
        to.only(
            "parallelism.expert_parallel_degree parallelism.expert_tensor_parallel_degree",
            (1,),
            "no expert parallelism",
        ),
        to.same("experimental.context_parallel_degree", to.SEQUENCE, "before 0.1"),
        to.lost("experimental.custom_*", "its code is not run"),
        to.needless("parallelism.* experimental.*", "it belongs to other kinds of parallelism"),
        to.same("checkpoint.enable_checkpoint", "checkpoint.enable", "until 0.1"),
        to.only("checkpoint.interval_type", ("steps",), "checkpoint.interval is in steps"),
        to.choice(
            "checkpoint.async_mode",
            "checkpoint.async_mode",
            {"disabled": "disabled", "async async_with_pinned_mem": "async"},
        ),
        to.needless("checkpoint.initial_load_model_*", "weights alone are loaded"),
        to.needless("checkpoint.initial_load_in_hf", "seen from the folder"),
        to.same("checkpoint.last_save_in_hf", "checkpoint.export"),
        to.needless(
            "checkpoint.last_save_model_* checkpoint.model_weights_only",
            "checkpoints resume; export/ has the model",
        ),
        to.needless("checkpoint.export_dtype", "the export is in training.param_dtype or fp32"),
        to.only("checkpoint.load_step", (-1,), "the newest checkpoint is taken"),
        to.choice(
            "activation_checkpoint.mode",
            "activation_checkpoint.mode",
            {"full": "full", "none": "none", "selective": "full"},
            {"memory_budget": "full or none"},
            "selective recomputes less than full",
        ),
        to.needless("activation_checkpoint.*", "it belongs to selective checkpoints"),
        to.needless("compile.*", "MLPs and norms are compiled"),
        to.same("float8.enable_float8_linear", "quantize.float8", "before 0.1"),
        to.needless("quantize.linear.float8.* float8.*", "float8 of linear layers"),
        to.same("comm.init_timeout_seconds", "comm.startup_timeout_s"),
        to.same("comm.train_timeout_seconds", "comm.timeout_s"),
        to.needless("comm.*", "stacks of all ranks are in stacks/ of the run"),
        to.choice("validation.dataset", "", {}, {"c4_validation": "set validation.path"}),
        to.same("validation.dataset_path", "validation.path"),
        to.same("validation.freq", "validation.interval"),
        to.computed(
            "validation.steps", "validation.steps", lambda n, _: {"validation.steps": max(0, n)}
        ),
        to.only("validation.local_batch_size", (1,), "it is that of training"),
        to.lost("validation.seq_len", "it is that of training"),
        to.computed("debug.seed", "training.seed", _seed),
        to.computed(
            "(documents)",
            "`data.packing`, `data.long_documents`, `data.train_on`",
            lambda *_: {
                "data.packing": "concat",
                "data.long_documents": "split",
                "data.train_on": "all",
            },
        ),
        to.same("debug.deterministic", "training.deterministic"),
    ],
    {
        "training.local_batch_size": 8,
        "training.steps": 10000,
        "training.seq_len": 2048,
        "training.max_norm": 1.0,
        "training.mixed_precision_param": "bfloat16",
        "training.dataset": "c4_test",
        "debug.seed": _ANY,
        "(documents)": "end to end",
        "optimizer.name": "AdamW",
        "optimizer.beta2": 0.95,
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.1,
        "optimizer.lr": 8e-4,
        "lr_scheduler.warmup_steps": 200,
        "lr_scheduler.decay_type": "linear",
        "lr_scheduler.min_lr_factor": 0.0,
        "metrics.log_freq": 10,
        "checkpoint.enable": False,
        "checkpoint.interval": 500,
        "validation.enable": False,
        "checkpoint.keep_latest_k": 10,
        "checkpoint.last_save_in_hf": False,
        "validation.freq": 10,
        "validation.steps": -1,
    },
    differs=["documents of a sequence see each other there, unless the flavor has a block mask"],
)
