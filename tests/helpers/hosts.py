"""Two hosts on one machine: `with two_hosts(folder) as (one, two)` gives each a network, a name and
processes of its own, and a cable between them.

    run = one.start("bash", "scripts/multinode.sh", ...)
    cut(one, two); mend(one, two)          the cable is unplugged, and plugged in again
    two.kill()                             all of its processes, at once
    ended([run, ...], within=60)           how each ended; AssertionError with all output if not

A host is a set of Linux namespaces: network, name, mounts, processes. Their first process is a
`cat`, which ends when this process closes its input or ends in whatever way. With it the kernel
ends everything on the host and takes the network away: nothing is left behind.

Each host knows the other by its name, and itself as 127.0.1.1, as Debian writes it in /etc/hosts.
Where the right to make namespaces is missing, both hosts are this machine: they have no cable and
no name of their own, and meet on loopback. `without_namespaces` says why, and conftest.py prints
it.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_NAMESPACES = ("--net", "--uts", "--mount", "--pid")
_BEGIN = """
set -e
hostname {name}
mount --bind {hosts} /etc/hosts
ip link set lo up
echo begun
exec cat > /dev/null
"""
_MARK = "TEST_HOST"
"""The variable that tells the processes of two hosts apart that are one machine."""


@dataclass
class Ended:
    """How a process on a host has ended."""

    code: int
    """The exit code; -N for signal N."""
    out: str
    """What it and its children have printed, to stdout and stderr."""
    at: float
    """When, by time.monotonic()."""


class Running:
    """A process on a host."""

    def __init__(self, host: Host, process: subprocess.Popen, log: Path):
        self.host, self._process, self._log = host, process, log
        self._ended: float | None = None
        self._watch = threading.Thread(target=self._wait, daemon=True)
        self._watch.start()

    def _wait(self) -> None:
        self._process.wait()
        self._ended = time.monotonic()

    @property
    def out(self) -> str:
        return self._log.read_text(errors="replace")

    def is_running(self) -> bool:
        return self._watch.is_alive()

    def result(self, timeout: float) -> Ended | None:
        """How it ended, or None if it has not after `timeout` seconds."""
        self._watch.join(max(0.0, timeout))
        if self._ended is None:
            return None
        return Ended(self._process.returncode, self.out, self._ended)


@dataclass
class Host:
    """One of the two hosts."""

    name: str
    address: str
    """The address that the other host reaches; both hosts reach their own."""
    folder: Path
    """Of the files that belong to this host alone."""
    interface: str = "link0"
    _first: subprocess.Popen | None = None
    """Its first process. None where the host is this machine."""
    _user: tuple[str, ...] = ()
    _started: list[Running] = field(default_factory=list)

    def start(self, *command: str | Path, **environment: str) -> Running:
        """Start a command on this host, with the repository as its working directory."""
        log = self.folder / f"{len(self._started)}.log"
        with open(log, "wb") as out:
            process = subprocess.Popen(
                # nsenter leaves the working directory; without it this changes nothing.
                [*self._enter(), "sh", "-c", 'cd "$0" && exec "$@"', REPOSITORY, *command],
                env=_clean_environment() | {_MARK: str(self.folder)} | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(Running(self, process, log))
        return self._started[-1]

    def do(self, *command: str | Path) -> str:
        """Run a short command on this host; return what it prints."""
        done = subprocess.run(
            [*self._enter(), *map(str, command)], capture_output=True, text=True, timeout=30
        )
        if done.returncode:
            raise OSError(f"{self.name}: {' '.join(map(str, command))}: {done.stderr.strip()}")
        return done.stdout

    def kill(self) -> None:
        """Kill all processes of this host at once. Its kernel lives and closes their sockets."""
        if self._first:
            self.do("sh", "-c", "kill -KILL -1 || true")  # all but the first, and this one
        for pid in [] if self._first else _marked(str(self.folder)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def has_its_own(self, path: Path) -> None:
        """Give this host a folder of its own in the place of `path`, which exists."""
        assert self._first, "this machine's own files stay as they are"
        own = self.folder / "own"
        own.mkdir()
        self.do("mount", "--bind", own, path)

    def stacks(self) -> None:
        """Make all Python processes of this host print where they are, and end."""
        with suppress(OSError, subprocess.TimeoutExpired):
            if self._first:
                self.do("sh", "-c", "kill -ABRT -1 || true")
            time.sleep(1.0)

    def _enter(self) -> tuple[str, ...]:
        if self._first is None:
            return ()
        target = str(_child(self._first.pid))
        return ("nsenter", "--target", target, *self._user, *_NAMESPACES)


@contextmanager
def two_hosts(folder: Path, *, isolated: bool | None = None) -> Iterator[tuple[Host, Host]]:
    """Two hosts, with all that runs on them ended at the end.

    isolated: whether they are namespaces; None: if they can be.
    """
    isolated = without_namespaces() is None if isolated is None else isolated
    with ExitStack() as stack:
        if isolated:
            hosts = _linked(folder, stack)
        else:
            hosts = tuple(
                Host("localhost", "127.0.0.1", _made(folder / f"host-{number}"), "lo")
                for number in (1, 2)
            )
        for host in hosts:
            stack.callback(host.kill)
        yield hosts


def cut(one: Host, two: Host) -> float:
    """Unplug the cable at the second host: no packet arrives, and nobody is told. Return when."""
    _plug(two, "down")
    return time.monotonic()


def mend(one: Host, two: Host) -> None:
    """Plug the cable in again."""
    _plug(two, "up")


def _plug(host: Host, state: str) -> None:
    assert host._first, "this machine's own network stays as it is"
    host.do("ip", "link", "set", host.interface, state)


def ended(runs: Sequence[Running], *, within: float) -> list[Ended]:
    """How each has ended; where one has not `within` seconds, all are killed and AssertionError
    shows what all have printed, and the stacks of those that hang.
    """
    deadline = time.monotonic() + within
    results = [run.result(deadline - time.monotonic()) for run in runs]
    done = [result for result in results if result]
    if len(done) == len(runs):
        return done
    hanging = [run for run in runs if run.is_running()]
    for run in hanging:
        run.host.stacks()
        run.host.kill()
    names = ", ".join(run.host.name for run in hanging)
    raise AssertionError(f"still running after {within:g} s on {names}\n{printed(runs)}")


def printed(runs: Sequence[Running]) -> str:
    """What each has printed, for people."""
    return "\n".join(f"--- {run.host.name} ---\n{run.out.rstrip()}" for run in runs)


def clone(folder: Path) -> Path:
    """A clone of the repository whose scripts run with the Python of the tests, and with what
    PYTHON_WITH names as its first argument.

    Otherwise they would install a .venv, which a host without the internet cannot.
    """
    folder.mkdir()
    for name in ("scripts", "configs", "titan_ulysses", "train.py", "pyproject.toml"):
        (folder / name).symlink_to(REPOSITORY / name)
    python = _made(folder / ".venv" / "bin") / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" $PYTHON_WITH "$@"\n')
    python.chmod(0o755)
    with open(folder / "pyproject.toml") as project:
        checksum = subprocess.run(["cksum"], stdin=project, capture_output=True, text=True)
    (folder / ".venv" / "installed").write_text(f"{checksum.stdout.strip()} \n")
    return folder


@functools.cache
def without_namespaces() -> str | None:
    """Why this machine cannot have two hosts, as it said when two were tried; None if it can."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        try:
            for host in _linked(Path(folder), stack):
                host.do("true")
        except (OSError, subprocess.TimeoutExpired) as error:
            return " ".join(str(error).split())
    return None


