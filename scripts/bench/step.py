"""Step time and peak memory: two sequence-parallel ranks against one plain transformers process.

    python scripts/bench/step.py                      2 ranks at S = 16,384; plain at the longest S that it can do
    python scripts/bench/step.py --seq-len 8192

The plain process doubles S until it runs out of memory or of patience (--minutes a try). Every process gets an
allocator that returns freed memory, so that peaks (resident set, of each process by itself) mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2**22,
    "tie_word_embeddings": False,
}
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


def measure(step, repeats: int) -> dict:
    """One step to warm up, then `repeats` of them: median seconds, and the process's peak against before any step."""
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
    """One of torchrun's ranks; rank 0 prints what all of them measured."""
    import torch
    import torch.distributed as dist

    from titan_ulysses.config import Optimizer
    from titan_ulysses.data.loader import Batch
    from titan_ulysses.memory.optimizer import build_optimizer
    from titan_ulysses.mesh import build_mesh, init_distributed
    from titan_ulysses.model import hf
    from titan_ulysses.parallelize import parallelize
    from titan_ulysses.trainer import train_step

    init_distributed()
    mesh = build_mesh(sequence=dist.get_world_size())
    model = hf.build_on_meta(hf.load_model_config("", MODEL), torch.float32)
    parallelize(model, mesh, param_dtype=torch.float32)
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=0)
    optimizer = build_optimizer(model.parameters(), Optimizer())
    rank, tokens = mesh.sp.get_local_rank(), seq_len // mesh.sp.size()
    ids = torch.randint(MODEL["vocab_size"], (1, seq_len + 1), generator=torch.Generator().manual_seed(0))
    here = slice(rank * tokens, (rank + 1) * tokens)
    batch = Batch(
        input_ids=ids[:, :-1][:, here],
        labels=ids[:, 1:][:, here],
        position_ids=torch.arange(seq_len)[None, here],
        documents=((seq_len,),),
    )
    found = measure(lambda: train_step(model, optimizer, [batch], mesh, max_norm=1.0), repeats)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        print(json.dumps(everyone))


def plain(seq_len: int, repeats: int) -> None:
    """Unmodified transformers: sdpa, its own loss, fused AdamW, no activation checkpointing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(MODEL["vocab_size"], (1, seq_len), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    print(json.dumps([measure(step, repeats)]))


def run(command: list[str], threads: int, minutes: float, memory: int | None = None) -> list[dict] | str:
    """The measurements that a child process prints, or why there are none."""

    def limit() -> None:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes, preexec_fn=limit
        )
    except subprocess.TimeoutExpired:
        return f"not finished after {minutes:g} minutes"
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    memory_words = ("can't allocate memory", "MemoryError", "bad_alloc")
    out_of_memory = done.returncode < 0 or any(word in done.stderr for word in memory_words)
    return "out of memory" if out_of_memory else done.stderr.strip().splitlines()[-1]


def show(what: str, seq_len: int, found: list[dict] | str) -> None:
    if isinstance(found, str):
        print(f"{what:<28} S {seq_len:>7,}  {found}", flush=True)
        return
    for rank, one in enumerate(found):
        name = f"{what}, rank {rank}" if len(found) > 1 else what
        print(
            f"{name:<28} S {seq_len:>7,}  step {one['seconds']:7.2f} s  peak {one['peak_gib']:6.2f} GiB"
            f"  (before the first step {one['before_gib']:.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=16_384)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5, help="patience a try of the plain process")
    parser.add_argument("--role", choices=["sharded", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        return globals()[args.role](args.seq_len, args.repeats)

    cores = os.cpu_count() or 1
    me = [str(Path(__file__)), "--repeats", str(args.repeats)]
    launch = [sys.executable, "scripts/launch.py", "--nproc-per-node", str(args.ranks)]
    ours = [*launch, *me, "--role", "sharded", "--seq-len"]
    print(f"llama, 4 layers, h 256, vocab 32,000, fp32, {cores} cores, median of {args.repeats} steps", flush=True)
    threads = max(1, cores // args.ranks)
    show(f"{args.ranks} ranks", args.seq_len, run([*ours, str(args.seq_len)], threads, 20))

    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    seq_len, longest = args.seq_len // 4, 0
    while True:
        command = [sys.executable, *me, "--role", "plain", "--seq-len", str(seq_len)]
        found = run(command, cores, args.minutes, memory=int(0.9 * available))
        show("plain transformers", seq_len, found)
        if isinstance(found, str):
            break
        longest, seq_len = seq_len, 2 * seq_len
    if longest and longest != args.seq_len:
        show(f"{args.ranks} ranks", longest, run([*ours, str(longest)], threads, 20))


if __name__ == "__main__":
    main()
