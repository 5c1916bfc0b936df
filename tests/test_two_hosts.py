"""Two hosts, two ranks on each, through the launcher's own line: as exact as one process; and when
the link is cut, a host dies or comes back, each that is alive says so, ends in time, and loses
nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers.forked import address
from helpers.hosts import (
    Ended,
    Host,
    Running,
    clone,
    cut,
    ended,
    mend,
    printed,
    two_hosts,
    without_namespaces,
)
from helpers.ranks import run_on_ranks
from helpers.runs import Settings, learned, train, write_run

Hosts = tuple[Host, Host]
Lines = list[tuple[int, float, float]]
TIMEOUT = 15.0
BOUND = TIMEOUT + 10
"""Seconds from what has happened until all that are alive have ended."""
START = 180.0
"""Seconds until something must have happened that waits for a start on both hosts."""
SETTINGS: Settings = {"lr_scheduler.decay_type": "constant", "checkpoint.interval": 6}
LONG: Settings = SETTINGS | {
    "parallelism.sequence_parallel_degree": 2,
    "comm.timeout_s": TIMEOUT,
    "training.steps": 100_000,
}
"""dp across, sp inside; until something happens to it."""
STEPS = 20

# What notices first decides which of them is printed: a collective, or the watch of the store.
SILENT = r"has not answered within comm.timeout_s|has given no sign of life"
CUT = rf"{SILENT}|is gone or out of reach"
DIED = rf"another rank.* died without a message|{SILENT}"
STORE_DIED = rf"{DIED}|(the first host, \S+,|rank 0 on \S+) is"
NAMED = r"rank [23] on host-two (.*died without a message|gives no sign|has given no sign)"
"""Said by the host that is left, where hosts have names: who is gone, and from where."""

FORKED = Path(__file__).parent / "helpers" / "forked.py"


def forks() -> dict[str, str]:
    """The environment with which launcher and ranks are forks. Where both hosts are this machine
    they are none: one that is killed is known by the environment that it was started with.
    """
    if without_namespaces() is not None:
        return {}
    return {"PYTHON_WITH": str(FORKED), "FORKS": address()}


linked = pytest.mark.skipif(
    without_namespaces() is not None, reason=f"no cable to cut: {without_namespaces()}"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("clone") / "clone") / "scripts"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture(scope="module")
def alone(config: Path) -> Lines:
    """The same run on one process."""
    settings = SETTINGS | {"job.name": "alone", "training.steps": STEPS}
    run_on_ranks(1, train, config, settings | {"checkpoint.enable": False}, timeout=START)
    return learned(outputs(config, "alone"))


def outputs(config: Path, name: str) -> Path:
    return config.parent / "outputs" / name


def losses(lines: Lines) -> list[tuple[int, object]]:
    """(step, loss), equal to others but for the order in which fp32 sums are added."""
    return [(step, pytest.approx(loss, abs=1e-6)) for step, loss, _ in lines]


def flags(settings: Settings) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


class Launcher:
    """Starts runs of one config on the hosts, with the line of docs/many-nodes.md."""

    def __init__(self, scripts: Path, hosts: Hosts, config: Path):
        self.scripts, self.hosts, self.config = scripts, hosts, config
        self.run = outputs(config, "run")

    def start(self, settings: Settings, *, host: Host, of: str = "2", **more: str) -> Running:
        """Start the ranks of one host; `of`: how many hosts there are, as multinode.sh has it."""
        line = [of, str(self.hosts.index(host)), self.hosts[0].address, host.interface]
        self.run = outputs(self.config, settings.get("job.name", "run"))
        script = self.scripts / "multinode.sh"
        return host.start("bash", script, *line, self.config, *flags(settings), NPROC="2", **more)

    def start_both(self, settings: Settings, *, of: str = "2", **more: str) -> list[Running]:
        return [self.start(settings, host=host, of=of, **more) for host in self.hosts]

    def logged(self) -> Lines:
        return learned(self.run) if (self.run / "metrics.jsonl").exists() else []

    def wait_for(self, runs: list[Running], reached: Callable[[Lines], bool]) -> None:
        """Until something is logged."""
        deadline = time.monotonic() + START
        while not reached(self.logged()):
            assert all(run.is_running() for run in runs), printed(runs)
            if time.monotonic() > deadline:
                ended(runs, within=0)
            time.sleep(0.005)


@pytest.fixture(scope="module")
def launcher(scripts: Path, hosts: Hosts, config: Path) -> Launcher:
    return Launcher(scripts, hosts, config)


# --- the layouts ----------------------------------------------------------------------------------

LAYOUTS: dict[str, Settings] = {
    "dp across, sp inside": {"parallelism.sequence_parallel_degree": 2},
    "sp across": {"parallelism.sequence_parallel_degree": 4},
    "replicas across": {
        "parallelism.data_parallel_replicate_degree": 2,
        "training.local_batch_size": 1,
    },
}
FEW = 3


@pytest.fixture(scope="module")
def layouts(config: Path, hosts: Hosts, scripts: Path) -> list[str]:
    """What both hosts have said of runs with each layout, one after the other."""
    short = SETTINGS | {"training.steps": FEW, "checkpoint.enable": False}
    runs = [json.dumps(short | {"job.name": name} | more) for name, more in LAYOUTS.items()]
    started = [
        host.start(
            scripts.parent / ".venv" / "bin" / "python",
            "scripts/launch.py",
            "--nnodes=2",
            f"--node-rank={rank}",
            f"--master-addr={hosts[0].address}",
            "--master-port=29510",
            "--nproc-per-node=2",
            "tests/helpers/several.py",
            config,
            *runs,
            GLOO_SOCKET_IFNAME=host.interface,
            **forks(),
        )
        for rank, host in enumerate(hosts)
    ]
    results = ended(started, within=START)
    assert [result.code for result in results] == [0, 0], printed(started)
    return [result.out for result in results]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_as_exact_as_one_process(
    name: str, config: Path, layouts: list[str], alone: Lines
) -> None:
    found = [(step, loss) for step, loss, _ in learned(outputs(config, name))]
    assert found == losses(alone[:FEW])


def test_a_sequence_across_hosts_is_named(layouts: list[str]) -> None:
    """In the summary of that run alone, and on rank 0 alone."""
    warning = "parallelism.sequence_parallel_degree = 4 spans nodes of 2 rank(s)"
    assert layouts[0].count("spans nodes") == layouts[0].count(warning) == 1
    assert "spans nodes" not in layouts[1]


# --- what happens to a run, one after the other ---------------------------------------------------
#
# Each begins where the last one has ended, so that a start on both hosts serves two tests: it goes
# on from the checkpoint of the run before, and something happens to it.


class Episode(NamedTuple):
    results: list[Ended]
    seconds: list[float]
    """From what has happened until each host has ended."""
    lines: Lines
    """All that has been logged."""

    def said(self) -> str:
        """Each host's exit code, seconds from what happened to its end, and last lines."""
        return "".join(
            f"--- exit code {one.code} after {seconds:.1f} s\n{one.out[-2000:]}"
            for one, seconds in zip(self.results, self.seconds, strict=True)
        )

    def said_once(self, host: int, message: str) -> bool:
        """Whether a host has ended in time, with exit code 1 and this message alone."""
        out = self.results[host].out
        errors = [line for line in out.splitlines() if line.startswith("error:")]
        told = len(errors) == 1 and re.search(message, errors[0]) and "Traceback" not in out
        return bool(told) and self.results[host].code == 1 and self.seconds[host] < BOUND


