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

import gc
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from common import ALLOCATOR, LLAMA, child, parser_of, peak_memory

SMALL_LLAMA = LLAMA | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 352}
# Latent attention: values have another head size than queries and keys.
LATENT = {"model_type": "youtu", "intermediate_size": 64, "num_hidden_layers": 2}
LATENT |= {"num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2, "v_head_dim": 32}
LATENT |= {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}


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
    name: str,
    ranks: int,
    tokens: int,
    settings: str = "",
    model: dict[str, Any] | None = None,
    *,
    degree: int | None = None,
    bf16: bool = False,
    documents: list[int] | None = None,
    resident: bool = False,
) -> Case:
    """Build a case of sequences of so many tokens, each on `degree` ranks (all). settings:
    overrides as on the command line, without dashes. model: what differs from SMALL_LLAMA.
    """
    dtype = "bfloat16" if bf16 else "float32"
    table: dict[str, Any] = {"training": {"seq_len": tokens, "param_dtype": dtype}}
    table["parallelism"] = {"sequence_parallel_degree": degree or ranks}
    for setting in settings.split():
        key, _, value = setting.partition("=")
        section, _, field = key.partition(".")
        is_name = value.isidentifier() and value not in ("true", "false")
        table.setdefault(section, {})[field] = value if is_name else json.loads(value)
    return Case(name, ranks, SMALL_LLAMA | (model or {}), table, documents, resident)


MLP_TILES, LOSS_TILES = "memory.mlp_tile_tokens", "memory.loss_tile_tokens"
CHUNKS, ROWS = "memory.stream_chunk_tokens", "training.local_batch_size"
TILES = f"{MLP_TILES}=300 {LOSS_TILES}=100"
EVERY_2, ON_HOST = "activation_checkpoint.every=2", "activation_checkpoint.offload=host"
HSDP, NF4 = "parallelism.data_parallel_replicate_degree=2", "lora.quantize_base=nf4"
ROUNDING, ADAMW = "optimizer.stochastic_rounding=true", "optimizer.name=adamw"
TIED = {"tie_word_embeddings": True}
WIDE = {"hidden_size": 256, "intermediate_size": 512}

SMALL = [
    case("small, one rank", 1, 4096, f"{MLP_TILES}=512 {LOSS_TILES}=100"),
    case(
        "small, P 2, bf16, offload, tied",
        *(2, 4096, f"{EVERY_2} {ON_HOST} {MLP_TILES}=300", TIED),
        bf16=True,
    ),
    case(
        "small, P 2, packed, two batches, no checkpoints",
        *(2, 2048, "training.global_batch_size=3 activation_checkpoint.mode=none"),
        documents=[1000, 24, 1024],
    ),
    case("small, P 2, bf16, LoRA", 2, 4096, f"{TILES} lora.rank=4", bf16=True),
    case("small, P 2, latent attention", 2, 2048, "", LATENT),
    case("small, P 2, streamed", 2, 5120, f"{EVERY_2} {CHUNKS}=1024 {TILES}"),
    case("small, P 2, bf16, QLoRA", 2, 512, f"lora.rank=4 {NF4}", WIDE, bf16=True),
]

BIG = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2}
QWEN3 = {"model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 3}
GEMMA2 = {"model_type": "gemma2", "head_dim": 16, "sliding_window": 256}
GEMMA2 |= {"attn_logit_softcapping": 50.0}
OLMO2 = {"model_type": "olmo2", "num_hidden_layers": 5}
WIDE_VOCABULARY = {"vocab_size": 32768, "num_hidden_layers": 2}
DEEP = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 8192}
ATTENTION = {"intermediate_size": 64, "head_dim": 64, "num_hidden_layers": 2}
THREE_HEADS = {"num_attention_heads": 3, "hidden_size": 96, "num_key_value_heads": 1}

