"""The plan of a run that starts, made by a separate process; and what to lower if memory is out.

The planner needs a default process group of its own, and the run's process already has one.

    preflight = start_preflight(state)               before weights are filled; None but on rank 0
    preflight.lines()                                before the first step: the plan
    preflight.planned_seconds                        after the first step: that of a step
    preflight.news()                                 later: the plan, if it was not ready then
    preflight.measured(peak_gib)                     after some steps: measured beside planned
    preflight.close()                                at the end
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from titan_ulysses.config.schema import Config
from titan_ulysses.distributed.device import module_of
from titan_ulysses.distributed.errors import UserError, one_line
from titan_ulysses.launch.nodes import ranks_per_node
from titan_ulysses.memory.offload import available_host_memory
from titan_ulysses.observability.units import size_text, time_text
from titan_ulysses.train.step import TrainState
from titan_ulysses.ulysses.cores import varlen
from titan_ulysses.ulysses.kernels import active

_TIMEOUT_S = 30.0
"""Seconds that the first step waits for a plan that is not ready."""
_ENFORCE_TIMEOUT_S = 300.0
_LEAST_TIMEOUT_S = 600.0
"""Of ranks that wait for one another, as long as writing a checkpoint may take."""
_SMALL = 0.02
"""Share of the host's free memory.

