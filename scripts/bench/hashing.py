"""What the hashes of a checkpoint cost: saved and read with and without them, in turn.

python scripts/bench/hashing.py --mib 400 --rounds 5

Saving ends when the disk has the bytes (fsync), as in a run. `--limit 0.05` ends with exit code 1
if the hashes add more than that to the seconds of saving.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed.checkpoint as dcp

from titan_ulysses.checkpoint.manifest import HashingWriter, describe_files
from titan_ulysses.checkpoint.reader import CheckpointReader

_TENSORS = 48


def seconds(act: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds on the clock, and those of this process on a CPU."""
    clock, cpu = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - clock, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--mib", type=int, default=400, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, help="the largest ratio that saving may grow by")
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    numbers = options.mib * 2**18 // _TENSORS
    tensors = {f"{n}": torch.randn(numbers) for n in range(_TENSORS)}
    target = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for _ in range(options.rounds):
            for name, kind in {"without": dcp.FileSystemWriter, "with": HashingWriter}.items():
                folder = Path(temporary) / name
                shutil.rmtree(folder, ignore_errors=True)
                writer = kind(folder)

                def save(writer: dcp.FileSystemWriter = writer) -> None:
                    dcp.save(tensors, storage_writer=writer, no_dist=True)

                found.setdefault(f"save {name}", []).append(seconds(save))
                pieces = writer.pieces if isinstance(writer, HashingWriter) else {}
                files = describe_files(folder, pieces) if pieces else {}

                def load(folder: Path = folder, files: dict = files) -> None:
                    reader = CheckpointReader(folder, files)
                    dcp.load(target, storage_reader=reader, no_dist=True)

                found.setdefault(f"load {name}", []).append(seconds(load))
    for act in ("save", "load"):
        rows = [
            [median(column) for column in zip(*found[f"{act} {name}"], strict=True)]
            for name in ("without", "with")
        ]
        (clock, cpu), (hashed_clock, hashed_cpu) = rows
        print(
            f"{act} of {options.mib} MiB: {clock:.2f} s without hashes, {hashed_clock:.2f} s with "
            f"({hashed_clock / clock - 1:+.1%}); CPU {cpu:.2f} s and {hashed_cpu:.2f} s "
            f"({hashed_cpu - cpu:+.2f} s)"
        )
        if act == "save" and options.limit and hashed_clock / clock - 1 > options.limit:
            sys.exit(f"error: hashing adds {hashed_clock / clock - 1:.1%}, more than the limit")


if __name__ == "__main__":
    main()
