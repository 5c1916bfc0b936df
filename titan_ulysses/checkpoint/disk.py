"""Whether the disk of a run has room for what it will write: checkpoints and the export."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from titan_ulysses.config.schema import Config

_SMALL = 0.02
"""Of the free disk: what need not be told."""


@dataclass(frozen=True)
class DiskNeeds:
    """What a run will write from here on, and where; sizes in bytes."""

    folder: str
    free: int
    model: int
    """of one checkpoint"""
    optimizer: int
    checkpoints: int
    """that will be there at a time, at the most, beside those that are there now"""
    export: int

    def obstacle(self) -> str | None:
        """Why the run must not start, or None: not one checkpoint has room."""
        one = self.model + self.optimizer
        if not self.checkpoints or one <= self.free:
            return None
        return (
            f"job.dump_folder = {self.folder}: a checkpoint takes about {_gib(one)} (model "
            f"{_gib(self.model)}, optimizer {_gib(self.optimizer)}), and {_gib(self.free)} are "
            "free. Free space, name another folder, or set checkpoint.enable = false."
        )

    def lines(self) -> list[str]:
        """What to print before the first step: nothing where it is next to nothing."""
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
    """Of a run whose files go to folder, which is made or not, after step `done`.

    model, optimizer: bytes of a checkpoint; export: bytes of the export; there: how many
    checkpoints there are.
    """
    checkpoint, last = config.checkpoint, config.training.steps
    to_come = sum(
        step % checkpoint.interval == 0 or step == last for step in range(done + 1, last + 1)
    )
    if checkpoint.keep_latest_k:  # the oldest goes when the newest is complete
        to_come = min(to_come, max(1, checkpoint.keep_latest_k + 1 - there))
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
