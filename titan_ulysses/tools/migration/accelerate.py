"""Files of `accelerate config`, with ParallelismConfig: accelerate 1.15."""

from __future__ import annotations

from typing import Any

from titan_ulysses.tools.migration.rules import (
    ATTENTION,
    DTYPE,
    FLASH,
    NO_TENSOR,
    REPLICATE,
    SEQUENCE,
    SHARD,
    Flat,
    Format,
    Lost,
    custom,
    deepspeed,
    lost,
    needless,
    only,
    same,
    words,
)

_P = "parallelism_config.parallelism_config_"


def _accelerate_sequence(value: int, values: Flat) -> Flat:
    sizes = [int(values.get(f"{_P}{name}") or 1) for name in ("cp_size", "sp_size")]
    if min(sizes) > 1:
        raise Lost("cp_size and sp_size together: one sequence-parallel degree")
    return {SEQUENCE: value} if value > 1 else {}


def _accelerate_nodes(value: int, values: Flat) -> Flat:
    ranks = int(values.get("num_processes") or 0)
    return {"plan.gpus_per_node": ranks // value} if value > 1 and ranks % value == 0 else {}


_COMPILE: dict[Any, Flat | str] = {
    "inductor": {"compile.enable": True},
    **dict.fromkeys(("", "no", False), {}),
}
ACCELERATE = Format(
    "accelerate",
    lambda table: bool(
        {"distributed_type", "compute_environment", "parallelism_config"} & {*table}
    ),
    [
        same("num_processes", "plan.world_size", "torchrun starts them"),
        custom("num_machines", "`plan.gpus_per_node`", _accelerate_nodes),
        words(
            "mixed_precision",
            "`training.param_dtype`; `fp8`: `quantize.float8 = true`",
            {**DTYPE, "fp8": {"quantize.float8": True}},
        ),
        same(f"{_P}dp_replicate_size", REPLICATE),
        same(f"{_P}dp_shard_size", SHARD),
        custom(f"{_P}sp_size", f"`{SEQUENCE}`", _accelerate_sequence),
        custom(f"{_P}cp_size", f"`{SEQUENCE}`", _accelerate_sequence, "Ulysses in place of a ring"),
        only(f"{_P}tp_size", (1,), NO_TENSOR),
        same(f"{_P}sp_seq_length", "training.seq_len"),
        words(f"{_P}sp_attn_implementation", "`model.attention`", ATTENTION, FLASH),
        needless(f"{_P}*", "one kind of sequence parallelism, with sequences of one length"),
        words(
            "fsdp_config.fsdp_activation_checkpointing",
            "`activation_checkpoint.mode`",
            {
                True: {"activation_checkpoint.mode": "full"},
                False: {"activation_checkpoint.mode": "none"},
            },
        ),
        same("fsdp_config.fsdp_offload_params", "memory.parameter_offload"),
        words(
            "fsdp_config.fsdp_sharding_strategy",
            "`FULL_SHARD`",
            {
                "full_shard": {},
                "1": {},
                1: {},
                **dict.fromkeys(
                    ("hybrid_shard", "no_shard", "shard_grad_op"),
                    "set parallelism.data_parallel_replicate_degree",
                ),
            },
        ),
        needless("fsdp_config.*", "FSDP2 of each block, whose checkpoints are sharded"),
        words(
            "deepspeed_config.offload_optimizer_device",
            "`cpu`: `memory.optimizer_offload = true`",
            {
                "cpu": {"memory.optimizer_offload": True},
                "nvme": "optimizer state on a disk",
                "none": {},
            },
        ),
        words(
            "deepspeed_config.offload_param_device",
            "`cpu`: `memory.parameter_offload = true`",
            {"cpu": {"memory.parameter_offload": True}, "nvme": "parameters on a disk", "none": {}},
        ),
        same("deepspeed_config.gradient_clipping", "training.max_norm"),
        only(
            "deepspeed_config.gradient_accumulation_steps",
            (1, "auto"),
            "set training.global_batch_size",
        ),
        lost("deepspeed_config.deepspeed_config_file", "there is no such file beside the recipe"),
        *deepspeed("deepspeed_config.file"),
        needless("deepspeed_config.*", "FSDP2 shards what ZeRO stage 3 does"),
        words("dynamo_config.dynamo_backend", "`compile.enable`", _COMPILE),
        needless("dynamo_config.*", "torch.compile of MLPs and norms"),
        only(
            "distributed_type",
            ("FSDP", "DEEPSPEED", "MULTI_GPU", "MULTI_CPU", "NO"),
            "not FSDP2 over NCCL or gloo",
        ),
        needless("machine_rank", "an option of torchrun"),
        needless("main_process_ip", "an option of torchrun"),
        needless("main_process_port", "an option of torchrun"),
        needless("rdzv_backend", "an option of torchrun"),
        needless("same_network", "comm"),
        needless("compute_environment", "torchrun, SLURM and Kubernetes: docs/many-nodes.md"),
        needless("gpu_ids", "CUDA_VISIBLE_DEVICES"),
        needless("main_training_function", "train.py"),
        needless("downcast_bf16", "of TPUs"),
        needless("debug", "a rank that hangs is named: docs/trust.md"),
        needless("tpu_*", "of TPUs"),
        needless("enable_cpu_affinity", "an option of torchrun"),
        needless("use_cpu", "the CPU is taken where there is no GPU"),
    ],
    {},
    {"deepspeed_config.deepspeed_config_file": "deepspeed_config.file"},
)