def episode(launcher: Launcher, *, until: int, happens: Callable[[], float]) -> Episode:
    """A run on both hosts until a step is logged and something happens."""
    runs = launcher.start_both(LONG, **forks())
    launcher.wait_for(runs, lambda lines: bool(lines) and lines[-1][0] >= until)
    at = happens()
    results = ended(runs, within=3 * BOUND)
    return Episode(results, [result.at - at for result in results], launcher.logged())


def killed(*hosts: Host) -> float:
    at = time.monotonic()
    for host in hosts:
        host.kill()
    return at


@pytest.fixture(scope="module")
def after_cut(launcher: Launcher, hosts: Hosts) -> Episode:
    """The link is cut a step after the first checkpoint, and mended when both have ended.

    Where there is none to cut, both hosts are killed.
    """
    if without_namespaces() is not None:
        return episode(launcher, until=7, happens=lambda: killed(*hosts))
    found = episode(launcher, until=7, happens=lambda: cut(*hosts))
    mend(*hosts)
    return found


@pytest.fixture(scope="module")
def after_store_died(launcher: Launcher, hosts: Hosts, after_cut: Episode) -> Episode:
    return episode(launcher, until=13, happens=lambda: killed(hosts[0]))


@pytest.fixture(scope="module")
def after_other_died(launcher: Launcher, hosts: Hosts, after_store_died: Episode) -> Episode:
    return episode(launcher, until=19, happens=lambda: killed(hosts[1]))


