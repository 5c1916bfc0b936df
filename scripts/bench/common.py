"""What the benchmarks share: a training step, what it takes, and child processes that print that as
a line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
"""glibc settings under which freed memory is returned, so that peaks of the resident set mean
something.
"""
CACHING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""glibc settings under which freed memory is kept, as a GPU's allocator does: no page faults in
what is timed.
"""


LLAMA: dict[str, Any] = {
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


def sequence(index: int, seq_len: int) -> Any:
    """The index-th training sequence, [S] token ids: random ones of the first 256, which a model
    soon learns.
    """
    import torch

    return torch.randint(256, (seq_len,), generator=torch.Generator().manual_seed(index))


def training_step(
    model: dict | str, *, dtype: str = "float32", degree: int | None = None, **options: Any
) -> Callable[..., tuple[Any, Any]]:
    """On every rank of a launch: a function of (S, index = 0) that trains a step on that sequence,
    P = degree or all.

    It returns the loss and the gradient norm. model is a table as in `[model.config]`, initialised
    at random, or a folder with config and weights; options are those of `parallelize`. Parameters
    are stored in fp32 and computed with in dtype.
    """
    import torch
    import torch.distributed as dist

    from titan_ulysses.checkpoint import safetensors as weights
    from titan_ulysses.config.schema import Optimizer
    from titan_ulysses.distributed.mesh import build_mesh, init_distributed
    from titan_ulysses.model import hf
    from titan_ulysses.optim.adamw import build_optimizer
    from titan_ulysses.setup.parallelize import parallelize
    from titan_ulysses.setup.resolve import resolve_model
    from titan_ulysses.train.step import train_step

    init_distributed()
    mesh = build_mesh(sequence=degree or dist.get_world_size())
    spec = resolve_model(
        model, world_size=dist.get_world_size(), device_type=mesh.device.type, param_dtype=dtype
    )
    built = hf.build_on_meta(spec.model_config, torch.float32)
    parallelize(built, mesh, spec.options, **options)
    hf.allocate(built, mesh.device)
    if isinstance(model, str):
        weights.load(built, model)
    else:
        hf.initialize(built, seed=0)
    optimizer = build_optimizer(built.parameters(), Optimizer())

    def step(seq_len: int, index: int = 0) -> tuple[Any, Any]:
        return train_step(
            built, optimizer, [_batch(sequence(index, seq_len), mesh)], mesh, max_norm=1.0
        )[:2]

    return step


def _batch(ids: Any, mesh: Any) -> Any:
    """This rank's slice of one sequence; data-parallel ranks have the same."""
    import torch

    from titan_ulysses.data.loader import Batch
    from titan_ulysses.distributed.sequence import IGNORE_INDEX

    labels = torch.cat([ids[1:], ids.new_tensor([IGNORE_INDEX])])
    return Batch(
        input_ids=mesh.local_slice(ids[None]),
        labels=mesh.local_slice(labels[None]),
        position_ids=mesh.local_slice(torch.arange(len(ids))[None]),
        documents=((len(ids),),),
    ).to(mesh.device)


def measure(step: Callable[..., tuple[Any, Any]], lengths: list[int]) -> dict[str, Any]:
    """Train a step on a sequence of each length, in order: lists of seconds, CPU seconds, losses,
    norms; peak bytes.

    `peak` is the process's resident set, on a GPU what its tensors took; `anonymous` the part of it
    that no file backs.
    """
    import torch.distributed as dist

    found: dict[str, Any] = {"seconds": [], "cpu": [], "loss": [], "norm": []}
    with peak_memory() as peaks:
        for index, seq_len in enumerate(lengths):
            dist.barrier()
            started, cpu = time.perf_counter(), time.process_time()
            loss, norm = step(seq_len, index)
            found["loss"].append(float(loss))
            found["norm"].append(float(norm))
            found["cpu"].append(time.process_time() - cpu)
            dist.barrier()
            found["seconds"].append(time.perf_counter() - started)
    return found | peaks


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Fills the dict at its end: bytes at the `peak` and when it begins (`before`), and the
    `anonymous` peak.
    """
    import torch

    peaks: dict[str, int] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        peaks["before"] = torch.cuda.memory_allocated()
        yield peaks
        peaks["peak"] = peaks["anonymous"] = torch.cuda.max_memory_allocated()
        return
    # The peak so far, of loading and initialising, is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    peaks["before"] = _status("VmRSS")
    done = threading.Event()

    def sample() -> None:  # the kernel keeps no peak of this one
        while not done.wait(0.002):
            peaks["anonymous"] = max(peaks.get("anonymous", 0), _status("RssAnon"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield peaks
    done.set()
    thread.join()
    peaks["peak"] = _status("VmHWM")


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def tell(found: Any) -> NoReturn:
    """Collective: rank 0 prints the list of what all ranks found; then all end, without the
    interpreter's own end.
    """
    import torch.distributed as dist

    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        print(json.dumps(everyone), flush=True)
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)


def slope(points: Iterable[tuple[float, float]]) -> float:
    """Of the line through points (x, y), by least squares."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def launch(ranks: int, script: str, python: str = sys.executable) -> list[str]:
    """The command that runs script, given as its `__file__`, on that many ranks; arguments may
    follow.
    """
    return [
        python,
        "scripts/launch.py",
        "--nproc-per-node",
        str(ranks),
        str(Path(script).resolve()),
    ]


def run(
    command: list[str],
    *,
    threads: int,
    minutes: float,
    memory: int | None = None,
    env: dict | None = None,
) -> Any:
    """What a child process prints as its last line, or a string that says why there is nothing.

    threads is each process's; memory a limit in bytes of its data segment.
    """

    def limit() -> None:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    environment = {
        **os.environ,
        **(env or {}),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
    }
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=limit
    )
    try:
        printed, errors = child.communicate(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        child.terminate()  # and not kill: a launcher then ends its ranks
        child.communicate()
        return f"not finished after {minutes:g} minutes"
    if child.returncode == 0:
        return json.loads(printed.splitlines()[-1])
    memory_words = ("can't allocate memory", "MemoryError", "bad_alloc")
    out_of_memory = child.returncode < 0 or any(word in errors for word in memory_words)
    return (
        "out of memory"
        if out_of_memory
        else (errors.strip().splitlines() or [f"exit {child.returncode}"])[-1]
    )
