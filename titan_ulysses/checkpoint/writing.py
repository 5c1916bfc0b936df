"""Writes the step-N folders of a run: all of a checkpoint, or nothing of it."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from titan_ulysses.checkpoint.hosts import HostFolders
from titan_ulysses.checkpoint.manifest import Damage, HashingWriter, Pieces, cause
from titan_ulysses.checkpoint.run_file import publish
from titan_ulysses.distributed.atomic import partial_path, remove
from titan_ulysses.distributed.errors import UserError, first_failure


class Writer:
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

    @property
    def publishes(self) -> bool:
        """Whether this rank renames and removes what is in the folder."""
        return self.hosts.leads if self.hosts else dist.get_rank() == 0

    def write(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> str | None:
        """Write step-<step>, then remove all but the last `keep` checkpoints.

        tensors: as `tensors_of` returns them. state: what else goes to run.json; the checkpoint
        that its "best" tells to keep stays there too. If step-<step>
        exists already, nothing is written. Return, on every rank, why it failed, or None.
        """
        final = self.folder / f"step-{step}"
        partial = partial_path(final)
        # Only those that publish are asked: the view that others have of a network file system may
        # be old. Of separate folders, some may have a step that the others lack.
        is_absent = self.publishes and not final.exists()
        if self._first("absent" if is_absent else None) is None:
            return None
        reason = None
        if self.publishes:
            _remove(final)
            reason = _made_new(partial)
        if reason := self._first(reason):
            return reason
        reason = self._write_and_publish(partial, final, tensors, state)
        if self.publishes:
            best = state.get("best") or {}
            kept = best["step"] if best.get("keep") else None
            _remove(*([partial, final] if reason else self._too_old(kept)))
        dist.barrier(group=self.group)  # no rank goes on before the folder is as it stays
        return reason

    def _write_and_publish(
        self, partial: Path, final: Path, tensors: dict[str, Any], state: dict[str, Any]
    ) -> str | None:
        """Write a checkpoint, and give it its name when all ranks have written."""
        save_id = [uuid.uuid4().hex]
        dist.broadcast_object_list(save_id, src=0, group=self.group)
        failure, pieces = None, Pieces()
        try:
            if self.hosts:
                pieces = self.hosts.write(tensors, partial)
            else:
                writer = HashingWriter(partial)
                # An error on one rank is raised on all.
                dcp.save(tensors, storage_writer=writer, process_group=self.group)
                pieces = writer.pieces
        except (CheckpointException, OSError) as error:
            failure = cause(error)
        if reason := self._first(failure):
            return reason
        pieces = self._of_all_ranks(pieces)
        if self.hosts:
            state = state | self.hosts.manifest(pieces)
        try:
            if self.publishes:
                saved = {**state, "step": step_of(final)}
                publish(partial, final, saved, pieces, save_id=save_id[0])
        except (OSError, Damage) as error:
            failure = cause(error)
        return self._first(failure)  # the other ranks wait for those that publish

    def _of_all_ranks(self, pieces: Pieces) -> Pieces:
        """Return, on the ranks that publish, the pieces that go to their folder."""
        ranks, group = [*range(dist.get_world_size())], self.group
        if self.hosts:
            ranks, group = self.hosts.ranks_of[self.hosts.own], self.hosts.ranks_of_this_host()
        gathered: list[Any] | None = [None] * len(ranks) if self.publishes else None
        dist.gather_object(pieces, gathered, dst=ranks[0], group=group)
        return {name: found for part in gathered or () for name, found in part.items()}

    def _too_old(self, best: int | None) -> list[Path]:
        if not self.keep:
            return []
        try:
            steps = sorted(steps_in(self.folder))
        except OSError:
            return []  # whoever reads the folder next says that it cannot be read
        return [self.folder / f"step-{step}" for step in steps[: -self.keep] if step != best]

    def _first(self, reason: str | None) -> str | None:
        return first_failure(reason, group=self.group)


def _made_new(folder: Path) -> str | None:
    """Make an empty folder in place of what has its name. Return why that failed, or None."""
    remove(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        return cause(error)
    return None


def _remove(*folders: Path) -> None:
    """Remove folders. A checkpoint loses its name first: what a kill leaves of it is not one."""
    for folder in filter(os.path.lexists, folders):
        gone = folder if step_named(folder.name) is None else partial_path(folder)
        remove(gone)
        with suppress(OSError):
            folder.rename(gone)
            remove(gone)


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder that may be absent, in any order.

    Raise OSError if the folder cannot be listed.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    steps = map(step_named, names)
    return [step for step in steps if step is not None]


def step_named(name: str) -> int | None:
    """Return N of the name step-N, written as the trainer writes it; None for another name."""
    number = name.removeprefix("step-")
    is_step = name.startswith("step-") and number.isascii() and number.isdecimal()
    return int(number) if is_step and len(number) < 19 and number == str(int(number)) else None


def step_of(folder: Path) -> int:
    """Return N of a folder step-N. Raise `UserError` if it has another name."""
    step = step_named(folder.name)
    if step is None:
        raise UserError(f"{folder}: a checkpoint is a folder named step-N, as in step-0.")
    return step
