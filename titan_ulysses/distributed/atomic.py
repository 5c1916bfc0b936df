"""Files and folders that are complete or absent: written under a temporary name, then renamed.

The disk has what is renamed before it gets its name, and the name before the call returns. So a
name that is there after a loss of power is that of something complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Return where a file or folder is written, in the same folder, before its rename to `path`."""
    return path.with_name(f".{path.name}.partial")


def remove(path: Path) -> None:
    """Remove a folder, or whatever has its name, as far as that can be. No link is followed."""
    with suppress(OSError):
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


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
    """Yield a path for writing a file, which replaces `path` at the end, unless the body fails.

    The file is there already, empty and new: a link in its place would lead to another one.
    """
    partial = partial_path(path)
    remove(partial)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
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
    remove(old)
    if folder.exists():
        folder.rename(old)
    publish_folder(partial, folder)
    remove(old)


def publish_folder(partial: Path, folder: Path) -> None:
    """Rename the complete folder `partial` to `folder`, which does not exist."""
    sync_folder(partial)
    partial.rename(folder)
    # The folder above may be new too.
    for above in (folder.parent, folder.parent.parent):
        sync_folder(above)
