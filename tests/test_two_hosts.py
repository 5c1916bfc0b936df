"""Two hosts, two ranks on each, through the launcher's own line: as exact as one process; and when
the link is cut, a host dies or comes back, each that is alive says so, ends in time, and loses
nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from helpers.hosts import INTERFACE, Running, ended, two_hosts
from helpers.ranks import run_on_ranks
from helpers.runs import Settings, learned, train, write_run

STARTED = 240.0
"""Seconds until something must have happened that waits for a start on both hosts."""
SETTINGS: Settings = {
    "lr_scheduler.decay_type": "constant",
    "checkpoint.interval": 10,
}


def flags(settings: Settings) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def near(one: list, other: list) -> bool:
    """The same steps with the same losses, but for the order in which fp32 sums are added."""
    return [step for step, *_ in one] == [step for step, *_ in other] and all(
        loss == pytest.approx(same, abs=1e-6)
        for (_, loss, _), (_, same, _) in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs"))


def outputs(config: Path, name: str) -> Path:
    return config.parent / "outputs" / name


LAYOUTS: dict[str, Settings] = {
    "dp across, sp inside": {"parallelism.sequence_parallel_degree": 2},
    "sp across": {"parallelism.sequence_parallel_degree": 4},
    "replicas across": {"parallelism.data_parallel_replicate_degree": 2},
}
FEW: Settings = SETTINGS | {"training.steps": 6, "checkpoint.enable": False}


@pytest.fixture(scope="module")
def layouts(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What both hosts have said of runs with each layout."""
    runs = [json.dumps(FEW | {"job.name": name} | more) for name, more in LAYOUTS.items()]
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        line = ["tests/helpers/several.py", str(config), *runs]
        results = ended([start(host, hosts, *line) for host in hosts], within=STARTED)
    assert [one.code for one in results] == [0, 0], results
    return [one.out for one in results]


def start(host, hosts, *command: str) -> Running:
    return host.start(
        sys.executable,
        "scripts/launch.py",
        "--nnodes=2",
        f"--node-rank={hosts.index(host)}",
        f"--master-addr={hosts[0].address}",
        "--master-port=29500",
        "--nproc-per-node=2",
        *command,
        GLOO_SOCKET_IFNAME=INTERFACE,
    )


@pytest.fixture(scope="module")
def alone(config: Path) -> list[tuple[int, float, float]]:
    """The same run on one process."""
    run_on_ranks(1, train, config, FEW | {"job.name": "alone"})
    return learned(outputs(config, "alone"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_as_exact_as_one_process(name, config, layouts, alone) -> None:
    print(learned(outputs(config, name)), alone)
    assert near(learned(outputs(config, name)), alone)
