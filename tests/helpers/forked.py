"""scripts/launch.py and its ranks as forks of a process that has imported torch and transformers,
which takes seconds of a core in each process that torchrun starts.

    started = start(folder, "scripts/launch.py", "--nproc-per-node", "2", ... , "train.py", ...)
    python tests/helpers/forked.py scripts/launch.py ...       the same as a command

A fork gets what a new process would have: a session, an environment and signals of its own, and
none of the open files. All else, the launcher's own code and torchrun's, is what runs otherwise.
test_command_line.py, test_network.py and test_launchers.py have starts without forks.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
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
    server = _server()
    server.stdin.write(json.dumps(told) + "\n")
    server.stdin.flush()
    return Started(folder, int(server.stdout.readline()))


@functools.cache
def _server() -> subprocess.Popen:
    """The process that all are forks of. It ends with this one."""
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        # transformers reads HF_HUB_OFFLINE when it is imported: no fork asks the hub.
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_TESTS.parent), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    atexit.register(server.stdin.close)
    return server


# --- in the process that is forked ----------------------------------------------------------------


def _serve() -> None:
    """Fork for each line of stdin, and print the process id; when the fork has ended, write its
    exit code to `folder`.
    """
    _import_all()
    folders: dict[int, Path] = {}
    while True:
        # Nobody tells that a fork has ended: look often, while there is one.
        if select.select([0], [], [], 0.02 if folders else None)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            told = json.loads(line)
            outputs = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in told["outputs"]]
            pid = os.fork()
            if pid == 0:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.chdir(told["cwd"])
                _be(told["command"], told["env"], outputs)
            for output in outputs:
                os.close(output)
            folders[pid] = Path(told["folder"])
            print(pid, flush=True)
        for pid in [*folders]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = folders.pop(pid) / "code"
                code.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(status)))
                code.with_suffix(".new").rename(code)


def _import_all() -> None:
    # The launcher sets it before it imports torch.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    sys.path.insert(1, str(_TESTS))
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    import helpers.preload  # noqa: F401

    subprocess_handler.Popen = Fork


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
        code = run_as_main(command)
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
    logging.disable(logging.NOTSET)  # the launcher silences torchrun's own
    sys.stdout.reconfigure(write_through=True)


def run_as_main(command: list[str]) -> int:
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
        sys.exit(_serve())
    if os.path.basename(sys.argv[1]) == "launch.py":
        _import_all()
    sys.exit(run_as_main(sys.argv[1:]))