@pytest.fixture(scope="module")
def on_one_host(launcher: Launcher, hosts: Hosts, after_other_died: Episode) -> Ended:
    settings = LONG | {"training.steps": STEPS}
    return ended([launcher.start(settings, host=hosts[0], of="1", **forks())], within=START)[0]


@linked
def test_the_link_is_cut(after_cut: Episode) -> None:
    for host in (0, 1):
        assert after_cut.said_once(host, CUT), after_cut.said()


@pytest.mark.slow
def test_started_again_on_both_hosts(after_cut: Episode, after_store_died: Episode) -> None:
    """From the checkpoint, and equal to the bit in what was lost after it."""
    before, again = after_cut.lines, after_store_died.lines[: len(after_cut.lines)]
    assert before[-1][0] >= 7 and again == before
    assert re.findall(r"step +(\d+)/", after_store_died.results[0].out)[0] == "7"


def test_the_host_with_the_store_is_killed(after_store_died: Episode) -> None:
    assert after_store_died.said_once(1, STORE_DIED), after_store_died.said()


def test_the_other_host_is_killed(after_other_died: Episode) -> None:
    message = DIED if without_namespaces() is not None else NAMED
    assert after_other_died.said_once(0, message), after_other_died.said()


def test_started_again_on_one_host(
    on_one_host: Ended, launcher: Launcher, after_other_died: Episode, alone: Lines
) -> None:
    """On half of the ranks. Nothing has been lost by all that has happened to the run."""
    assert on_one_host.code == 0, on_one_host.out
    found = [(step, loss) for step, loss, _ in launcher.logged()]
    assert found == losses(alone)


# --- slow: what takes many starts, or waits -------------------------------------------------------


@linked
@pytest.mark.slow
def test_a_link_that_flaps_costs_nothing(launcher: Launcher, hosts: Hosts) -> None:
    runs = launcher.start_both(LONG | {"job.name": "flap", "comm.timeout_s": 60})
    launcher.wait_for(runs, lambda lines: len(lines) > 2)
    cut(*hosts)
    time.sleep(8)
    still = len(launcher.logged())
    mend(*hosts)
    launcher.wait_for(runs, lambda lines: len(lines) >= still + 5)
    assert all(run.is_running() for run in runs)
    for host in hosts:
        host.kill()
    out = ended(runs, within=BOUND)[0].out
    steps = [step for step, *_ in launcher.logged()]
    assert steps == [*range(1, len(steps) + 1)] and out.count("mesh: ") == 1, out


