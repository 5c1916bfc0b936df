"""Files of `accelerate config`, with ParallelismConfig. Optimizer, schedule and data are those of
the script that it launches, and not in it.
"""

from __future__ import annotations

from titan_ulysses.tools.migration import key_rules as to
from titan_ulysses.tools.migration.key_rules import Flat, Lost
from titan_ulysses.tools.migration.training_arguments import fsdp_config

_P = "parallelism_config.parallelism_config_"


def _sequence(value: int, values: Flat) -> Flat:
    sizes = [int(values.get(f"{_P}{name}") or 1) for name in ("cp_size", "sp_size")]
    if min(sizes) > 1:
        raise Lost("cp_size and sp_size together: there is one sequence-parallel degree")
    return {to.SEQUENCE: value} if value > 1 else {}


def _nodes(value: int, values: Flat) -> Flat:
    ranks = int(values.get("num_processes") or 0)
    return {"plan.gpus_per_node": ranks // value} if value > 1 and ranks % value == 0 else {}


_KNOWN_KEYS = {"distributed_type", "compute_environment", "parallelism_config"}
ACCELERATE = to.Format(
    "accelerate",
    "src/accelerate/commands/config/ of accelerate 1.15",
    lambda table: bool(_KNOWN_KEYS & {*table}),
    [
        to.same("num_processes", "plan.world_size", "torchrun starts them"),
        to.computed("num_machines", "plan.gpus_per_node", _nodes),
        to.dtype("mixed_precision", fp8={"quantize.float8": True}),
        to.same(f"{_P}dp_replicate_size", to.REPLICATE),
        to.same(f"{_P}dp_shard_size", to.SHARD),
        to.computed(f"{_P}sp_size", to.SEQUENCE, _sequence),
        to.computed(f"{_P}cp_size", to.SEQUENCE, _sequence, "Ulysses in place of a ring"),
        to.only(f"{_P}tp_size", (1,), to.NO_TENSOR),
        to.same(f"{_P}sp_seq_length", "training.seq_len"),
        to.attention(f"{_P}sp_attn_implementation"),
        to.needless(f"{_P}*", "one kind of sequence parallelism, with sequences of one length"),
        to.choice(
            "fsdp_config.fsdp_sharding_strategy",
            "",
            {"full_shard 1": None, 1: None},
            {"hybrid_shard no_shard shard_grad_op": f"set {to.REPLICATE}"},
        ),
        *fsdp_config(),
        *to.zero_offload(
            "deepspeed_config.offload_optimizer_device", "deepspeed_config.offload_param_device"
        ),
        to.same("deepspeed_config.gradient_clipping", "training.max_norm"),
        to.only(
            "deepspeed_config.gradient_accumulation_steps",
            (1, "auto"),
            "set training.global_batch_size",
        ),
        to.lost("deepspeed_config.deepspeed_config_file", "no such file beside the recipe"),
        *to.deepspeed("deepspeed_config.file"),
        to.needless("deepspeed_config.*", "FSDP2 shards what ZeRO stage 3 does"),
        to.choice(
            "dynamo_config.dynamo_backend",
            "compile.enable",
            {"inductor": True, "no": None, "": None, False: None},
        ),
        to.needless("dynamo_config.*", "compile.enable compiles MLPs and norms"),
        to.only(
            "distributed_type",
            ("FSDP", "DEEPSPEED", "MULTI_GPU", "MULTI_CPU", "NO"),
            "not FSDP2 over NCCL or gloo",
        ),
        to.needless(
            "machine_rank main_process_ip main_process_port rdzv_backend enable_cpu_affinity",
            "an option of torchrun",
        ),
        to.needless("same_network", "see [comm]"),
        to.needless("compute_environment", "see docs/many-nodes.md"),
        to.needless("gpu_ids", "set CUDA_VISIBLE_DEVICES"),
        to.needless("main_training_function", "it is train.py"),
        to.needless("downcast_bf16 tpu_*", "only TPUs need it"),
        to.needless("debug", "a rank that hangs is named always: docs/trust.md"),
        to.needless("use_cpu", "the CPU is taken where there is no GPU"),
    ],
    includes={"deepspeed_config.deepspeed_config_file": "deepspeed_config.file"},
)
