"""Real gloo ranks for the tests: `run_on_ranks(2, fn, *args)` calls `fn` on two processes and
returns both results.

Importing torch and transformers costs seconds. So one server imports them once (preload.py), all
ranks are forks of it, and the ranks of a world size stay alive between calls.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[1]
_SEARCH_PATH = [str(_TESTS), str(_TESTS.parent)]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["helpers.preload"])
_STARTUP_SECONDS = 120.0
_GRACE_SECONDS = 2.0
_MAX_THREADS = 64
_IDLE_SECONDS = 10.0
"""Ranks with more threads are replaced after a call, and so are those that have not been called for
so long while others were. Each gloo group that a call makes leaves three threads for the life of
the rank, one of which wakes a hundred times a second: 1,000 groups take a core, in idle ranks too.
New ranks take a few hundredths of a second of it each.
"""


class RankFailure(Exception):
    """A rank raised or died. `failures` maps each such rank to its traceback or exit code, the
    first to fail first.
    """

    def __init__(self, failures: dict[int, str], still_running: list[int]) -> None:
        self.failures = failures
        parts = [f"{len(failures)} rank(s) failed"]
        parts += [f"--- rank {rank} ---\n{text.rstrip()}" for rank, text in failures.items()]
        if still_running:
            parts.append(
                f"--- still running {_GRACE_SECONDS:g} s later, killed: ranks {still_running} ---"
            )
        super().__init__("\n".join(parts))


class RankTimeout(Exception):
    """A rank did not finish in time. `stacks` maps every rank, finished or not, to the Python
    stacks of its threads.
    """

    def __init__(self, timeout: float, stacks: dict[int, str], still_running: list[int]) -> None:
        self.stacks = stacks
        parts = [f"ranks {still_running} still running after {timeout:g} s"]
        for rank, stack in stacks.items():
            state = "running" if rank in still_running else "finished"
            parts.append(f"--- rank {rank} ({state}) ---\n{stack.rstrip()}")
        super().__init__("\n".join(parts))


def run_on_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on `world_size` CPU ranks with a gloo default group; return the
    results by rank. With --cuda each of them has a device of tests/cuda.

    `fn` is a module-level function; arguments and results travel by pickle, tensors by value (a
    view with its whole storage). Ranks are mostly reused: whatever `fn` sets for the process (seed,
    environment, working directory) stays set, and what the parent sets after their start does not
    reach them. `timeout` is in seconds and excludes their start.

    Raises RankFailure when a rank raises or dies, RankTimeout when one does not finish. Either way
    these ranks are killed, and the next call starts new ones: ranks that stopped at different
    collectives are of no further use.
    """
    request = pickle.dumps((fn, args, kwargs))
    _close_idle(but=world_size)
    try:
        if world_size not in _POOLS:
            _POOLS[world_size] = _Pool(world_size)
            _POOLS[world_size].collect(_STARTUP_SECONDS)
        _POOLS[world_size].send(request)
        results = _POOLS[world_size].collect(timeout)
        if _POOLS[world_size].threads() > _MAX_THREADS:
            _POOLS.pop(world_size).close()
        return results
    except BaseException:
        if world_size in _POOLS:
            _POOLS.pop(world_size).close()
        raise


def _close_idle(*, but: int) -> None:
    oldest = time.monotonic() - _IDLE_SECONDS
    for size in [size for size, pool in _POOLS.items() if size != but and pool.used_at < oldest]:
        _POOLS.pop(size).close()


def close_pools() -> None:
    """End all ranks. The next call of `run_on_ranks` starts new ones."""
    while _POOLS:
        _POOLS.popitem()[1].close()


