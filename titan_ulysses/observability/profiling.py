"""Shows where the time and memory of chosen steps go: traces of the torch profiler, and snapshots
of the CUDA allocator.

Each rank writes one file to `<run>/<folder>/step-N/`, where N is the last step in the file. A
resumed run profiles the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from titan_ulysses.config.schema import Profiling
from titan_ulysses.distributed.errors import UserError

_MOST_EVENTS = 100_000
"""The number of allocations and releases that a snapshot contains at most."""
StepIsOver = Callable[[int], None]


def check_profiling(config: Profiling, device_type: str) -> None:
    """Raise UserError where a setting asks for what this type of device does not have."""
    if config.enable_memory_snapshot and device_type != "cuda":
        raise UserError(
            "profiling.enable_memory_snapshot = true: a snapshot is of CUDA's allocator, and this "
            f"run is on {device_type}. Set it to false."
        )


@contextmanager
def profiled(config: Profiling, run: Path, first_step: int) -> Iterator[StepIsOver]:
    """Profile the steps in this context as config says.

    Yields a function that must be called after each step with the step's number. first_step is the
    number of the first step in this context.
    """
    with ExitStack() as stack:
        profilers: list[StepIsOver] = []
        if config.enable_profiling:
            traces = _traces(config, run / config.save_traces_folder, first_step)
            profilers.append(stack.enter_context(traces))
        if config.enable_memory_snapshot:
            folder = run / config.save_memory_snapshot_folder
            snapshots = _snapshots(config.profile_freq, folder, first_step)
            profilers.append(stack.enter_context(snapshots))

        def step_is_over(step: int) -> None:
            for profiler in profilers:
                profiler(step)

        yield step_is_over


@contextmanager
def _traces(config: Profiling, folder: Path, first_step: int) -> Iterator[StepIsOver]:
    """Trace the last profiler_active of every profile_freq steps. The profiler_warmup steps before
    them are traced and discarded.
    """
    warmup, active = config.profiler_warmup, config.profiler_active
    plan = schedule(wait=config.profile_freq - warmup - active, warmup=warmup, active=active)
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    written = first_step - 1

    def write(profiler: profile) -> None:
        nonlocal written
        finished = first_step - 1 + profiler.step_num
        # The profiler may also call this at its end, just after a trace has been written.
        if finished > written:
            profiler.export_chrome_trace(str(_file(folder, f"step-{finished}", "trace.json")))
            written = finished

    with profile(
        activities=[ProfilerActivity.CPU, *gpu],
        schedule=lambda index: plan(first_step - 1 + index),
        on_trace_ready=write,
    ) as profiler:
        yield lambda _: profiler.step()


@contextmanager
def _snapshots(every: int, folder: Path, first_step: int) -> Iterator[StepIsOver]:
    """Write a snapshot every `every` steps, and when memory runs out.

    Snapshots can be viewed at pytorch.org/memory_viz.
    """
    torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)
    finished = first_step - 1

    def step_is_over(step: int) -> None:
        nonlocal finished
        finished = step
        if step % every == 0:
            torch.cuda.memory._dump_snapshot(
                str(_file(folder, f"step-{step}", "memory_snapshot.pickle"))
            )

    try:
        yield step_is_over
    except torch.OutOfMemoryError:
        file = _file(folder, f"step-{finished + 1}-out-of-memory", "memory_snapshot.pickle")
        torch.cuda.memory._dump_snapshot(str(file))
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _file(folder: Path, step: str, name: str) -> Path:
    (folder / step).mkdir(parents=True, exist_ok=True)
    return folder / step / f"rank{dist.get_rank()}_{name}"
