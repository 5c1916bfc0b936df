"""Scale by simulation: from 1 to 1,024 ranks, and mixes of data and sequence parallelism. And
measured: weak and strong scaling on the ranks that a machine has.

    python scripts/bench/scaling.py                                    # both, for Llama-3-8B
    python scripts/bench/scaling.py --config configs/llama3_70b.toml
    python scripts/bench/scaling.py --what mixes --ranks 8 64 --seq-len 1048576 --picture x.png
    python scripts/bench/scaling.py --what waits     # the exchange's share of a streamed step
    python scripts/bench/scaling.py --what measured                    # 1 and 2 CPU ranks; 4: bytes

Sequence length and sequence-parallel degree are doubled together: DeepSpeed-Ulysses (arXiv
2309.14509) hands in the same bytes for each layer then, as long as every KV head has its rank. The
counts are those of this project's step on fake tensors (`estimate_plan`), beside a closed form.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import LLAMA, child, parser_of, training_step

from titan_ulysses.config.load import load_config
from titan_ulysses.distributed.sequence import chunk_length
from titan_ulysses.observability.units import size_text, time_text
from titan_ulysses.plan.fastest import meshes
from titan_ulysses.plan.planner import Estimate, Setup, estimate_plan, set_up
from titan_ulysses.plan.search import with_settings
from titan_ulysses.ulysses.heads import plan_heads

LONGEST = 2**27
"""max_position_embeddings of the planned models."""

MODEL = {**LLAMA, "vocab_size": 2048, "intermediate_size": 704}
"""What is measured."""

WAITS = [
    (ranks, tokens * 2**10)
    for ranks, tokens in ((8, 64), (8, 256), (8, 1024), (16, 128), (64, 512), (64, 1024))
]
"""Ranks and tokens whose exchange `waits` plans."""


def exchanged_bytes(model: Any, *, degree: int, tokens: int, itemsize: int) -> int:
    """Return the bytes that rank 0 hands in to all-to-alls in a step, its own part included.

    For layers that are not streamed, each an activation checkpoint: q, k, v to heads and the output
    back, both again in recomputation, the gradient of the output to heads, those of q, k, v back.
    tokens: of this rank, B * T.
    """
    if degree == 1:
        return 0
    plan = plan_heads(model.num_attention_heads, model.num_key_value_heads, degree)
    size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    queries = [len(heads) for heads in plan.query]
    every = [len(q) + 2 * len(k) for q, k in zip(plan.query, plan.key_value, strict=True)]
    from_tokens = 2 * sum(every) + sum(queries)
    from_heads = degree * (2 * queries[0] + every[0])
    return model.num_hidden_layers * tokens * size * itemsize * (from_tokens + from_heads)


def row_of(found: Estimate) -> dict[str, Any]:
    """Return what a table has of a plan."""
    setup, d = found.setup, found.setup.degrees
    shards = d.shard * d.sequence
    gathered = found.sent("all_gather") * shards + found.sent("reduce_scatter")
    return {
        "mesh": [d.replicate, d.shard, d.sequence],
        "seq_len": setup.config.training.seq_len,
        "exchanged": found.sent("all_to_all"),
        "fsdp": gathered * (shards - 1) / shards,
        "gpu_bytes": found.gpu_bytes,
        "host_bytes": found.host_bytes,
        "fits": found.fits,
        "step_seconds": found.time.seconds,
        "seconds_per_token": found.seconds_per_token,
        "network_share": (found.time.parts["exchange"] + found.time.waits["FSDP"])
        / found.time.seconds,
        "binds": found.time.bottleneck,
    }


def setup_of(config: Path, *, ranks: int, seq_len: int, **more: Any) -> Setup:
    """Return the setup of one sequence on all ranks, whole unless more says otherwise."""
    changes = {
        "plan.world_size": ranks,
        "training.seq_len": seq_len,
        "model.config.max_position_embeddings": LONGEST,
        "parallelism.sequence_parallel_degree": ranks,
        "parallelism.data_parallel_shard_degree": 1,
        "memory.stream_chunk_tokens": -1,
    }
    changes |= {key.replace("__", "."): value for key, value in more.items()}
    return set_up(load_config(config, changes.items()))


def weak_scaling(config: Path, *, tokens: int, largest: int) -> list[dict[str, Any]]:
    """Plan S = tokens * P on P ranks for P = 1, 2, 4, ..., streamed and not."""
    rows = []
    print(f"\nS / P = {tokens:,} tokens; bytes of a rank and a step")
    print(
        f"{'P':>5} {'S':>12}  {'':<8} {'exchanged':>11} {'closed form':>11} {'FSDP':>11} ", end=""
    )
    print(f"{'GPU memory':>11} {'host (node)':>11} {'a step':>13}  limited by   planned in")
    for ranks in [2**i for i in range(largest.bit_length())]:
        for streamed in (False, True):
            started = time.perf_counter()
            chunk = {"memory__stream_chunk_tokens": 0 if streamed else -1}
            found = estimate_plan(setup_of(config, ranks=ranks, seq_len=ranks * tokens, **chunk))
            closed = exchanged_bytes(
                found.setup.model_config, degree=ranks, tokens=tokens, itemsize=2
            )
            row = row_of(found) | {"streamed": streamed, "closed_form": closed}
            row["planned_in"] = time.perf_counter() - started
            rows.append(row)
            print(
                f"{ranks:>5} {row['seq_len']:>12,}  {'streamed' if streamed else 'whole':<8} "
                f"{size_text(row['exchanged']):>11} {'' if streamed else size_text(closed):>11} "
                f"{size_text(row['fsdp']):>11} {size_text(row['gpu_bytes']):>11} "
                f"{size_text(row['host_bytes']):>11} {time_text(row['step_seconds']):>13}  "
                f"{row['binds']:<12} {row['planned_in']:.1f} s"
            )
    return rows


def mixes(config: Path, *, ranks: list[int], seq_len: int) -> list[dict[str, Any]]:
    """Plan every mesh of these numbers of ranks for one length of sequences."""
    rows = []
    print(f"\nmeshes for sequences of {seq_len:,} tokens, streamed, checkpoints as configured")
    print(
        f"{'ranks':>5}  dp_replicate x dp_shard x sp  {'a step':>13} {'tokens/s':>11} "
        f"{'GPU memory':>11}  fits   limited by  network"
    )
    for world in ranks:
        setup = setup_of(config, ranks=world, seq_len=seq_len, memory__stream_chunk_tokens=0)
        for mesh in meshes(setup):
            found = estimate_plan(with_settings(setup, mesh))
            row = row_of(found) | {"ranks": world}
            rows.append(row)
            print(
                f"{world:>5}  {' x '.join(map(str, row['mesh'])):<28} "
                f"{time_text(row['step_seconds']):>13} {1 / row['seconds_per_token']:>11,.0f} "
                f"{size_text(row['gpu_bytes']):>11}  {'yes' if row['fits'] else 'no':<5}  "
                f"{row['binds']:<10}  {row['network_share']:.1%}"
            )
    return rows


def waits(config: Path, cases: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Plan streamed steps of (ranks, tokens), each layer a checkpoint: the share of the exchange,
    for which the computation waits, and the most that it would save to send a chunk's q, k and v
    while the chunk before is attended to.

    That is a third of the bytes, but for the first chunk. Forward has q, k, v and the output,
    backward these again, and their gradients. The rest of a layer waits for the output, autograd
    for the gradients, and the keys and values that backward computes first have no attention beside
    them: q, k and v of forward and q of backward are left, as many as q, k, v and the output.
    """
    rows = []
    print("\nthe exchange of a streamed step; ahead: the most that a chunk sent ahead could save")
    print(
        f"{'ranks':>5} {'S':>11} {'kernel':<6} {'chunks':>6} {'a step':>13} {'exchange':>10} ",
        end="",
    )
    print(f"{'share':>7} {'ahead':>7}")
    for ranks, seq_len in cases:
        for kernel in ("fa2", "fa3"):
            more = {"memory__stream_chunk_tokens": 0, "plan__attention_kernel": kernel}
            found = estimate_plan(setup_of(config, ranks=ranks, seq_len=seq_len, **more))
            tokens = chunk_length(0, seq_len, ranks) or seq_len
            chunks, time_ = -(-seq_len // tokens), found.time
            share = time_.parts["exchange"] / time_.seconds
            ahead = share / 3 * (chunks - 1) / chunks
            row: dict[str, Any] = {"ranks": ranks, "seq_len": seq_len, "kernel": kernel}
            row |= {"chunks": chunks, "step_seconds": time_.seconds}
            rows.append(row | {"share": share, "ahead": ahead})
            print(
                f"{ranks:>5} {seq_len:>11,} {kernel:<6} {chunks:>6} {time_text(time_.seconds):>13} "
                f"{time_text(time_.parts['exchange']):>10} {share:>7.2%} {ahead:>7.2%}"
            )
    return rows


def draw(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw the tokens per second and GPU of each mesh of `mixes`, over the degree of sequence
    parallelism. Filled points fit; dashed lines have replicas.
    """
    from titan_ulysses.observability.pictures import COLORS, picture

    with picture(path, size=(8, 4.2)) as (_, axes):
        for number, world in enumerate(sorted({row["ranks"] for row in rows})):
            for replicas in (False, True):
                line = [
                    row
                    for row in rows
                    if row["ranks"] == world and (row["mesh"][0] > 1) == replicas
                ]
                if not line:
                    continue
                color, degrees = COLORS[number], [row["mesh"][2] for row in line]
                speeds = [1 / row["seconds_per_token"] / world for row in line]
                shared = f"{world} GPUs" + (", a replica a node" if replicas else "")
                axes.plot(degrees, speeds, "--" if replicas else "-", color=color, label=shared)
                for degree, speed, row in zip(degrees, speeds, line, strict=True):
                    face = color if row["fits"] else "white"
                    axes.plot(degree, speed, "o", color=color, markerfacecolor=face)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["mesh"][2] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set(xlabel="sequence-parallel degree", ylabel="tokens per second and GPU, planned")
        axes.set_ylim(0, 1.1 * max(1 / row["seconds_per_token"] / row["ranks"] for row in rows))
        axes.set_title(f"{title} (filled: it fits)", fontsize=10)
        axes.legend(frameon=False, fontsize=8, loc="lower left")


# --- measured -------------------------------------------------------------------------------------


def measure(seq_len: int, repeats: int) -> list[dict[str, float]]:
    """On a rank: return the seconds of each step, those of them in exchanges, and its CPU seconds.

    An exchange lasts from its call to its result, so packing and the wait for the other rank count.
    """
    import torch.distributed as dist

    from titan_ulysses.ulysses import exchange

    inside = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal inside
            started = time.perf_counter()
            result = function(*args)
            inside += time.perf_counter() - started
            return result

        return call

    # Exchanges in both directions of both passes go through these two functions, which wait for
    # the all-to-all.
    for name in ("_scatter_heads", "_gather_heads"):
        setattr(exchange, name, timed(getattr(exchange, name)))
    step, found = training_step(MODEL), []
    step(seq_len // 8)  # a short step to warm up
    for _ in range(repeats):
        inside = 0.0
        dist.barrier()
        started, cpu = time.perf_counter(), time.process_time()
        step(seq_len)
        cpu = time.process_time() - cpu
        dist.barrier()
        found.append({"seconds": time.perf_counter() - started, "exchange": inside, "cpu": cpu})
    return found


def count(seq_len: int) -> dict[str, tuple[int, int]]:
    """On a rank: return what it hands in to collectives in a step, {kind: (calls, bytes)}."""
    from titan_ulysses.distributed.collectives import CollectiveCounter

    step = training_step(MODEL)
    with CollectiveCounter() as counter:
        step(seq_len)
    return dict(counter.counts)


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns on rank 0 of so many CPU ranks of one thread each."""
    return child(function, *arguments, ranks=ranks, minutes=10, what=f"{ranks} ranks")[0]


def measured(*, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Measure strong and weak scaling on 1 and 2 ranks, exchange apart, and count on 1, 2 and 4 the
    bytes of the exchange, S / P constant. Every rank needs a core of its own for times.
    """
    from titan_ulysses.model import hf

    rows = []
    print(f"\nmeasured: a small llama, fp32, medians of {repeats} steps, seconds of rank 0")
    print(f"{'':<7} {'P':>2} {'S':>7} {'a step':>8} {'exchange':>9} {'the rest':>9} {'CPU':>7}")
    # One rank at S = tokens is the first row of both.
    for what, ranks, seq_len in (("", 1, tokens), ("strong", 2, tokens), ("weak", 2, 2 * tokens)):
        steps = on_ranks(ranks, measure, seq_len, repeats)
        row: dict[str, Any] = {"what": what, "ranks": ranks, "seq_len": seq_len}
        row |= {
            key: statistics.median(step[key] for step in steps)
            for key in ("seconds", "exchange", "cpu")
        }
        rows.append(row)
        print(
            f"{what:<7} {ranks:>2} {seq_len:>7,} {row['seconds']:>8.2f} {row['exchange']:>9.3f} "
            f"{row['seconds'] - row['exchange']:>9.2f} {row['cpu']:>7.2f}"
        )
    config = hf.load_model_config("", MODEL)
    for ranks in (1, 2, 4):
        short = tokens // 4
        counted = on_ranks(ranks, count, ranks * short)
        handed_in = counted.get("all_to_all", (0, 0))[1]
        closed = exchanged_bytes(config, degree=ranks, tokens=short, itemsize=4)
        rows.append({"what": "bytes", "ranks": ranks, "counted": handed_in, "closed_form": closed})
        print(
            f"P = {ranks}, {short:,} tokens a rank: a rank hands in {handed_in:,} bytes, closed "
            f"form {closed:,}"
        )
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/llama3_8b.toml"))
    parser.add_argument(
        "--what", choices=["weak", "mixes", "both", "waits", "measured"], default="both"
    )
    parser.add_argument("--tokens", type=int, default=32768, help="S / P")
    parser.add_argument("--largest", type=int, default=1024, help="ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512], help="of the mixes")
    parser.add_argument("--seq-len", type=int, default=2**20, help="of the mixes")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--picture", type=Path, help="draw the mixes here")
    parser.add_argument("--measured-tokens", type=int, default=4096, help="of a rank")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if options.what == "measured":
        found["measured"] = measured(tokens=options.measured_tokens, repeats=options.repeats)
    else:
        print(f"planned, nothing is measured: {options.config}")
    if options.what in ("weak", "both"):
        found["weak"] = weak_scaling(options.config, tokens=options.tokens, largest=options.largest)
    if options.what in ("mixes", "both"):
        found["mixes"] = mixes(options.config, ranks=options.ranks, seq_len=options.seq_len)
        if options.picture:
            title = f"{options.config.stem}, sequences of {options.seq_len:,} tokens"
            draw(found["mixes"], options.picture, title=title)
    if options.what == "waits":
        found["waits"] = waits(options.config, WAITS)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
