"""Measure what sharding a sequence costs: one training step on one process and the same step on two
processes, with one thread each.

    python scripts/bench/ulysses.py                        S = 16,384, a small llama
    python scripts/bench/ulysses.py --seq-len 4096 --rounds 1

One process and two take turns, so that other work on the machine affects both, and the ratio is the
median of the turns' ratios. The exchange's share is the time between the call of an exchange and
its result, so it includes packing and the wait for the other rank. CPU seconds are those of rank 0.
Look at their ratio where other work uses the cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from common import launch, run, training_step

MODEL = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2**20,
}
TARGET = 0.6


def measure(seq_len: int, repeats: int) -> None:
    """Measure on each of one or several ranks. Rank 0 prints, for each step, its seconds, those of
    them in exchanges, and its CPU seconds.
    """
    import torch.distributed as dist

    from titan_ulysses.ulysses import exchange

    inside = 0.0

    def timed(function):
        def call(*args):
            nonlocal inside
            started = time.perf_counter()
            result = function(*args)
            inside += time.perf_counter() - started
            return result

        return call

    # Exchanges in both directions of both passes go through these two functions, which wait for
    # the all-to-all.
    exchange._scatter_heads, exchange._gather_heads = map(
        timed, (exchange._scatter_heads, exchange._gather_heads)
    )
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
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def count(seq_len: int, _: int) -> None:
    """Print on rank 0 what it hands in to collectives in a step: {kind: (calls, bytes)}."""
    import torch.distributed as dist

    from titan_ulysses.distributed.collectives import CollectiveCounter

    step = training_step(MODEL)
    with CollectiveCounter() as counter:
        step(seq_len)
    if dist.get_rank() == 0:
        print(json.dumps(counter.counts))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-len", type=int, default=16_384)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="steps a round")
    parser.add_argument("--minutes", type=float, default=20, help="patience a process")
    parser.add_argument("--role", choices=["measure", "count"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        return {"measure": measure, "count": count}[args.role](args.seq_len, args.repeats)

    options = ["--role", "measure", "--seq-len", str(args.seq_len), "--repeats", str(args.repeats)]
    print(
        f"llama, 4 layers, h 256, 8/4 heads, fp32, S = {args.seq_len:,}, one thread a process",
        flush=True,
    )
    ratios, cpu_ratios, shares = [], [], []
    for _ in range(args.rounds):
        turn, cpu = [], []
        for ranks in (1, args.ranks):
            found = run([*launch(ranks, __file__), *options], threads=1, minutes=args.minutes)
            if isinstance(found, str):
                raise SystemExit(f"{ranks} processes: {found}")
            turn.append(statistics.median(one["seconds"] for one in found))
            cpu.append(statistics.median(one["cpu"] for one in found))
        shares.append(statistics.median(one["exchange"] / one["seconds"] for one in found))
        ratios.append(turn[1] / turn[0])
        cpu_ratios.append(cpu[1] / cpu[0])
        print(
            f"one process {turn[0]:7.2f} s (CPU {cpu[0]:.2f})   {args.ranks} ranks {turn[1]:7.2f} "
            f"s (CPU {cpu[1]:.2f})   ratio {ratios[-1]:.2f} (CPU {cpu_ratios[-1]:.2f})   exchange "
            f"{100 * shares[-1]:.1f} % of the step",
            flush=True,
        )
    print(
        f"median ratio {statistics.median(ratios):.2f} (at most {TARGET} wanted on 2 ranks), of "
        f"CPU seconds {statistics.median(cpu_ratios):.2f}, exchange "
        f"{100 * statistics.median(shares):.1f} %"
    )


if __name__ == "__main__":
    main()
