"""Compare the step time and peak memory of two sequence-parallel ranks with those of one plain
transformers process.

    python scripts/bench/step.py  2 ranks at S = 16,384; plain up to the longest S that it can do
    python scripts/bench/step.py --seq-len 8192

For the plain process, S doubles until it runs out of memory or time (--minutes for each S). Every
process has an allocator that returns freed memory, so that the peak of its resident set shows the
memory in use.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time

from common import ALLOCATOR, LLAMA, launch, run, training_step


def measure(step, repeats: int) -> dict:
    """Run one step to warm up, then `repeats` timed steps. Returns the median seconds, and the peak
    of the process before the first step and at the end.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    step()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": statistics.median(seconds), "before_gib": before, "peak_gib": peak}


def sharded(seq_len: int, repeats: int) -> None:
    """Measure on one of torchrun's ranks. Rank 0 prints the results of all ranks."""
    import torch.distributed as dist

    step = training_step(LLAMA)
    found = measure(lambda: step(seq_len), repeats)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        print(json.dumps(everyone))


def plain(seq_len: int, repeats: int) -> None:
    """Measure unmodified transformers, with sdpa, its own loss, fused AdamW and no activation
    checkpointing.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**LLAMA), dtype=torch.float32
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(
        LLAMA["vocab_size"], (1, seq_len), generator=torch.Generator().manual_seed(0)
    )

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    print(json.dumps([measure(step, repeats)]))


def show(what: str, seq_len: int, found: list[dict] | str) -> None:
    if isinstance(found, str):
        print(f"{what:<28} S {seq_len:>7,}  {found}", flush=True)
        return
    for rank, one in enumerate(found):
        name = f"{what}, rank {rank}" if len(found) > 1 else what
        print(
            f"{name:<28} S {seq_len:>7,}  step {one['seconds']:7.2f} s  peak "
            f"{one['peak_gib']:6.2f} GiB  (before the first step {one['before_gib']:.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-len", type=int, default=16_384)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=5, help="patience a try of the plain process"
    )
    parser.add_argument("--role", choices=["sharded", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        return globals()[args.role](args.seq_len, args.repeats)

    cores = os.cpu_count() or 1
    options = ["--repeats", str(args.repeats), "--role"]
    ours = [*launch(args.ranks, __file__), *options, "sharded", "--seq-len"]
    print(
        f"llama, 4 layers, h 256, vocab 32,000, fp32, {cores} cores, median of {args.repeats} "
        "steps",
        flush=True,
    )
    threads = max(1, cores // args.ranks)

    def show_ours(seq_len: int) -> None:
        found = run([*ours, str(seq_len)], threads=threads, minutes=20, env=ALLOCATOR)
        show(f"{args.ranks} ranks", seq_len, found)

    show_ours(args.seq_len)

    # The longest S of the plain process, within the memory of this machine.
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    seq_len, longest = args.seq_len // 4, 0
    while True:
        command = [sys.executable, __file__, *options, "plain", "--seq-len", str(seq_len)]
        found = run(
            command, threads=cores, minutes=args.minutes, memory=int(0.9 * available), env=ALLOCATOR
        )
        show("plain transformers", seq_len, found)
        if isinstance(found, str):
            break
        longest, seq_len = seq_len, 2 * seq_len
    if longest and longest != args.seq_len:
        show_ours(longest)


if __name__ == "__main__":
    main()
