"""The folder of a run: can it be written, is another run in it, and files that are whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from titan_ulysses.config.schema import Config
from titan_ulysses.distributed.atomic import whole_file
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.launch import heartbeat, run_store
from titan_ulysses.launch.lock import RunLock


class RunFolder:
    """<dump_folder>/<name>/, which all ranks share, or those of a host (checkpoint.shared).

    say: how a user is told what is uncertain. All errors are `UserError`s that name the folder.
    """

    def __init__(self, config: Config, *, say: Callable[[str], None]):
        self.config = config
        self.path = Path(config.job.dump_folder) / config.job.name
        self._lock = RunLock(self.path, say=say)

    def check(self) -> None:
        """Raise UserError if the folder cannot be made or written to. Makes nothing."""
        nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise self._unwritable(
                f"{nearest} is {'not writable' if nearest.is_dir() else 'not a folder'}"
            )

    def lock_if_there(self) -> None:
        """Raise UserError if another run is at work in the folder. Makes nothing.

        Called before anything is read that another run may change.
        """
        if self.path.exists():
            self._acquire()

    def open(self) -> None:
        """Make the folder, and lock it for this run."""
        self._make()
        self._acquire()
        heartbeat.keep_stacks_in(self.path / "stacks")

    def release(self) -> None:
        """Let other runs in."""
        self._lock.release()

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the folder on rank 0, completely or not at all. Makes the folder."""
        self._make()
        try:
            if dist.get_rank() == 0:
                with whole_file(self.path / name) as partial:
                    partial.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from error

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from error

    def _acquire(self) -> None:
        """Lock the folder on rank 0, or on the first rank of each host that has one of its own."""
        rank, _ = run_store.rank_and_size()
        if rank != 0 and (self.config.checkpoint.shared or not run_store.leads_host()):
            return
        try:
            self._lock.acquire()
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from error

    def _unwritable(self, why: str) -> UserError:
        return UserError(
            f"job.dump_folder = {self.config.job.dump_folder}: cannot write to {self.path} "
            f"({why}). Choose a folder that can be written."
        )
