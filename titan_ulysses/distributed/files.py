"""Files and folders that are complete or absent: written beside their place, then renamed.

The disk has what is renamed before it gets its name, and the name before the call returns. So a
name that is there after a loss of power is that of something complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Return where a file or folder is written, in the same folder, before its rename to `path`."""
    return path.with_name(f".{path.name}.partial")


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder, where the system can do that."""
    if os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path for writing a file, which replaces `path` at the end, unless the body fails."""
    partial = partial_path(path)
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def replace_folder(partial: Path, folder: Path) -> None:
    """Replace `folder` by the complete folder `partial`, by renames.

    At every moment, whatever has the name `folder` is complete. The files in `partial` must be on
    the disk already.
    """
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    publish_folder(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def publish_folder(partial: Path, folder: Path) -> None:
    """Rename the complete folder `partial` to `folder`, which does not exist."""
    sync_folder(partial)
    partial.rename(folder)
    # The folder above may be new too.
    for above in (folder.parent, folder.parent.parent):
        sync_folder(above)