@linked
@pytest.mark.slow
def test_out_and_back_in(launcher: Launcher, hosts: Hosts, config: Path) -> None:
    """An elastic run goes on without the second host, and with it again when it is back."""
    # Steps of a second or so: the host must be back before there are hundreds.
    settings = LONG | {"job.name": "elastic", "training.global_batch_size": 256}
    first, second = launcher.start_both(settings, of="1:2")

    def meshes(shards: int) -> int:
        return first.out.count(f"mesh: dp_replicate 1 x dp_shard {shards} x sp 2")

    launcher.wait_for([first, second], lambda lines: meshes(2) == 1 and len(lines) >= 7)
    before = meshes(1)  # more than none where the second host was seconds late
    hosts[1].kill()
    launcher.wait_for([first], lambda _: meshes(1) > before)
    out = len(launcher.logged())
    launcher.wait_for([first], lambda lines: len(lines) >= out + 2)
    second = launcher.start(settings, host=hosts[1], of="1:2")
    launcher.wait_for([first, second], lambda _: meshes(2) == 2)
    back = len(launcher.logged())
    launcher.wait_for([first, second], lambda lines: len(lines) >= back + 2)
    for host in hosts:
        host.kill()
    ended([first, second], within=BOUND)
    lines = launcher.logged()
    settings = SETTINGS | {"training.global_batch_size": 256, "training.steps": len(lines)}
    run_on_ranks(1, train, config, settings | {"job.name": "elastic alone"}, timeout=600)
    assert [(step, loss) for step, loss, _ in lines] == [
        (step, pytest.approx(loss, rel=1e-5))
        for step, loss, _ in learned(outputs(config, "elastic alone"))
    ]


@linked
@pytest.mark.slow
def test_separate_folders(
    scripts: Path, config: Path, tmp_path: Path, alone: Lines, tmp_path_factory
) -> None:
    """Refused by name; or each host keeps its own shards, and a resume is exact."""
    settings = LONG | {"job.name": "separate", "training.steps": 12}
    with two_hosts(tmp_path) as hosts:
        hosts[1].has_its_own(config.parent / "outputs")
        launcher = Launcher(scripts, hosts, config)
        refused = ended(launcher.start_both(settings), within=START)
        for result in refused:
            assert result.code != 0 and "Traceback" not in result.out, result.out
            assert re.search(r"error: .*job\.dump_folder.*checkpoint\.shared", result.out, re.S)
            assert re.search(r"host-one|host-two", result.out), result.out
        settings |= {"checkpoint.shared": False}
        for steps in (12, STEPS):
            runs = launcher.start_both(settings | {"training.steps": steps})
            results = ended(runs, within=START)
            assert [result.code for result in results] == [0, 0], printed(runs)
        saved = outputs(config, "separate") / "checkpoints"
        on_two = sorted(hosts[1].do("ls", saved).split())
        assert on_two == sorted(path.name for path in saved.iterdir())
        assert f"step-{STEPS}" in on_two and not any("partial" in name for name in on_two)
    found = [(step, loss) for step, loss, _ in launcher.logged()]
    assert found == losses(alone)


# --- the hosts themselves -------------------------------------------------------------------------


@pytest.mark.parametrize("isolated", [pytest.param(True, marks=linked), False])
def test_a_hang_is_a_failure_with_all_output(tmp_path: Path, isolated: bool) -> None:
    """And a killed host has no process left, while the other lives."""
    hang = "import time; print('I hang', flush=True); time.sleep(600)"
    with two_hosts(tmp_path, isolated=isolated) as (one, two):
        runs = [host.start(sys.executable, "-c", hang) for host in (one, two)]
        deadline = time.monotonic() + 60
        while not all("I hang" in run.out for run in runs) and time.monotonic() < deadline:
            time.sleep(0.05)
        two.kill()
        assert ended(runs[1:], within=30)[0].code == -9 and runs[0].is_running()
        with pytest.raises(AssertionError, match=r"(?s)still running after 0.1 s on .*I hang"):
            ended(runs, within=0.1)
        assert runs[0].result(30) is not None


def test_without_the_right_to_make_hosts(tmp_path: Path) -> None:
    """Said in pytest's summary, with the reason."""
    for name in ("sh", "cat"):
        (tmp_path / name).symlink_to(f"/bin/{name}")
    tests = f"{__file__}::test_a_hang_is_a_failure_with_all_output"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tests],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PATH": str(tmp_path)},
        timeout=START,
    )
    assert "1 passed, 1 skipped" in done.stdout, done.stdout
    assert re.search(r"two hosts =+\n.*on loopback.*: .*unshare", done.stdout), done.stdout
