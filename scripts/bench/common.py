"""What the benchmarks share: a training step, and child processes that print what they measured as a line of JSON."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc settings under which freed memory is returned, so that peaks of the resident set mean something."""
CACHING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""glibc settings under which freed memory is kept, as a GPU's allocator does: no page faults in what is timed."""


def training_step(model_config: dict) -> Callable[[int], Any]:
    """On every rank of a launch: a function that trains one step on a row of that many tokens, in fp32, P = ranks."""
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
    model = hf.build_on_meta(hf.load_model_config("", model_config), torch.float32)
    parallelize(model, mesh, param_dtype=torch.float32)
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=0)
    optimizer = build_optimizer(model.parameters(), Optimizer())

    def step(seq_len: int) -> Any:
        rank, tokens = mesh.sp.get_local_rank(), seq_len // mesh.sp.size()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model_config["vocab_size"], (1, seq_len + 1), generator=generator)
        here = slice(rank * tokens, (rank + 1) * tokens)
        batch = Batch(
            input_ids=ids[:, :-1][:, here],
            labels=ids[:, 1:][:, here],
            position_ids=torch.arange(seq_len)[None, here],
            documents=((seq_len,),),
        )
        return train_step(model, optimizer, [batch], mesh, max_norm=1.0)

    return step


def launch(ranks: int, script: str) -> list[str]:
    """The command that runs script, given as its `__file__`, on that many ranks; arguments may follow."""
    return [sys.executable, "scripts/launch.py", "--nproc-per-node", str(ranks), str(Path(script).resolve())]


def run(command: list[str], *, threads: int, minutes: float, memory: int | None = None, env: dict | None = None) -> Any:
    """What a child process prints as its last line, or a string that says why there is nothing.

    threads is each process's; memory a limit in bytes of its data segment.
    """

    def limit() -> None:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    environment = {**os.environ, **(env or {}), "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
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
    return "out of memory" if out_of_memory else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
