"""Writes the step-N folders of a run: all of a checkpoint, or nothing of it.

With checkpoint.async_mode = "async" a thread writes, while the next steps run (`BackgroundSave`).
"""

from __future__ import annotations

import os
import threading
import uuid
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from titan_ulysses.checkpoint.hosts import HostFolders, new_group
from titan_ulysses.checkpoint.manifest import Damage, PieceHashes
from titan_ulysses.checkpoint.step_folder import publish, step_named, steps_in
from titan_ulysses.checkpoint.storage import HashingWriter, IncompletePlanner, cause
from titan_ulysses.distributed.atomic import partial_path, remove
from titan_ulysses.distributed.device import module_of, pin
from titan_ulysses.distributed.errors import failing_together, first_failure
from titan_ulysses.distributed.tensors import plain_pieces


class SaveFailed(Exception):
    """Raised, on every rank, if a checkpoint cannot be written. It says why."""


@dataclass
class CheckpointWriter:
    """Writes checkpoints to `folder`, and keeps the last `keep` of them (0: all).

    hosts: which ranks share a folder, if not all do. group: the ranks, in a process group that no
    other thread uses; None: the default one. All methods but `publishes` are collective over it.
    """

    folder: Path
    keep: int
    hosts: HostFolders | None = None
    group: dist.ProcessGroup | None = None

    def for_thread(self) -> CheckpointWriter:
        """Return the same for another thread, with process groups of its own.

        Collectives of two threads in one group would meet each other's.
        """
        group = new_group()
        hosts = self.hosts.with_group(group) if self.hosts else None
        return replace(self, hosts=hosts, group=group)

    @property
    def _ranks(self) -> list[int]:
        """The ranks that share this rank's folder."""
        if self.hosts:
            return self.hosts.ranks_of[self.hosts.own]
        return [*range(dist.get_world_size())]

    @property
    def publishes(self) -> bool:
        """Whether this rank renames and removes what is in the folder."""
        return self._ranks[0] == dist.get_rank()

    def write(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Write step-<step>, then remove all but the last `keep` checkpoints.

        tensors: as `tensors_of` returns them. state: what else goes to run.json; the checkpoint
        that its "best" tells to keep stays there too. If step-<step> exists already, nothing is
        written. Raise `SaveFailed` if it cannot be written.
        """
        final = self.folder / f"step-{step}"
        partial = partial_path(final)
        # Only those that publish are asked: the view that others have of a network file system may
        # be old. Of separate folders, some may have a step that the others lack.
        is_absent = self.publishes and not final.exists()
        if first_failure("absent" if is_absent else None, group=self.group) is None:
            return
        failed = None
        try:
            with self._failing_together():
                if self.publishes:
                    _remove(final)
                    remove(partial)
                    partial.mkdir(parents=True)
            self._write_and_publish(partial, final, tensors, {**state, "step": step})
        except SaveFailed as error:
            failed = error
        if self.publishes:
            best = state.get("best") or {}
            kept = best["step"] if best.get("keep") else None
            _remove(*([partial, final] if failed else self._too_old(kept)))
        dist.barrier(group=self.group)  # no rank goes on before the folder is as it stays
        if failed:
            raise failed

    def _write_and_publish(
        self, partial: Path, final: Path, tensors: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Write a checkpoint, and give it its name when all ranks have written."""
        save_id = [uuid.uuid4().hex]
        dist.broadcast_object_list(save_id, src=0, group=self.group)
        group = self.hosts.ranks_of_this_host() if self.hosts else self.group
        writer = HashingWriter(partial, ranks=self._ranks)
        planner = IncompletePlanner() if self.hosts else None
        with self._failing_together():
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group)
        gathered: list[Any] | None = [None] * len(self._ranks) if self.publishes else None
        dist.gather_object(writer.pieces, gathered, dst=self._ranks[0], group=group)
        pieces: PieceHashes = {name: of for part in gathered or () for name, of in part.items()}
        if self.hosts:
            state |= self.hosts.manifest(pieces)
        with self._failing_together():  # the other ranks wait for those that publish
            if self.publishes:
                publish(partial, final, state, pieces, save_id=save_id[0])

    def _failing_together(self) -> AbstractContextManager[None]:
        """Raise `SaveFailed`, on every rank, if one of them fails. Collective at the end."""
        kinds = (CheckpointException, OSError, Damage)
        return failing_together(*kinds, error=SaveFailed, words=cause, group=self.group)

    def _too_old(self, best: int | None) -> list[Path]:
        if not self.keep:
            return []
        try:
            steps = sorted(steps_in(self.folder))
        except OSError:
            return []  # whoever reads the folder next says that it cannot be read
        return [self.folder / f"step-{step}" for step in steps[: -self.keep] if step != best]


