"""Plan a run while the run starts: `python -m titan_ulysses.plan`, a separate process beside it.

The process reads a request (one line of JSON, see `train/preflight.py`) from standard input and
prints the plan as one line of JSON. If standard input is closed first, the run has ended, and the
process ends too.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from titan_ulysses.config.schema import Config
from titan_ulysses.distributed.hardware import GIB, GPUS, gpu_of_device
from titan_ulysses.plan.names import component_name
from titan_ulysses.plan.planner import Setup, make_plan, resolve_for_plan
from titan_ulysses.plan.report import as_json
from titan_ulysses.plan.simulate import simulate
from titan_ulysses.setup.resolve import resolve


def main() -> None:
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    values = _plan_for_cpu(request) if request["gpu_memory"] is None else _plan_for_gpu(request)
    named = {component_name(name): size for name, size in values["components"].items()}
    print(json.dumps(values | {"components_in_words": named}))


def _plan_for_gpu(request: dict[str, Any]) -> dict[str, Any]:
    spec = resolve_for_plan(
        Config.model_validate(request["config"]), world_size=request["world_size"]
    )
    gpu = gpu_of_device(request["gpu"]) or GPUS["H100-80GB"]
    plan = make_plan(Setup(spec, gpu, request["gpu_memory"], request["host_memory"]))
    return as_json(plan)


def _plan_for_cpu(request: dict[str, Any]) -> dict[str, Any]:
    """Plan the memory of a run on CPUs, where device memory and host memory are the same memory."""
    config = Config.model_validate(request["config"])
    spec = resolve(config, world_size=request["world_size"], device_type="cpu")
    simulation = simulate(spec, cuda=None)
    peak = simulation.memory.peak("device", "host", first=simulation.start)
    ranks, live, free = request["ranks"], peak.bytes / GIB, request["host_memory"] / GIB
    return {
        "live_gib": live,
        "ranks": ranks,
        "host_memory_gib": free,
        "fits": ranks * live <= free,
        "components": {name: size / GIB for name, size in peak.components.items()},
    }


def _end_with_the_run() -> None:
    """End this process when the run ends.

    The operating system closes the run's end of the pipe, whatever ends the run.
    """
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
