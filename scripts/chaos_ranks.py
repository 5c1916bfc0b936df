"""Runs of the trainer for the campaigns of chaos.py: forks of one process that has imported torch.

An import takes seconds, and a campaign has hundreds of runs. The ranks find each other as under
torchrun whose ranks run the store themselves (TORCH_DISABLE_SHARE_RDZV_TCP_STORE).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

_MEMORY = 8 * 2**30
"""Bytes of address space that a rank may have beyond what it begins with."""


class Ended(NamedTuple):
    """How the ranks of a run have ended."""

    codes: list[int | None]
    """Exit code of each rank, negative for a signal; None for a rank that had to be killed."""
    text: str
    """What all of them have printed."""
    seconds: float

    @property
    def hung(self) -> bool:
        return None in self.codes

    @property
    def broke(self) -> bool:
        """Whether a user sees a traceback, or a rank has crashed."""
        crashed = any(code is not None and code < 0 for code in self.codes)
        return "Traceback (most recent call last)" in self.text or crashed


def preload() -> float:
    """Import what a run needs, and return the seconds that it took."""
    started = time.perf_counter()
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported
    for name in (
        "titan_ulysses.train.trainer",
        "titan_ulysses.checkpoint.convert",
        "transformers.models.llama.modeling_llama",
        "torch.distributed.checkpoint",
        "tensorboard.summary.writer.record_writer",
        "datasets",
        "pyarrow.parquet",
        "pyarrow.json",
    ):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    return time.perf_counter() - started


def run_ranks(
    arguments: Sequence[str],
    *,
    ranks: int,
    folder: Path,
    timeout: float,
    meddle: Callable[[list[int]], None] = lambda pids: None,
    file_bytes: int = 0,
    prepare: Callable[[int], None] = lambda rank: None,
) -> Ended:
    """Run the trainer with these arguments in `folder`; end all ranks after `timeout` seconds.

    meddle: called with the process ids of the ranks, again and again while one of them runs.
    file_bytes: how large a file may become, as on a disk that is full; 0: any size. prepare: called
    with its number in each rank, before it begins.
    """
    started, files, pids = time.perf_counter(), [], []
    port = _free_port()
    sys.stdout.flush()
    for rank in range(ranks):
        files.append(folder / f"rank{rank}.txt")
        pid = os.fork()
        if pid == 0:
            _be_rank(arguments, rank, ranks, port, folder, files[-1], file_bytes, prepare)
        pids.append(pid)
    codes: dict[int, int | None] = {}
    while len(codes) < ranks and time.perf_counter() - started < timeout:
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if len(codes) < ranks:
            meddle([pid for pid in pids if pid not in codes])
            time.sleep(0.005)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # its planner and its workers too
        if pid not in codes:
            os.waitpid(pid, 0)
            codes[pid] = None
    text = "\n".join(file.read_text(errors="replace") for file in files if file.exists())
    return Ended([codes[pid] for pid in pids], text, time.perf_counter() - started)


def _be_rank(
    arguments: Sequence[str],
    rank: int,
    ranks: int,
    port: int,
    folder: Path,
    file: Path,
    file_bytes: int,
    prepare: Callable[[int], None],
) -> NoReturn:
    try:
        os.setsid()
        output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        _limit_memory()
        if file_bytes:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        os.environ |= {"HOME": str(folder), "COLUMNS": "400"}
        os.environ |= {"WANDB_MODE": "disabled", "TORCH_CPP_LOG_LEVEL": "FATAL"}
        if ranks > 1:
            os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
            os.environ |= {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ["TORCHELASTIC_RUN_ID"] = "chaos"
        prepare(rank)
        import torch

        torch.set_num_threads(1)  # again, in the fork: see `renew_threads` in gpu_check.py
        from titan_ulysses.__main__ import run
        from titan_ulysses.launch.failure import exit_on_error

        with exit_on_error():
            run(list(arguments))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _limit_memory() -> None:
    """A setting that asks for terabytes must not take the machine with it."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGESIZE") + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def copy_folder(source: Path, target: Path) -> None:
    """Make `target` a copy of `source`, in place of whatever is there."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
