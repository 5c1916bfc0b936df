"""Writes the step-N folders of a run: all of a checkpoint, or nothing of it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from titan_ulysses.checkpoint.hosts import HostFolders, new_group
from titan_ulysses.checkpoint.manifest import Damage, PieceHashes
from titan_ulysses.checkpoint.step_folder import publish, step_named, steps_in
from titan_ulysses.checkpoint.storage import HashingWriter, IncompletePlanner, cause
from titan_ulysses.distributed.atomic import partial_path, remove
from titan_ulysses.distributed.errors import first_failure


class SaveFailed(Exception):
    """Raised, on every rank, if a checkpoint cannot be written. It says why."""


class CheckpointWriter:
    """Writes checkpoints to `folder`, and keeps the last `keep` of them (0: all).

    hosts: which ranks share a folder, if not all do. group: the ranks, in a process group that no
    other thread uses; None: the default one. All methods but `publishes` are collective over it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        hosts: HostFolders | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        self.folder, self.keep, self.hosts, self.group = folder, keep, hosts, group

    def for_thread(self) -> CheckpointWriter:
        """Return the same for another thread, with process groups of its own.

        Collectives of two threads in one group would meet each other's.
        """
        group = new_group()
        hosts = self.hosts.with_group(group) if self.hosts else None
        return CheckpointWriter(self.folder, keep=self.keep, hosts=hosts, group=group)

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

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Raise `SaveFailed`, on every rank, if one of them fails. Collective at the end."""
        reason = None
        try:
            yield
        except (CheckpointException, OSError, Damage) as error:
            reason = cause(error)
        if reason := first_failure(reason, group=self.group):
            raise SaveFailed(reason)

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
