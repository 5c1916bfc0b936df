"""scripts/launch.py and its ranks as forks of a process that has imported torch and transformers,
which takes seconds of a core in each process that torchrun starts.

    started = start(folder, "scripts/launch.py", "--nproc-per-node", "2", ... , "train.py", ...)
    FORKS=<address()> python tests/helpers/forked.py scripts/launch.py ...       as a command

The command is in the namespaces that it is started in, as on the hosts of hosts.py.

A fork gets what a new process would have: a session, an environment and signals of its own, and
none of the open files. All else, the launcher's own code and torchrun's, is what runs otherwise.
test_network.py has a start without forks; with --slow, test_command_line.py and test_launchers.py
have others.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import functools
import json
import logging
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

_TESTS = Path(__file__).resolve().parents[1]


class Started:
    """A script that `start` has started: as much of subprocess.Popen as the tests need."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder, self.pid = folder, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and (told := self.folder / "code").exists():
            self.returncode = int(told.read_text())
        return self.returncode

    def communicate(self, timeout: float = 600.0) -> tuple[str, str]:
        """All that it and its children have written to stdout and to stderr, once it has ended.

        subprocess.TimeoutExpired if it has not after so many seconds.
        """
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"{self.pid}, in {self.folder}", timeout)
            time.sleep(0.01)
        return (self.folder / "out").read_text(), (self.folder / "err").read_text()

    def wait_for(self, text: str, timeout: float = 120.0) -> str:
        """Wait until it has written this to stdout, and return all of that."""
        deadline = time.monotonic() + timeout
        while text not in (out := (self.folder / "out").read_text()):
            assert self.poll() is None and time.monotonic() < deadline, (
                f"{text!r} is not in {out}\n{(self.folder / 'err').read_text()}"
            )
            time.sleep(0.01)
        return out

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    folder: Path,
    *command: str | Path,
    cwd: Path | None = None,
    terminal: str = "",
    **env: str,
) -> Started:
    """Start a Python script with its arguments; its output goes to files in `folder`, which is
    made, or to the device of a terminal.
    """
    folder.mkdir(parents=True)
    told = {"folder": str(folder), "command": [*map(str, command)], "env": os.environ | env}
    outputs = [terminal or str(folder / name) for name in ("out", "err")]
    told |= {"outputs": outputs, "cwd": str(cwd or os.getcwd())}
    server, _ = _server()
    server.stdin.write(json.dumps(told) + "\n")
    server.stdin.flush()
    return Started(folder, int(server.stdout.readline()))


def address() -> str:
    """Where commands find the process that all are forks of."""
    return _server()[1]


@functools.cache
def _server() -> tuple[subprocess.Popen, str]:
    """The process that all are forks of, and its address. It ends with this one."""
    folder = tempfile.mkdtemp(prefix="forks-")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/address")
    listener.listen()
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(listener.fileno())],
        pass_fds=[listener.fileno()],
        # transformers reads HF_HUB_OFFLINE when it is imported: no fork asks the hub.
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _search_path(), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    listener.close()
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.stdin.close)
    return server, f"{folder}/address"


def _search_path() -> str:
    """The repository; and with --cuda the folder that loads the device when Python starts."""
    device = [str(_TESTS / "cuda" / "site")] if os.environ.get("FAKECUDA") == "1" else []
    return os.pathsep.join([*device, str(_TESTS.parent)])


def _ask(command: list[str]) -> int:
    """Run a command as a fork of the process at FORKS; return its exit code, as a shell has it."""
    told = {"command": command, "env": dict(os.environ), "cwd": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["FORKS"])
        socket.send_fds(server, [b"."], [0, 1, 2])
        server.sendall(json.dumps(told).encode())
        server.shutdown(socket.SHUT_WR)
        code = int(server.recv(16) or 1)
    return code if code >= 0 else 128 - code


# --- in the process that is forked ----------------------------------------------------------------


