"""Checks whether the disk has room for the checkpoints and the export of a run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from titan_ulysses.config.schema import Config

_SMALL = 0.02
"""Fraction of the free disk space up to which nothing is printed."""


@dataclass(frozen=True)
class DiskNeeds:
    """What a run will still write, and where. Sizes are in bytes."""

    folder: str
    free: int
    model: int
    """size of the model in one checkpoint"""
    optimizer: int
    """size of the optimizer state in one checkpoint"""
    checkpoints: int
    """the largest number of checkpoints at a time, beyond those that exist now"""
    export: int
    """size of the export; 0 if none is written"""

    def obstacle(self) -> str | None:
        """Return why the run must not start, which is no room for one checkpoint, or None."""
        one = self.model + self.optimizer
        if not self.checkpoints or one <= self.free:
            return None
        return (
            f"job.dump_folder = {self.folder}: a checkpoint takes about {_gib(one)} (model "
            f"{_gib(self.model)}, optimizer {_gib(self.optimizer)}), and {_gib(self.free)} are "
            "free. Free space, name another folder, or set checkpoint.enable = false."
        )

    def lines(self) -> list[str]:
        """Return the lines to print before the first step: none if little space is needed."""
        needed = self.checkpoints * (self.model + self.optimizer) + self.export
        if needed <= _SMALL * self.free:
            return []
        parts = (
            [f"{self.checkpoints} checkpoints of {_gib(self.model + self.optimizer)}"]
            if self.checkpoints
            else []
        )
        parts += [f"an export of {_gib(self.export)}"] if self.export else []
        line = f"disk: {' and '.join(parts)} to be written, {_gib(self.free)} are free"
        if needed <= self.free:
            return [line]
        remedy = "lower checkpoint.keep_latest_k, or name another job.dump_folder"
        return [
            f"{line}:",
            f"      THE DISK WILL BE FULL. Free {_gib(needed - self.free)}, {remedy}.",
        ]


def disk_needs(
    config: Config, folder: Path, *, model: int, optimizer: int, export: int, there: int, done: int
) -> DiskNeeds:
    """Return the disk needs of a run after step `done`.

    folder: where the files of the run go; it need not exist. model, optimizer: bytes of one
    checkpoint. export: bytes of the export. there: number of checkpoints that exist now.
    """
    checkpoint, last = config.checkpoint, config.training.steps
    to_come = max(0, last // checkpoint.interval - done // checkpoint.interval)
    to_come += done < last and last % checkpoint.interval != 0  # that of the last step
    # The oldest checkpoint is removed after the newest is complete, so keep + 1 exist for a while.
    if checkpoint.keep_latest_k:
        kept = checkpoint.keep_latest_k + checkpoint.keep_best
        to_come = min(to_come + checkpoint.keep_best, max(1, kept + 1 - there))
    return DiskNeeds(
        folder=config.job.dump_folder,
        free=shutil.disk_usage(
            next(p for p in (folder, *folder.absolute().parents) if p.exists())
        ).free,
        model=model,
        optimizer=optimizer,
        checkpoints=to_come if checkpoint.enable else 0,
        export=export if checkpoint.export else 0,
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