CASES = [
    case("attention, P 4, bf16", 4, 16384, f"{MLP_TILES}=256", ATTENTION, bf16=True),
    case("attention, P 2, every 2", 2, 8192, f"{EVERY_2} {MLP_TILES}=256", QWEN3 | ATTENTION),
    case("MLP, untiled, dp 2", 2, 4096, f"{MLP_TILES}=-1", {"intermediate_size": 1024}, degree=1),
    case("loss, untiled, dp 2", 2, 4096, f"{LOSS_TILES}=-1", WIDE_VOCABULARY, degree=1),
    case("loss, tiled, P 2, bf16", 2, 2048, f"{LOSS_TILES}=512", WIDE_VOCABULARY | TIED, bf16=True),
    case("optimizer, deep, short", 1, 128, "", DEEP),
    case("optimizer, 4 bits", 1, 64, f"{ADAMW}4bit", DEEP),
    case("optimizer, rounding, P 2", 2, 128, ROUNDING, DEEP, bf16=True),
    case("optimizer, 8 bits, P 2", 2, 128, f"{ADAMW}8bit", DEEP),
    case(
        "olmo2, dp 2 x P 2, every 3",
        *(4, 4096, f"activation_checkpoint.every=3 {MLP_TILES}=512", OLMO2),
        degree=2,
    ),
    case("HSDP 2 x P 2, offload", 4, 4096, f"{HSDP} {ON_HOST}", degree=2, bf16=True),
    case("gemma2, packed, two rows", 1, 1024, f"{ROWS}=2", GEMMA2, documents=[100, 924]),
    case("3 heads on 2 ranks, tiles", 2, 6000, f"{MLP_TILES}=700", ATTENTION | THREE_HEADS),
    # Short rows, so that memory becomes large while attention takes little time.
    case("resident, tiles", 1, 512, f"{ROWS}=192 {MLP_TILES}=2048", BIG, resident=True),
    case("resident, MLP untiled", 1, 512, f"{ROWS}=72 {MLP_TILES}=-1", BIG, resident=True),
    case(
        "resident, loss untiled",
        *(1, 512, f"{ROWS}=12 {LOSS_TILES}=-1", BIG | {"vocab_size": 32768}),
        resident=True,
    ),
    case("resident, deep", 1, 64, "", BIG | DEEP | {"hidden_size": 1152}, resident=True),
    case("resident, P 2, offload", 2, 1024, f"{ROWS}=136 {ON_HOST}", BIG, resident=True),
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


def measure(case: Case) -> dict:
    """Train two steps with the profiler. Return the highest sum of the allocator's events from the
    first step on, and the collectives of the second step.
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


def resident(case: Case) -> dict:
    """Measure on every rank how far the resident set rises above that of the process before it."""
    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    tiny["vocab_size"] = 512
    small = {"seq_len": 64 * case.ranks, "param_dtype": case.settings["training"]["param_dtype"]}
    parallelism = {"parallelism": case.settings.get("parallelism", {})}
    # A tiny run first: torch loads some of its parts at their first use.
    train(Case("", case.ranks, case.model | tiny, {"training": small} | parallelism), steps=1)
    with peak_memory() as peaks:
        train(case, steps=2)
    return {"peak": peaks["peak"] - peaks["before"]}


# --- the comparison -------------------------------------------------------------------------------


def of_case(function: str, name: str) -> dict:
    """In a process of its own, or on a rank: do what is named to the case that is named."""
    from titan_ulysses.distributed.mesh import init_distributed

    if function != "planned":
        init_distributed()
    return globals()[function](next(one for one in [*SMALL, *CASES] if one.name == name))


def compare(case: Case, minutes: float) -> dict:
    """Plan and run one case and print the comparison. Returns the relative errors."""
    on_ranks: dict[str, Any] = {"ranks": case.ranks, "minutes": minutes}
    on_ranks["threads"] = 2 // min(2, case.ranks)
    plan = child(of_case, "planned", case.name, minutes=minutes)
    everyone = child(of_case, "measure", case.name, **on_ranks)
    if isinstance(plan, str) or isinstance(everyone, str):
        print(f"{case.name}: plan {plan}; run {everyone}")
        return {"failed": True}
    truth = everyone[0]
    error = plan["peak"] / truth["peak"] - 1
    same = plan["collectives"] == truth["collectives"]
    line = (
        f"{case.name:<44} peak {truth['peak'] / 2**20:8.1f} MiB, planned "
        f"{plan['peak'] / 2**20:8.1f} ({error:+.2%})  in {plan['where']} ({plan['phase']})  "
        f"collectives {'equal' if same else 'DIFFER'}"
    )
    found = {"peak": abs(error), "where": plan["where"], "collectives": same}
    if case.resident:
        whole = child(of_case, "resident", case.name, **on_ranks, env=ALLOCATOR)
        if isinstance(whole, str):
            print(f"{case.name}: resident: {whole}")
            return {"failed": True}
        off = plan["peak"] / whole[0]["peak"] - 1
        found["resident"] = abs(off)
        line += f"  resident {whole[0]['peak'] / 2**20:,.0f} MiB ({off:+.2%})"
    print(line)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--small", action="store_true", help="the small cases that the tests run")
    parser.add_argument("--minutes", type=float, default=10, help="patience a run")
    args = parser.parse_args()
    chosen = [c for c in (SMALL if args.small else [*SMALL, *CASES]) if args.only in c.name]
    found = [compare(case, args.minutes) for case in chosen]
    done = [one for one in found if "failed" not in one]
    if done:
        worst = max(one["peak"] for one in done)
        where = dict(Counter(one["where"] for one in done))
        said = f"{len(done)} of {len(found)} cases; worst error of the peak {worst:.2%}"
        print(f"{said}; peaks in {where}")
        if whole := [one["resident"] for one in done if "resident" in one]:
            print(f"worst error of the resident set {max(whole):.2%} in {len(whole)} cases")
    if len(done) < len(found) or not all(one["collectives"] for one in done):
        sys.exit(1)


if __name__ == "__main__":
    main()