def _remove(*folders: Path) -> None:
    """Remove folders. A checkpoint loses its name first: what a kill leaves of it is not one."""
    for folder in filter(os.path.lexists, folders):
        gone = folder if step_named(folder.name) is None else partial_path(folder)
        remove(gone)
        with suppress(OSError):
            folder.rename(gone)
            remove(gone)


# --- in the background ----------------------------------------------------------------------------


class BackgroundSave:
    """One save at a time, written by a thread. A save that has failed can be written again.

    It is what DCP's own async_save does, with this project's writer: the tensors are copied to host
    memory, and a thread with a process group of its own writes the copy. The copy is kept and used
    again for the next save, because touching fresh memory costs more than copying, and for a save
    that has failed, which async_save could repeat only with the weights of a later step.
    """

    def __init__(self, writer: CheckpointWriter):
        self.writer = writer
        self.step: int | None = None
        """The step that is being written or has failed; None if there is none."""
        self.tries = 0
        self._copy: dict[str, Any] = {}
        self._state: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Copy the tensors, which may change from then on, and begin to write step-<step>."""
        assert self.step is None, "one save is in flight at most"
        self._copy = copied(tensors, self._copy)
        module_of().synchronize()  # copies to page-locked memory do not wait for the device
        self.step, self._state, self.tries = step, state, 0
        self.again()

    def again(self) -> None:
        """Begin to write the copy once more."""
        self.tries, self._error = self.tries + 1, None
        arguments = self.step, module_of().current_device()
        self._thread = threading.Thread(
            target=self._write, args=arguments, name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether the last save has ended without success. Waits for nothing."""
        ended = self._thread is not None and not self._thread.is_alive()
        return ended and self._error is not None

    def wait(self) -> str | None:
        """Wait until the save in flight has ended, and return why it failed, or None."""
        if self.step is None or self._thread is None:
            return None
        self._thread.join()
        if isinstance(self._error, SaveFailed):
            return str(self._error)
        if self._error is not None:
            raise self._error
        self.step = None
        return None

    def _write(self, step: int, device: int | str) -> None:
        try:
            module_of().set_device(device)  # a thread begins on the first one
            self.writer.write(step, self._copy, self._state)
        except BaseException as error:  # raised again by the thread that trains
            self._error = error


def copied(value: Any, kept: Any = None) -> Any:
    """Return a copy of a state dict with all tensors in host memory, page-locked for a GPU.

    kept: an earlier copy of a state dict of the same shapes, whose memory is used again.
    """
    if isinstance(value, dict):
        return {name: copied(x, (kept or {}).get(name)) for name, x in value.items()}
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if not isinstance(kept, Tensor) or kept.shape != value.shape or kept.dtype != value.dtype:
        kept = value.to("cpu", copy=True)
        if any(piece.device.type != "cpu" for piece in plain_pieces(value)):
            pin(kept)
        return kept
    for target, source in zip(plain_pieces(kept), plain_pieces(value), strict=True):
        target.copy_(source, non_blocking=True)
    return kept