def _serve(listener: socket.socket) -> None:
    """Fork for each line of stdin and each connection, until stdin ends."""
    _import_all()
    folders: dict[int, Path | None] = {}
    while True:
        # Nobody tells that a fork has ended: look often, while there is one.
        ready, _, _ = select.select([0, listener], [], [], 0.02 if folders else None)
        if listener in ready:
            with listener.accept()[0] as connection:
                folders[_fork_for(connection)] = None
        if 0 in ready:
            if not (line := sys.stdin.readline()):
                return
            told = json.loads(line)
            folders[pid := _fork(told)] = Path(told["folder"])
            print(pid, flush=True)
        for pid in [*folders]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended and (folder := folders.pop(pid)):
                (folder / "new").write_text(str(os.waitstatus_to_exitcode(status)))
                (folder / "new").rename(folder / "code")


def _fork(told: dict[str, Any]) -> int:
    """Start a script whose output goes to paths; return its process id."""
    outputs = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in told["outputs"]]
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(told["cwd"])
        _be(told["command"], told["env"], outputs)
    for output in outputs:
        os.close(output)
    return pid


def _fork_for(connection: socket.socket) -> int:
    """Start a script for `_ask`, with its files and in its namespaces, and a process that waits for
    it and tells its exit code; return the id of that one.
    """
    _, files, *_ = socket.recv_fds(connection, 1, 3)
    told = json.loads(b"".join(iter(lambda: connection.recv(2**16), b"")))
    waiting = os.fork()
    if waiting:
        for file in files:
            os.close(file)
        return waiting
    try:
        _enter(connection)
        pid = os.fork()
        if pid == 0:
            os.dup2(files[0], 0)
            os.chdir(told["cwd"])
            _be(told["command"], told["env"], files[1:])
        connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    finally:
        os._exit(0)


def _enter(connection: socket.socket) -> None:
    """Enter the namespaces of the process at the other end; that of processes is for children."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    theirs = f"/proc/{struct.unpack('3i', credentials)[0]}/ns"
    kinds = [
        kind
        for kind in ("user", "net", "uts", "mnt", "pid")
        if os.readlink(f"{theirs}/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    ]
    for namespace in [os.open(f"{theirs}/{kind}", os.O_RDONLY) for kind in kinds]:
        if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
            raise OSError(ctypes.get_errno(), "setns")


def _import_all() -> None:
    # The launcher sets it before it imports torch.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    sys.path.insert(1, str(_TESTS))
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    import helpers.preload  # noqa: F401

    subprocess_handler.Popen = Fork
    # Python 3.12 and newer warn of it at each fork. torch's threads are idle then.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)


class Fork(subprocess.Popen):
    """A Python script, in a fork of this process."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        """In the place of fork and exec; the arguments are those of every Python since 3.9."""
        env, (c2pwrite, errwrite) = rest[5], (rest[12], rest[14])
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be([word for word in args[1:] if word != "-u"], env, [c2pwrite, errwrite])
        self._child_created = True


def _be(command: list[str], env: dict[str, str], outputs: list[int]) -> NoReturn:
    """Be the process of `python -u COMMAND`; outputs: its stdout and stderr, -1 as they are."""
    code = 1
    try:
        os.setsid()
        _as_new(env, outputs)
        code = _run(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _as_new(env: dict[str, str], outputs: list[int]) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, output in zip((1, 2), outputs, strict=True):
        if output != -1:
            os.dup2(output, target)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # with the launcher's connections
    os.environ.clear()
    os.environ.update(env)
    if "fakecuda" in sys.modules:
        sys.modules["fakecuda"].read_settings()
    logging.disable(logging.NOTSET)  # the launcher silences torchrun's own
    if env.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    sys.stdout.reconfigure(write_through=True)
    if (torch := sys.modules.get("torch")) is not None:
        # See `renew_threads` in scripts/gpu_check.py.
        torch.set_num_threads(torch.get_num_threads())


def _run(command: list[str]) -> int:
    """Run a script and its arguments; return the exit code that Python would have."""
    sys.argv, sys.path[0] = command, str(Path(command[0]).resolve().parent)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.exit(_serve(socket.socket(fileno=int(sys.argv[2]))))
    sys.exit(_ask(sys.argv[1:]))