# --- how they are made ----------------------------------------------------------------------------


def _linked(folder: Path, stack: ExitStack) -> tuple[Host, Host]:
    """Two hosts in namespaces, with a cable between them."""
    # Without the rights of root, the first host is made in a user namespace, and the second there.
    is_root = os.geteuid() == 0
    user = () if is_root else ("--user", "--preserve-credentials")
    one = Host("host-one", "10.213.0.1", _made(folder / "host-one"), _user=user)
    two = Host("host-two", "10.213.0.2", _made(folder / "host-two"), _user=user)
    _begin(one, two, ("unshare", *(() if is_root else ("--user", "--map-root-user"))), stack)
    within = () if is_root else ("nsenter", f"--target={_child(one._first.pid)}", *user)
    _begin(two, one, (*within, "unshare"), stack)
    cable = ["type", "veth", "peer", "name", two.interface, "netns", str(_child(two._first.pid))]
    outside = [part for part in one._enter() if part not in ("--pid", "--mount")]
    _run(*outside, "ip", "link", "add", one.interface, *cable)
    for host in (one, two):
        host.do("ip", "address", "add", f"{host.address}/24", "dev", host.interface)
        host.do("ip", "link", "set", host.interface, "up")
    return one, two


def _begin(host: Host, other: Host, make: tuple[str, ...], stack: ExitStack) -> None:
    """Start the first process of a host, in namespaces of its own."""
    hosts = host.folder / "hosts"
    lines = ("127.0.0.1 localhost", f"127.0.1.1 {host.name}", f"{other.address} {other.name}")
    hosts.write_text("".join(f"{line}\n" for line in lines))
    script = _BEGIN.format(name=host.name, hosts=hosts)
    first = subprocess.Popen(
        [*make, *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    stack.callback(_finish, first)
    if first.stdout.readline() != b"begun\n":
        first.kill()
        raise OSError(first.stderr.read().decode(errors="replace") or "unshare: no word")
    host._first = first


def _finish(first: subprocess.Popen) -> None:
    """End a host: its first process, and with it all that are left."""
    for pipe in (first.stdin, first.stdout, first.stderr):
        pipe.close()
    try:
        first.wait(10)
    except subprocess.TimeoutExpired:
        first.kill()  # unshare, which takes its child with it
        first.wait()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _child(parent: int) -> int:
    """The process that `parent`, an unshare, has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    if not children:
        raise OSError("the host has ended")
    return int(children[0])


def _marked(mark: str) -> list[int]:
    """The processes that have this mark in their environment."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{_MARK}={mark}".encode() in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return found


def _clean_environment() -> dict[str, str]:
    """What a user's shell has: nothing of torchrun, NCCL or gloo from where the tests run."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONFAULTHANDLER": "1",  # for `Host.stacks`
    }
