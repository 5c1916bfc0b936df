"""What the benchmarks share: a training step, measurements of its time and memory, and child
processes that print these as a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
"""glibc settings under which freed memory is returned to the system, so that the peak of the
resident set shows the memory in use.
"""
CACHING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""glibc settings under which freed memory is kept, as in a GPU's allocator, so that timed code has
no page faults.
"""


def model_table(
    kind: str,
    *,
    vocab: int,
    width: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    **more: Any,
) -> dict[str, Any]:
    """Return a model as a table of [model.config]. heads: those of queries, and of keys and values.
    more: other keys, or other values of those that all have.
    """
    own = {"model_type": kind, "vocab_size": vocab, "hidden_size": width}
    own |= {"intermediate_size": inner, "num_hidden_layers": layers}
    own |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    return own | {"max_position_embeddings": 2**22, "tie_word_embeddings": False} | more


LLAMA = model_table("llama", vocab=32_000, width=256, inner=896, layers=4, heads=(8, 4))
TOKEN_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
"""For types whose default ids are beyond a small vocabulary."""


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of a benchmark's options, whose help is its docstring, as it is. From then on
    each line is printed at once, into a file too.
    """
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=formatter)


def sequence(index: int, seq_len: int) -> Any:
    """Return training sequence number `index`: [S] random token ids below 256, a restriction that a
    model soon learns.
    """
    import torch

    return torch.randint(256, (seq_len,), generator=torch.Generator().manual_seed(index))


def sharded_model(
    model: dict | str, *, dtype: str = "float32", degree: int | None = None, **options: Any
) -> tuple[Any, Any]:
    """Build a model on every rank of a launch. Returns the model and its mesh.

    model: a table as in `[model.config]`, initialised at random, or a folder with config and
    weights. degree: P; all ranks by default. options are those of `parallelize`. Parameters are
    stored in fp32, and the computation is in dtype.
    """
    import torch
    import torch.distributed as dist

    from titan_ulysses.checkpoint import safetensors as weights
    from titan_ulysses.distributed.mesh import build_mesh, init_distributed
    from titan_ulysses.model import hf
    from titan_ulysses.setup.parallelize import parallelize
    from titan_ulysses.setup.resolve import resolve_model

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
    return built, mesh


def training_step(model: dict | str, **options: Any) -> Callable[..., tuple[Any, Any]]:
    """Build, on every rank of a launch, a function of (S, index = 0) that trains a step on that
    sequence and returns the loss and the gradient norm. The arguments are those of
    `sharded_model`.
    """
    from titan_ulysses.config.schema import Optimizer
    from titan_ulysses.optim.optimizer import build_optimizer
    from titan_ulysses.train.step import train_step

    built, mesh = sharded_model(model, **options)
    optimizer = build_optimizer(built, Optimizer())

    def step(seq_len: int, index: int = 0) -> tuple[Any, Any]:
        batch = batch_of(sequence(index, seq_len), mesh, built)
        return train_step(built, optimizer, [batch], mesh, max_norm=1.0)[:2]

    return step


def batch_of(ids: Any, mesh: Any, model: Any) -> Any:
    """Return this rank's slice of one sequence, cut for model. Data-parallel ranks have the same
    sequence.
    """
    import torch

    from titan_ulysses.data.loader import Batch
    from titan_ulysses.distributed.sequence import IGNORE_INDEX, chunk_length

    chunk_tokens = chunk_length(model.sharding.stream_chunk_tokens, len(ids), mesh.sp.size())

    def local(whole: Any) -> Any:
        return mesh.local_slice(whole[None], chunk_tokens=chunk_tokens)

    labels = torch.cat([ids[1:], ids.new_tensor([IGNORE_INDEX])])
    return Batch(
        input_ids=local(ids),
        labels=local(labels),
        position_ids=local(torch.arange(len(ids))),
        documents=((len(ids),),),
        chunk_tokens=chunk_tokens,
    ).to(mesh.device)


def measure(step: Callable[..., tuple[Any, Any]], lengths: list[int]) -> dict[str, Any]:
    """Train a step on a sequence of each length, in order. Returns lists of seconds, CPU seconds,
    losses and gradient norms, and peaks in bytes.

    `peak` is that of the process's resident set, or of its tensors on a GPU. `anonymous` is the
    peak of the part of it that no file backs.
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
    """Measure peak memory in this context. The yielded dict is complete when the context ends.

    It holds, in bytes, the memory at the beginning (`before`) and the `peak`, and both of anonymous
    memory alone (`before_anonymous`, `anonymous`; see `measure`).
    """
    import torch

    peaks: dict[str, int] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        peaks["before"] = peaks["before_anonymous"] = torch.cuda.memory_allocated()
        yield peaks
        peaks["peak"] = peaks["anonymous"] = torch.cuda.max_memory_allocated()
        return
    # Reset the kernel's peak, which is that of loading and initialising so far.
    Path("/proc/self/clear_refs").write_text("5")
    peaks["before"], peaks["before_anonymous"] = _status("VmRSS"), _status("RssAnon")
    done = threading.Event()

    # Anonymous memory is sampled, because the kernel does not record its peak.
    def sample() -> None:
        while not done.wait(0.002):
            peaks["anonymous"] = max(peaks.get("anonymous", 0), _status("RssAnon"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield peaks
    done.set()
    thread.join()
    peaks["peak"] = _status("VmHWM")


def _status(field: str) -> int:
    """Return a field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def slope(points: Iterable[tuple[float, float]]) -> float:
    """Return the slope of the line through points (x, y), by least squares."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def launch(ranks: int, script: str, python: str = sys.executable) -> list[str]:
    """Return the command that runs script on `ranks` ranks. Arguments may be appended.

    script: the `__file__` of the script.
    """
    ranks_of = ["scripts/launch.py", "--nproc-per-node", str(ranks)]
    return [python, *ranks_of, str(Path(script).resolve())]


def child(
    function: Callable[..., Any],
    *arguments: Any,
    ranks: int = 0,
    python: str = sys.executable,
    launcher: list[str] | None = None,
    what: str = "",
    **how: Any,
) -> Any:
    """Call a benchmark's function in a process of its own, or on so many ranks. Returns what it
    returns, of ranks the list of what each returns; or a string with the reason where it failed.

    arguments: numbers, text, lists and tables. launcher: the command that runs this file, in place
    of `launch`'s. what: names the call in the message with which a failure ends the benchmark then.
    how: see `run`.
    """
    started = launch(ranks, __file__, python) if ranks else [python, __file__]
    script = Path(str(sys.modules[function.__module__].__file__)).stem
    asked = [script, function.__name__, json.dumps(arguments)]
    found = run([*(launcher or started), *asked], **how)
    if what and isinstance(found, str):
        raise SystemExit(f"{what}: {found}")
    return found


def answer(script: str, function: str, arguments: str) -> None:
    """Do in a process that `child` has started what it asks for, and print the result as JSON: rank
    0 prints that of all ranks, and they end without the interpreter's shutdown.
    """
    import torch.distributed as dist

    found = getattr(import_module(script), function)(*json.loads(arguments))
    if not dist.is_initialized():
        print(json.dumps(found))
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        print(json.dumps(everyone), flush=True)
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)


def run(
    command: list[str],
    *,
    minutes: float,
    threads: int = 1,
    memory: int | None = None,
    env: dict | None = None,
) -> Any:
    """Run a child process. Returns the JSON of its last line, or a string with the reason where it
    failed.

    threads: of each process. memory: a limit of its data segment, in bytes.
    """

    def limit() -> None:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    own = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **(env or {}), **own}
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=limit
    )
    try:
        printed, errors = child.communicate(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        child.terminate()  # not kill, so that a launcher can end its ranks
        child.communicate()
        return f"not finished after {minutes:g} minutes"
    if child.returncode == 0:
        return json.loads(printed.splitlines()[-1])
    memory_words = ("can't allocate memory", "MemoryError", "bad_alloc")
    out_of_memory = child.returncode < 0 or any(word in errors for word in memory_words)
    if out_of_memory:
        return "out of memory"
    # torchrun's own report ends in a line of signs.
    lines = errors.strip().splitlines() or [f"exit {child.returncode}"]
    named = [line for line in lines if re.search(r"(Error|Exception): \S", line)]
    return lines[-1] if re.search("[a-z]", lines[-1]) or not named else named[-1]


if __name__ == "__main__":
    answer(*sys.argv[1:])
