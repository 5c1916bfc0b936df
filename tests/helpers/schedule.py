"""Which worker of pytest-xdist takes which file of tests, with `--dist loadfile`.

xdist hands out files by their number of tests. Those that start processes, and wait for them, have
few tests that take long. So they would come last, two at a time, and one worker would end minutes
before the other. Here one worker takes these files, and then the few with few tests that compute
long, and the others those that compute, until one kind is used up.
"""

from __future__ import annotations

from pathlib import Path

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

WAITING = (
    "two_hosts",
    "chaos",
    "gpu_check",
    "command_line",
    "agreement",
    "hang",
    "console",
    "network",
    "vision_runs",
    "compile",
    "interchange",
    "validation_sets",
)
"""The longest first; from vision_runs on they compute."""


class OneWaits(LoadFileScheduling):
    """The first worker takes the files of WAITING, in their order."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        """Give a worker a file; called whenever one has only few tests left."""
        waiting = sorted(filter(_waits, self.workqueue), key=lambda f: WAITING.index(_name(f)))
        computing = [file for file in self.workqueue if not _waits(file)]
        order = waiting + computing if node is self.nodes[0] else computing + waiting
        self.workqueue.move_to_end(order[0], last=False)
        super()._assign_work_unit(node)


def _name(file: str) -> str:
    return Path(file).stem.removeprefix("test_")


def _waits(file: str) -> bool:
    return _name(file) in WAITING
