"""One run in a folder: a lock that ends with its process, however that ends.

It is a POSIX record lock (fcntl) of a file, which the kernel releases with the process, which forks
do not inherit, and which network file systems carry between hosts, if they are mounted so. The
folder itself is locked too (flock), on its own host alone: the file may be deleted meanwhile.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO
from weakref import WeakMethod

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.launch import run_store

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class RunLock:
    """The lock of a run's folder. It is held until `release`, or until the process ends.

    say: warns the user where locks cannot show whether another run uses the folder.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None]):
        self._path, self._say = folder / LOCK_FILE, say
        self._file: IO[str] | None = None
        self._folder: int | None = None

    def acquire(self) -> None:
        """Take the lock; do nothing if it is held already. The folder must exist.

        Raise `UserError` if another process holds it or its file is a link, and OSError if the
        file cannot be made.
        """
        if self._file is not None:
            return
        try:
            self._file = open(self._path, "a+", opener=_not_through_a_link)  # noqa: SIM115  kept
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise UserError(
                f"{self._path} is a symbolic link, but a run writes only to files inside its "
                "folder. Remove it."
            ) from error
        if fcntl is None:
            self._say(f"WARNING: {self._path}: this system has no locks: {_CANNOT_TELL}.")
            return
        try:
            self._lock_folder()
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder()
            if error.errno in _NO_LOCKS:
                self._say(f"WARNING: {self._path}: its file system has no locks: {_CANNOT_TELL}.")
                return
            self._close()
            raise UserError(
                f"{self._path.parent}: another run is at work in this folder{_named(holder)}. Wait "
                "until it has ended, end it, or choose another job.name."
            ) from error
        self._write_holder()

    def _lock_folder(self) -> None:
        """Raise BlockingIOError if another run on this host has the folder."""
        try:
            self._folder = os.open(self._path.parent, os.O_RDONLY)
            # A forked child would keep the lock. What is registered stays for good, so it must not
            # keep this object alive.
            close = WeakMethod(self._close_folder)
            os.register_at_fork(after_in_child=lambda: (method := close()) and method())
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            return  # some file systems cannot; there is the file

    def _close_folder(self) -> None:
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def release(self) -> None:
        """Give the lock back, and note that this run has ended in order."""
        if self._file is not None:
            with suppress(OSError):
                self._file.truncate(0)
        self._close()

    def _write_holder(self) -> None:
        """Write who holds the lock. Warn if the previous holder may still be running on another
        host.
        """
        before, host = self._holder(), run_store.host_name()
        # An elastic run that was restarted may have another first host.
        is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if before and before.get("host") != host and not is_restart:
            self._say(
                f"WARNING: {self._path.parent}: the previous run in this folder did not shut down "
                f"cleanly{_named(before)}. Some file systems do not share locks between hosts "
                "(NFS mounted with nolock, Lustre with localflock): if that run may still be "
                "alive there, end it."
            )
        assert self._file is not None
        self._file.truncate(0)
        holder = {"host": host, "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._file.write(json.dumps(holder) + "\n")
        self._file.flush()

    def _holder(self) -> dict[str, object]:
        """Return what the holder of the lock has written, or {}."""
        assert self._file is not None
        self._file.seek(0)
        with suppress(ValueError, OSError):
            found = json.loads(self._file.read(1000))
            return found if isinstance(found, dict) else {}
        return {}

    def _close(self) -> None:
        self._close_folder()
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


_CANNOT_TELL = "it is unknown whether another run is at work in this folder"


def _named(holder: dict[str, object]) -> str:
    if not {"host", "process", "since"} <= holder.keys():
        return ""
    return f" (process {holder['process']} on {holder['host']}, since {holder['since']})"