class _Pool:
    """The processes of one world size, a pipe to each, and a folder with the rendezvous file and
    the stack dumps.
    """

    def __init__(self, world_size: int) -> None:
        _start_server()
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.connections: list[Connection] = []
        self.used_at = time.monotonic()
        port = _free_port()
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe()
            _stack_file(self.folder.name, rank).touch()
            # Not daemonic: a daemonic process may not have children, and data loaders and async
            # checkpoints do.
            process = _CONTEXT.Process(
                target=_serve, args=(rank, world_size, port, self.folder.name, theirs)
            )
            self.connections.append(ours)
            process.start()
            self.processes.append(process)
            theirs.close()  # else the death of the rank would not end the stream

    def send(self, request: bytes) -> None:
        for connection in self.connections:
            with contextlib.suppress(ConnectionError):  # a dead rank: collect() reports it
                connection.send_bytes(request)

    def collect(self, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(enumerate(self.connections))
        while waiting and (
            ready := wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))
        ):
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                del waiting[rank]
                succeeded, value = self._receive(rank)
                (results if succeeded else failures)[rank] = value
                if not succeeded:  # the others may wait in a collective for this rank, forever
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if failures:
            raise RankFailure(failures, list(waiting))
        if waiting:
            raise RankTimeout(timeout, self.stacks(), list(waiting))
        self.used_at = time.monotonic()
        return [results[rank] for rank in range(len(self.connections))]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            reply = self.connections[rank].recv_bytes()
        except (EOFError, OSError):
            self.processes[rank].join(_GRACE_SECONDS)
            return False, f"died with exit code {self.processes[rank].exitcode}"
        return pickle.loads(reply)

    def threads(self) -> int:
        """Return the most threads of a rank; 0 where the system does not tell (no /proc)."""
        tasks = (Path(f"/proc/{process.pid}/task") for process in self.processes)
        return max(len(list(folder.iterdir())) if folder.is_dir() else 0 for folder in tasks)

    def stacks(self) -> dict[int, str]:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        return {
            rank: _read_stack(_stack_file(self.folder.name, rank))
            for rank in range(len(self.processes))
        }

    def close(self) -> None:
        for process in reversed(self.processes):  # rank 0 last: it may have the others' store
            process.kill()
        for process in self.processes:
            process.join()
            process.close()
        for connection in self.connections:
            connection.close()
        self.folder.cleanup()


_POOLS: dict[int, _Pool] = {}
# Runs before multiprocessing's own exit handler, registered at import above, which would wait for
# the ranks forever.
atexit.register(close_pools)


def _start_server() -> None:
    """Start the process that all ranks are forks of, unless it runs. It takes no search path."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*_SEARCH_PATH, *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _serve(rank: int, world_size: int, port: int, folder: str, connection: Connection) -> None:
    """A rank's life: start, report that, then answer one request after the other until the parent
    is gone.
    """
    with open(_stack_file(folder, rank), "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
        # Ctrl-C is the parent's to handle; it ends the ranks.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_die_with_parent, args=(folder,), daemon=True).start()
        _allow_many_open_files()
        connection.send_bytes(_reply(_start, rank, world_size, port, folder))
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                connection.send_bytes(_reply(_answer, connection.recv_bytes()))


def _start(rank: int, world_size: int, port: int, folder: str) -> None:
    sys.path[:0] = [path for path in _SEARCH_PATH if path not in sys.path]
    os.environ.update(
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
        }
    )
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    on_device = os.environ.get("FAKECUDA") == "1"
    if not on_device:
        # gloo ranks: a mesh that finds a GPU would be a CUDA mesh. Also where the parent tests one.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    import torch.distributed as dist

    if on_device:
        import fakecuda

        fakecuda.read_settings()
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)  # ranks share the machine's few cores
    # A file rather than the port: a port found free may be taken by the time the rank binds it.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )


def _answer(request: bytes) -> Any:
    import torch.distributed as dist

    fn, args, kwargs = pickle.loads(request)
    result = fn(*args, **kwargs)
    assert dist.is_initialized(), (
        f"{fn.__name__} destroyed the default process group, which the next call needs"
    )
    return result


def _reply(fn: Callable[..., Any], *args: Any) -> bytes:
    """(True, result) or (False, traceback). Plain pickle: multiprocessing's own shares tensors by
    file descriptor.
    """
    try:
        return pickle.dumps((True, fn(*args)))
    except (
        BaseException
    ):  # SystemExit too: a rank that leaves is a failure to report, not a process to lose
        return pickle.dumps((False, traceback.format_exc()))


def _die_with_parent(folder: str) -> None:
    """End this rank with the parent, also out of a collective, where nobody reads the pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _allow_many_open_files() -> None:
    """Each gloo group that a call makes keeps its sockets open for the life of the rank.

    Destroying the groups after the call is no way out: DTensor's caches go on using an equal mesh
    of an earlier call.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS: "unlimited" is more than it allows
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"stack-{rank}.txt"


def _read_stack(path: Path) -> str:
    """Read a dump once it stops growing: faulthandler writes from a signal handler and does not say
    when it is done.
    """
    text, deadline = "", time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.05)
        newest = path.read_text()
        if newest and newest == text:
            break
        text = newest
    return text or "(no stack: the rank died, or had not begun to run)"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