On a CPU, if weights and optimizer take less, a plan is not worth the seconds that it costs.
"""
_OF_CPU = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
_REMEDIES = {
    "parameters": "use more ranks (parallelism.data_parallel_shard_degree), or set "
    "memory.parameter_offload = true",
    "optimizer state": 'set memory.optimizer_offload = true, or optimizer.name = "adamw8bit"',
    "checkpoints": 'set activation_checkpoint.offload = "host"',
    "loss head": "lower memory.loss_tile_tokens",
    "MLP": "lower memory.mlp_tile_tokens",
}
"""What lowers a component of the plan most."""
_ALWAYS = (
    "lower training.seq_len or training.local_batch_size, or raise "
    "parallelism.sequence_parallel_degree"
)


def start_preflight(state: TrainState) -> Preflight | None:
    """Start to plan a run, on rank 0, while its weights are filled."""
    if dist.get_rank() or state.config.model.vision != "off":  # the planner knows no tower
        return None
    device, parameters = state.mesh.device, state.model.parameters()
    gpu = None if device.type == "cpu" else module_of(device).get_device_properties(device)
    return Preflight(
        state.config,
        world_size=dist.get_world_size(),
        # 16 bytes: parameter, gradient and two moments in fp32.
        model_bytes=sum(p.numel() * (16 if p.requires_grad else p.itemsize) for p in parameters),
        gpu_memory=gpu and gpu.total_memory,
        gpu=gpu.name if gpu else "",
        attention_kernel=active() if state.spec.core is varlen else "auto",
    )


def timeout_of_step(
    config: Config, preflight: Preflight | None, *, say: Callable[[str], None]
) -> float:
    """Return how long a rank waits for another one: comm.timeout_s, or what follows from the plan.

    NCCL counts from when a collective is enqueued, not from when it starts. A rank may enqueue one
    almost a step before it starts, and a step may take twice as long as planned. Twice that.
    Collective: rank 0 has the plan.
    """
    if config.comm.timeout_s > 0:
        return config.comm.timeout_s
    planned = torch.tensor(preflight.planned_seconds if preflight else 0.0, dtype=torch.float64)
    dist.broadcast(planned, src=0)
    timeout = 4 * planned.item()
    if timeout <= _LEAST_TIMEOUT_S:
        return _LEAST_TIMEOUT_S
    say(
        f"comm.timeout_s: {timeout:,.0f} s, four times the planned step of "
        f"{time_text(planned.item())}"
    )
    return timeout


class Preflight:
    """The plan of a run that is starting."""

    def __init__(
        self,
        config: Config,
        *,
        world_size: int,
        model_bytes: int,
        gpu_memory: int | None,
        gpu: str,
        attention_kernel: str = "auto",
    ):
        """Start the planner, unless the run is on a CPU and small, and plan.enforce is off.

        `model_bytes` is about what weights, gradients and optimizer take in total. `gpu_memory` is
        the memory of this GPU in bytes, None on a CPU. `gpu` is the name that CUDA has for it.
        `attention_kernel` is the one that the run takes, as in plan.attention_kernel.
        """
        self.cuda, self.enforce = gpu_memory is not None, config.plan.enforce
        self.plan: dict[str, Any] | None = None
        self._why_not = "it is not ready"
        self._reported = self._compared = False
        self._process: subprocess.Popen | None = None
        free = available_host_memory()
        if not (self.cuda or self.enforce or model_bytes > _SMALL * free):
            self._why_not = f"weights and optimizer take only {size_text(model_bytes)}"
            self._reported = True
            return
        per_node = ranks_per_node(world_size)
        host = free if config.plan.host_memory_gib == 0 else config.plan.host_memory_gib * 2**30
        values = config.model_dump()
        # What is there, not what the settings say.
        values["plan"] |= {"gpus_per_node": per_node, "attention_kernel": attention_kernel}
        request = {
            "config": values,
            "world_size": world_size,
            "ranks": per_node,
            "gpu_memory": gpu_memory,
            "gpu": gpu,
            "host_memory": host,
        }
        self._start(request)

    def _start(self, request: dict[str, Any]) -> None:
        """Start the planner and the thread that reads its plan."""
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        # Without these variables of torchrun, the planner does not join the run's process group.
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "titan_ulysses.plan"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C goes to the run alone
        )
        # The pipe stays open as long as the run lives; when it closes, the planner ends too.
        self._lifeline, self._process.stdin = self._process.stdin, None
        self._lifeline.write(json.dumps(request) + "\n")
        self._lifeline.flush()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def lines(self) -> list[str]:
        """Return what to print before the first step.

        Waits for the plan: 30 s at most, or 300 s at most if it is to be enforced.
        """
        if self._process:
            patience = _ENFORCE_TIMEOUT_S if self.enforce else _TIMEOUT_S
            self._reader.join(patience)
            if self._reader.is_alive() and not self.enforce:
                return [
                    f"plan: not ready after {patience:.0f} s (the machine is busy): it follows "
                    "when it is"
                ]
        return self._report()

    def news(self) -> list[str]:
        """Return what `lines` could not say yet, once it is known. Waits for nothing."""
        return [] if self._reported or self._reader.is_alive() else self._report()

    def close(self) -> None:
        """End the planner, if it is still running."""
        if self._process:
            self._process.kill()
            self._reader.join()

    def _report(self) -> list[str]:
        self._reported = True
        if self.plan is None:
            return [
                f"plan: not made: {self._why_not}. `python train.py --plan` with these settings "
                "makes one."
            ]
        p = self.plan
        parts = ", ".join(
            f"{name} {_gib(size)}" for name, size in list(p["components"].items())[:4]
        )
        if not self.cuda:
            return [
                f"plan: {_gib(p['live_gib'])} of tensors at the peak of a rank ({parts})",
                f"      {_gib(p['ranks'] * p['live_gib'])} on this node, "
                f"{_gib(p['host_memory_gib'])} are free",
            ]
        lines = [
            f"plan: {_gib(p['gpu_peak_gib'])} of {_gib(p['gpu_memory_gib'])} at the peak of a GPU "
            f"({parts})",
            f"      host memory {_gib(p['host_peak_gib'])} a node; a step "
            f"{time_text(p['step_seconds'])}"
            + ("" if p["fits"] else f"; it does not fit: {p['binds']}"),
        ]
        if (inside := p["exchange_seconds_inside_node"]) is not None:
            lines.append(
                f"      the exchange across nodes takes {time_text(p['seconds']['exchange'])} of a "
                f"step; inside a node it would take {time_text(inside)}"
            )
        return lines

    def obstacle(self) -> str | None:
        """Return why the run must not start, if plan.enforce is set; None if it may start."""
        if not self.enforce:
            return None
        if self.plan is None:
            return (
                f"plan.enforce = true, and there is no plan: {self._why_not}. `train.py --plan` "
                "says more."
            )
        if self.plan["fits"]:
            return None
        if not self.cuda:
            return (
                "plan.enforce = true: the run needs "
                f"{_gib(self.plan['ranks'] * self.plan['live_gib'])} of tensors on this node, and "
                f"{_gib(self.plan['host_memory_gib'])} are free. Lower training.seq_len, or set "
                "plan.enforce = false."
            )
        return (
            f"plan.enforce = true: the run does not fit ({self.plan['binds']}): "
            f"{_gib(self.plan['gpu_peak_gib'])} a GPU, {_gib(self.plan['host_peak_gib'])} of host "
            "memory a node. `train.py --plan` says what helps."
        )

    @property
    def planned_gib(self) -> float | None:
        """The planned peak of tensors on the GPU, in GiB.

        None if there is no plan, or on a CPU, where no allocator measures the peak.
        """
        return self.plan["gpu_tensors_gib"] if self.plan is not None and self.cuda else None

    @property
    def planned_seconds(self) -> float:
        """The planned seconds of a step on the GPU; 0 if there is no plan yet, or on a CPU."""
        return self.plan["step_seconds"] if self.plan is not None and self.cuda else 0.0

    def measured(self, peak_gib: float, *, counts_files: bool = False) -> list[str]:
        """Return, on the first call, the measured peak next to the planned one.

        On a CPU the line also says why they differ. `counts_files` says whether the peak includes
        mapped files (see `PeakMemory`).
        """
        if self.plan is None or self._compared:
            return []
        self._compared = True
        planned = self.planned_gib
        if planned is not None:
            off = f"{peak_gib / planned - 1:+.1%}"
            return [f"plan: {_gib(planned)} of tensors planned, {_gib(peak_gib)} measured ({off})"]
        what = (
            "all that is in memory, with files that are mapped"
            if counts_files
            else "all memory of its own"
        )
        return [
            f"plan: {_gib(self.plan['live_gib'])} of tensors planned; a rank's process has peaked "
            f"at {_gib(peak_gib)}: {what}, so besides tensors it counts Python, its libraries, "
            "and memory that the allocator has not returned"
        ]

    def components(self) -> str:
        """Return the planned components, for a user whose run is out of memory."""
        if self.plan is None:
            return ""
        parts = "\n".join(
            f"  {_gib(size):>11}  {name}" for name, size in self.plan["components_in_words"].items()
        )
        return f"What the plan says is alive at the peak:\n{parts}"

    def _read(self) -> None:
        """Wait for the planner to end, and keep its plan or the reason why there is none."""
        output, errors = self._process.communicate()
        self._lifeline.close()
        if self._process.returncode == 0:
            self.plan = json.loads(output.splitlines()[-1])
        else:
            self._why_not = (
                errors.strip().splitlines() or ["the planner ended without a message"]
            )[-1]


def _gib(gib: float) -> str:
    return size_text(gib * 2**30)


@contextmanager
def explained_out_of_memory(
    part: Callable[[], str], preflight: Callable[[], Preflight | None]
) -> Iterator[None]:
    """Turn an error for lack of memory into a UserError that says what to lower.

    part: returns what the run is in, in words; preflight: returns its plan. Both are called then.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(error, part(), preflight()) from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _OF_CPU):
            raise
        raise _out_of_memory(error, part(), preflight()) from error


def _out_of_memory(error: BaseException, part: str, preflight: Preflight | None) -> UserError:
    place = "GPU" if isinstance(error, torch.OutOfMemoryError) else "host"
    plan = preflight.plan if preflight else None
    remedies, components = [], ""
    if preflight and plan is not None:
        remedies = [_REMEDIES[name] for name in plan["components"] if name in _REMEDIES][:2]
        components = f"\n{preflight.components()}"
    return UserError(
        f"out of {place} memory in {part or 'the start'} ({one_line(error)}). To need less, "
        f"{'; '.join([*remedies, _ALWAYS])}. `train.py --plan` says what fits.{components}"
    )
