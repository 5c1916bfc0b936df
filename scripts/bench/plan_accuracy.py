"""Compare the planner with real ranks: peak of live tensor bytes, resident memory, bytes and counts
of collectives.

    python scripts/bench/plan_accuracy.py                 all configurations
    python scripts/bench/plan_accuracy.py --only tied     those whose name contains "tied"
    python scripts/bench/plan_accuracy.py --small         only the small ones

The reference is what the allocator reports to torch's profiler in a real run on gloo ranks, which
does not depend on the planner. Where more than 2 GiB are alive, the resident set is compared too,
under an allocator that returns freed memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

from common import ALLOCATOR, LLAMA, launch, parser_of, peak_memory, run

SMALL_LLAMA = LLAMA | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 352}
# Latent attention: values have another head size than queries and keys.
LATENT = {
    "model_type": "youtu",
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_key_value_heads": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Case:
    """A configuration of the comparison."""

    name: str
    ranks: int
    model: dict[str, Any]
    settings: dict[str, Any]
    documents: list[int] | None = None
    """lengths of the documents of a row; None: one document per row"""
    resident: bool = False
    """whether the resident set is compared too, because more than 2 GiB are alive"""


def case(
    name: str, ranks: int, settings: str, *, documents=None, resident=False, model=None
) -> Case:
    """Build a case. settings: overrides as on the command line, without dashes."""
    table: dict[str, Any] = {"training": {"param_dtype": "float32"}}
    for setting in settings.split():
        key, _, value = setting.partition("=")
        section, _, field = key.partition(".")
        is_name = value.isidentifier() and value not in ("true", "false")
        table.setdefault(section, {})[field] = value if is_name else json.loads(value)
    return Case(name, ranks, SMALL_LLAMA | (model or {}), table, documents, resident)


SMALL = [
    case(
        "small, one rank",
        1,
        "training.seq_len=4096 memory.mlp_tile_tokens=512 memory.loss_tile_tokens=100",
    ),
    case(
        "small, P 2, bf16, offload, tied",
        2,
        "training.seq_len=4096 training.param_dtype=bfloat16 "
        "parallelism.sequence_parallel_degree=2 activation_checkpoint.every=2 "
        "activation_checkpoint.offload=host memory.mlp_tile_tokens=300",
        model={"tie_word_embeddings": True},
    ),
    case(
        "small, P 2, packed, two batches, no checkpoints",
        2,
        "training.seq_len=2048 training.global_batch_size=3 "
        "parallelism.sequence_parallel_degree=2 activation_checkpoint.mode=none",
        documents=[1000, 24, 1024],
    ),
    case(
        "small, P 2, bf16, LoRA",
        2,
        "training.seq_len=4096 training.param_dtype=bfloat16 "
        "parallelism.sequence_parallel_degree=2 memory.mlp_tile_tokens=300 "
        "memory.loss_tile_tokens=100 lora.rank=4",
    ),
    case(
        "small, P 2, latent attention",
        2,
        "training.seq_len=2048 parallelism.sequence_parallel_degree=2",
        model=LATENT,
    ),
    case(
        "small, P 2, streamed",
        2,
        "training.seq_len=5120 parallelism.sequence_parallel_degree=2 "
        "activation_checkpoint.every=2 memory.stream_chunk_tokens=1024 "
        "memory.mlp_tile_tokens=300 memory.loss_tile_tokens=100",
    ),
    case(
        "small, P 2, bf16, QLoRA",
        2,
        "training.seq_len=512 training.param_dtype=bfloat16 "
        "parallelism.sequence_parallel_degree=2 lora.rank=4 lora.quantize_base=nf4",
        model={"hidden_size": 256, "intermediate_size": 512},
    ),
]

BIG = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2}
QWEN3 = {"model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 3}
GEMMA2 = {
    "model_type": "gemma2",
    "head_dim": 16,
    "sliding_window": 256,
    "attn_logit_softcapping": 50.0,
}
OLMO2 = {"model_type": "olmo2", "num_hidden_layers": 5}
WIDE_VOCABULARY = {"vocab_size": 32768, "num_hidden_layers": 2}
DEEP = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 8192}

ATTENTION = {"intermediate_size": 64, "head_dim": 64, "num_hidden_layers": 2}
THREE_HEADS = {"num_attention_heads": 3, "hidden_size": 96, "num_key_value_heads": 1}

CASES = [
    case(
        "attention, P 4, bf16",
        4,
        "training.seq_len=16384 training.param_dtype=bfloat16 "
        "parallelism.sequence_parallel_degree=4 memory.mlp_tile_tokens=256",
        model=ATTENTION,
    ),
    case(
        "attention, P 2, every 2",
        2,
        "training.seq_len=8192 parallelism.sequence_parallel_degree=2 "
        "activation_checkpoint.every=2 memory.mlp_tile_tokens=256",
        model=QWEN3 | ATTENTION,
    ),
    case(
        "MLP, untiled, dp 2",
        2,
        "training.seq_len=4096 memory.mlp_tile_tokens=-1",
        model={"intermediate_size": 1024},
    ),
    case(
        "loss, untiled, dp 2",
        2,
        "training.seq_len=4096 memory.loss_tile_tokens=-1",
        model=WIDE_VOCABULARY,
    ),
    case(
        "loss, tiled, P 2, bf16",
        2,
        "training.seq_len=2048 training.param_dtype=bfloat16 "
        "parallelism.sequence_parallel_degree=2 memory.loss_tile_tokens=512",
        model=WIDE_VOCABULARY | {"tie_word_embeddings": True},
    ),
    case("optimizer, deep, short", 1, "training.seq_len=128", model=DEEP),
    case("optimizer, 4 bits", 1, "training.seq_len=64 optimizer.name=adamw4bit", model=DEEP),
    case(
        "optimizer, rounding, P 2",
        2,
        "training.seq_len=128 training.param_dtype=bfloat16 optimizer.stochastic_rounding=true "
        "parallelism.sequence_parallel_degree=2",
        model=DEEP,
    ),
    case(
        "optimizer, 8 bits, P 2",
        2,
        "training.seq_len=128 optimizer.name=adamw8bit parallelism.sequence_parallel_degree=2",
        model=DEEP,
    ),
    case(
        "olmo2, dp 2 x P 2, every 3",
        4,
        "training.seq_len=4096 parallelism.sequence_parallel_degree=2 "
        "activation_checkpoint.every=3 memory.mlp_tile_tokens=512",
        model=OLMO2,
    ),
    case(
        "HSDP 2 x P 2, offload",
        4,
        "training.seq_len=4096 training.param_dtype=bfloat16 "
        "parallelism.data_parallel_replicate_degree=2 parallelism.sequence_parallel_degree=2 "
        "activation_checkpoint.offload=host",
    ),
    case(
        "gemma2, packed, two rows",
        1,
        "training.seq_len=1024 training.local_batch_size=2",
        model=GEMMA2,
        documents=[100, 924],
    ),
    case(
        "3 heads on 2 ranks, tiles",
        2,
        "training.seq_len=6000 parallelism.sequence_parallel_degree=2 memory.mlp_tile_tokens=700",
        model=ATTENTION | THREE_HEADS,
    ),
    # Short rows, so that memory becomes large while attention takes little time.
    case(
        "resident, tiles",
        1,
        "training.seq_len=512 training.local_batch_size=192 memory.mlp_tile_tokens=2048",
        model=BIG,
        resident=True,
    ),
    case(
        "resident, MLP untiled",
        1,
        "training.seq_len=512 training.local_batch_size=72 memory.mlp_tile_tokens=-1",
        model=BIG,
        resident=True,
    ),
    case(
        "resident, loss untiled",
        1,
        "training.seq_len=512 training.local_batch_size=12 memory.loss_tile_tokens=-1",
        model=BIG | {"vocab_size": 32768},
        resident=True,
    ),
    case(
        "resident, deep",
        1,
        "training.seq_len=64",
        model=BIG | DEEP | {"hidden_size": 1152},
        resident=True,
    ),
    case(
        "resident, P 2, offload",
        2,
        "training.seq_len=1024 training.local_batch_size=136 "
        "parallelism.sequence_parallel_degree=2 activation_checkpoint.offload=host",
        model=BIG,
        resident=True,
    ),
]

# --- what is planned ------------------------------------------------------------------------------


def spec_of(case: Case) -> Any:
    from titan_ulysses.config.schema import Config
    from titan_ulysses.setup.resolve import resolve

    table = {"model": {"config": case.model, "tokenizer": "bytes"}} | case.settings
    return resolve(Config.model_validate(table), world_size=case.ranks, device_type="cpu")


def documents_of(case: Case, config: Any) -> tuple[tuple[int, ...], ...]:
    row = tuple(case.documents or [config.training.seq_len])
    return (row,) * config.training.local_batch_size


def planned(case: Case) -> dict:
    """Return what the planner says about rank 0."""
    from titan_ulysses.plan.simulate import simulate

    spec = spec_of(case)
    simulation = simulate(spec, cuda=None, documents=documents_of(case, spec.config))
    peak = simulation.memory.peak("device", "host", first=simulation.start)
    return {
        "peak": peak.bytes,
        "where": peak.moment.owner.component,
        "phase": peak.moment.phase,
        "collectives": {kind: list(count) for kind, count in simulation.collectives.items()},
        "components": peak.components,
    }


# --- what is true ---------------------------------------------------------------------------------


def train(case: Case, *, steps: int, before: Any = None) -> Any:
    """Train on this rank with random tokens, and call before(step) before each step. Returns the
    collectives of the last step.
    """
    import torch

    from titan_ulysses.data.loader import Batch
    from titan_ulysses.distributed.collectives import CollectiveCounter
    from titan_ulysses.distributed.mesh import build_mesh
    from titan_ulysses.distributed.sequence import chunk_length
    from titan_ulysses.model import hf
    from titan_ulysses.model.lora import initialize_adapters
    from titan_ulysses.optim.optimizer import build_optimizer
    from titan_ulysses.setup.build import build_model
    from titan_ulysses.train.step import train_step

    spec = spec_of(case)
    config, degrees = spec.config, spec.degrees
    mesh = build_mesh(replicate=degrees.replicate, shard=degrees.shard, sequence=degrees.sequence)
    model, _ = build_model(spec, mesh)
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=0)
    initialize_adapters(model, seed=0)
    optimizer = build_optimizer(model, config.optimizer)
    rows, tokens = config.training.local_batch_size, config.training.seq_len // degrees.sequence

    chunk_tokens = chunk_length(
        model.sharding.stream_chunk_tokens, config.training.seq_len, degrees.sequence
    )

    def batch() -> Batch:
        ids = torch.randint(spec.model_config.vocab_size, (rows, tokens))
        positions = torch.arange(tokens).expand(rows, tokens).contiguous()
        return Batch(
            ids, ids.clone(), positions, documents_of(case, config), chunk_tokens=chunk_tokens
        )

    batches = [batch() for _ in range(degrees.accumulation_steps)]
    for step in range(steps):
        if before:
            before(step)
        with CollectiveCounter() as counter:
            train_step(model, optimizer, batches, mesh, max_norm=config.training.max_norm)
    return counter.counts


def profiled(case: Case) -> dict | None:
    """Measure on every rank a run of two steps with the profiler. Returns the result on rank 0."""
    import torch.distributed as dist

    from titan_ulysses.distributed.mesh import init_distributed

    init_distributed()
    measured = measure(case)
    return measured if dist.get_rank() == 0 else None


def measure(case: Case) -> dict:
    """Return the highest sum of the allocator's events from the first step on, and the collectives
    of the second step.
    """
    import torch

    def mark(step: int) -> None:
        # Release what the verification of a model family may have left.
        gc.collect()
        with torch.profiler.record_function(f"step {step} begins"):
            pass

    # Memory of an earlier case would be released, and so subtracted, in this one.
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
        patience_with_gloo(),
    ):
        collectives = train(case, steps=2, before=mark)
    events = profile.profiler.kineto_results.events()
    began = next(event.start_ns() for event in events if event.name() == "step 0 begins")
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    alive = peak = 0
    for when, change in changes:
        alive += change
        if when >= began:
            peak = max(peak, alive)
    return {"peak": peak, "collectives": {kind: list(count) for kind, count in collectives.items()}}


def patience_with_gloo() -> Any:
    """Return a dispatch mode under which this thread, not one of gloo's, releases the tensors that
    collectives have sent or received.

    The profiler sees only releases by threads that it profiles, and one of gloo's threads may hold
    the last reference to a tensor. So this mode holds the storages of a collective's tensors too,
    until nobody else does, which it checks before each operation. After each collective it waits a
    moment for gloo.
    """
    import torch
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Patience(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.held: dict[int, Any] = {}
            self.sent = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if DTensor in types:
                return NotImplemented
            if self.sent:
                time.sleep(0.01)
            for key in [key for key in self.held if torch._C._storage_Use_Count(key) == 1]:
                del self.held[key]
            result = func(*args, **(kwargs or {}))
            self.sent = func.namespace in ("c10d", "_c10d_functional")
            if self.sent:
                storages = [
                    x.untyped_storage()
                    for x in tree_leaves((args, result))
                    if isinstance(x, torch.Tensor)
                ]
                self.held |= {storage._cdata: storage for storage in storages}
            return result

    return Patience()


def resident(case: Case) -> dict | None:
    """Measure on every rank how far the resident set rises above that of the process before it.
    Returns the result on rank 0.
    """
    import torch.distributed as dist

    from titan_ulysses.distributed.mesh import init_distributed

    init_distributed()
    tiny = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 512,
        "head_dim": 8,
    }
    small = {"seq_len": 64 * case.ranks, "param_dtype": case.settings["training"]["param_dtype"]}
    parallelism = {"parallelism": case.settings.get("parallelism", {})}
    # A tiny run first: torch loads some of its parts at their first use.
    train(Case("", case.ranks, case.model | tiny, {"training": small} | parallelism), steps=1)
    with peak_memory() as peaks:
        train(case, steps=2)
    return {"peak": peaks["peak"] - peaks["before"]} if dist.get_rank() == 0 else None


# --- the comparison -------------------------------------------------------------------------------


def compare(case: Case, minutes: float) -> dict:
    """Plan and run one case and print the comparison. Returns the relative errors."""
    arguments, threads = ["--case", case.name, "--role"], 2 // min(2, case.ranks)
    plan = run([sys.executable, __file__, *arguments, "planned"], threads=1, minutes=minutes)
    truth = run(
        [*launch(case.ranks, __file__), *arguments, "profiled"], threads=threads, minutes=minutes
    )
    if isinstance(plan, str) or isinstance(truth, str):
        print(f"{case.name}: plan {plan}; run {truth}", flush=True)
        return {"failed": True}
    error = plan["peak"] / truth["peak"] - 1
    same = plan["collectives"] == truth["collectives"]
    line = (
        f"{case.name:<44} peak {truth['peak'] / 2**20:8.1f} MiB, planned "
        f"{plan['peak'] / 2**20:8.1f} ({error:+.2%})  in {plan['where']} ({plan['phase']})  "
        f"collectives {'equal' if same else 'DIFFER'}"
    )
    found = {"peak": abs(error), "where": plan["where"], "collectives": same}
    if case.resident:
        whole = run(
            [*launch(case.ranks, __file__), *arguments, "resident"],
            threads=threads,
            minutes=minutes,
            env=ALLOCATOR,
        )
        if isinstance(whole, str):
            print(f"{case.name}: resident: {whole}", flush=True)
            return {"failed": True}
        off = plan["peak"] / whole["peak"] - 1
        found["resident"] = abs(off)
        line += f"  resident {whole['peak'] / 2**20:,.0f} MiB ({off:+.2%})"
    print(line, flush=True)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--small", action="store_true", help="the small cases that the tests run")
    parser.add_argument("--minutes", type=float, default=10, help="patience a run")
    parser.add_argument(
        "--role", choices=["planned", "profiled", "resident"], help=argparse.SUPPRESS
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    everything = {case.name: case for case in [*SMALL, *CASES]}
    if args.role:
        said = globals()[args.role](everything[args.case])
        if said is not None:
            print(json.dumps(said))
        return
    chosen = [c for c in (SMALL if args.small else [*SMALL, *CASES]) if args.only in c.name]
    found = [compare(case, args.minutes) for case in chosen]
    done = [one for one in found if "failed" not in one]
    if done:
        worst = max(one["peak"] for one in done)
        where = {
            one["where"]: sum(other["where"] == one["where"] for other in done) for one in done
        }
        print(
            f"{len(done)} of {len(found)} cases; worst error of the peak {worst:.2%}; peaks in "
            f"{where}"
        )
        if whole := [one["resident"] for one in done if "resident" in one]:
            print(f"worst error of the resident set {max(whole):.2%} in {len(whole)} cases")
    if len(done) < len(found) or not all(one["collectives"] for one in done):
        sys.exit(1)


if __name__ == "__main__":
    main()
