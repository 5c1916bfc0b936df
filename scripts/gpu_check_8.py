"""Check a node of eight GPUs: NCCL's memory, and steps of 128K and 1M tokens, by what takes time.

    python scripts/gpu_check_8.py               on all GPUs of the node
    python scripts/gpu_check_8.py --rehearse    the same code on two CPU ranks, with tiny shapes

Each check is a run of its own, by scripts/launch.py, and has a line, as those of gpu_check.py.
Models have Llama-3-8B's widths and few layers: time and memory of a layer do not depend on how many
there are. All results go to gpu_check_8.json too. Exits with 1 if a check has failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check import (
    REAL,
    ROOT,
    TINY,
    Check,
    Figures,
    Scale,
    check_all,
    config_of_llama,
    logged,
    run_trainer,
)

KINDS = {
    "exchange (all-to-all)": ("SendRecv", "AllToAll"),
    "FSDP": ("AllGather", "ReduceScatter"),
    "all-reduce": ("AllReduce",),
    "attention": ("flash", "fmha", "attention", "Flash"),
    "matmul": ("gemm", "nvjet", "cutlass", "cublas", "xmma"),
    "copies to the host": ("Memcpy DtoH",),
    "copies back": ("Memcpy HtoD",),
}
"""What each kind of kernel has in its name; the first that fits counts."""


def kind_of(kernel: str) -> str:
    found = (kind for kind, words in KINDS.items() if any(word in kernel for word in words))
    return next(found, "other kernels")


# --- on every rank --------------------------------------------------------------------------------


def nccl_memory(scale: Scale) -> Figures:
    """Device memory that each communicator takes, in MiB: before and after its first use.

    Groups of the same ranks may share one.
    """
    import torch
    import torch.distributed as dist

    from titan_ulysses import build_mesh
    from titan_ulysses.distributed.mesh import init_distributed

    def used() -> float:
        if scale.rehearses:
            return 0.0
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20

    init_distributed()
    world = dist.get_world_size()
    mesh = build_mesh(sequence=world)
    x = torch.ones(world, 2**20 if not scale.rehearses else 4, device=mesh.device)
    found: Figures = {"context": used()}
    loss, sp, fsdp = (one.get_group() for one in (mesh.loss, mesh.sp, mesh.fsdp))
    there, whole = torch.empty_like(x), torch.empty_like(x).flatten()
    uses: dict[str, Callable[[], Any]] = {
        "loss: all-reduce": lambda: dist.all_reduce(x[0], group=loss),
        "sp: all-to-all": lambda: dist.all_to_all_single(there, x, group=sp),
        "fsdp: all-gather": lambda: dist.all_gather_into_tensor(whole, x[0], group=fsdp),
    }
    for name, use in uses.items():
        before = used()
        use()
        found[name] = round(used() - before, 1)
    return found


def step(scale: Scale, *, tokens: int, layers: int) -> Figures:
    """Two steps on one sequence of all ranks: seconds, memory beside the plan, and a time split."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from titan_ulysses.train.trainer import Trainer

    split: Counter[str] = Counter()

    class Profiled(Trainer):
        def _step(self, batches: Any, lr: float) -> Any:
            if self.state.step == 0 or scale.rehearses:
                return super()._step(batches, lr)
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                metrics = super()._step(batches, lr)
                torch.cuda.synchronize()
            for event in profiler.key_averages():
                split[kind_of(event.key)] += event.self_device_time_total / 1e6
            return metrics

    world = int(os.environ["WORLD_SIZE"])
    folder = os.environ["GPU_CHECK_FOLDER"]
    degree = {"parallelism__sequence_parallel_degree": world}
    config = config_of_llama(scale, folder, layers=layers, tokens=tokens, **degree)
    run_trainer(config, Profiled)
    dist.barrier()
    last = logged(folder)[-1] if dist.get_rank() == 0 else {}
    found = {name: last.get(name) for name in ("loss", "step_seconds", "peak_memory_gib")}
    found["planned_memory_gib"] = last.get("planned_memory_gib")
    return found | {"seconds": {kind: round(s, 3) for kind, s in split.most_common()}}


ON_RANKS: dict[str, tuple[Check, Check]] = {
    # On GPUs, and in a rehearsal.
    "nccl_memory": (nccl_memory, nccl_memory),
    "step_128k": (partial(step, tokens=2**17, layers=8), partial(step, tokens=128, layers=2)),
    "step_1m": (partial(step, tokens=2**20, layers=2), partial(step, tokens=256, layers=2)),
}


def on_this_rank(name: str, *, rehearses: bool) -> None:
    """Run a check on this rank; rank 0 prints its figures."""
    import torch.distributed as dist

    found = ON_RANKS[name][rehearses](TINY if rehearses else REAL)
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


# --- the launcher ---------------------------------------------------------------------------------


def launched(name: str, scale: Scale) -> Figures:
    """Run a check on all GPUs, or on two CPU ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, str(ROOT / "scripts" / "launch.py"), "--standalone"),
            *("--nproc-per-node", "auto", __file__, "--rank", name),
            *(["--rehearse"] if scale.rehearses else []),
        ]
        environment = os.environ | {"GPU_CHECK_FOLDER": folder, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    assert done.returncode == 0, "\n".join([said[-1], *said[-60:]])
    return json.loads(done.stdout.strip().splitlines()[-1])


CHECKS: dict[str, tuple[Check, float]] = {
    "nccl_memory": (partial(launched, "nccl_memory"), 120),
    "step_128k": (partial(launched, "step_128k"), 300),
    "step_1m": (partial(launched, "step_1m"), 600),
}


def main(argv: list[str]) -> int:
    return check_all(argv, CHECKS, Path(__file__), str(__doc__), minutes=18)


if __name__ == "__main__":
    if "--rank" in sys.argv:
        wanted = sys.argv[sys.argv.index("--rank") + 1]
        on_this_rank(wanted, rehearses="--rehearse" in sys.argv)
    sys.exit(main(sys.argv[1:]))
