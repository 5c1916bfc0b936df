"""How a run fails: one message, an exit code for the cause, and no rank left waiting."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from titan_ulysses.distributed.errors import UserError

_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)
"""Texts in the errors of a rank whose communication partner has ended."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Run the program in this context, which turns an error into a message and an exit code.

    Bad input and errors of the operating system end it with a message, other errors with a
    traceback. Only one rank prints. Exit codes: 2 for a command line or TOML file that cannot be
    used, 130 for Ctrl-C, 1 for any other error.
    """
    try:
        yield
        _leave_together()
    except UserError as error:
        _end(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        # This is before the first step or after the last; in between, the trainer saves and stops.
        _end("Interrupted.", 130)
    except OSError as error:
        _end(f"error: {error.filename or 'input/output'}: {error.strerror or error}", 1)
    except Exception as error:
        lost = any(sign in str(error) for sign in _LOST_PEER)
        _end(
            "error: another rank died without a word (out of memory?)."
            if lost
            else traceback.format_exc(),
            1,
        )


def first_failure(reason: str | None) -> str | None:
    """Return, on every rank, the reason of the first rank that has one; None if no rank has one.

    Collective. All ranks can then stop together where one of them must. Without a process group
    there is one rank, whose reason is returned.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return reason
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next(filter(None, reasons), None)


def one_line(error: BaseException) -> str:
    """Return what an exception says, on one line and short enough to stand inside a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."


def _leave_together() -> None:
    """End this rank when all ranks have done their work; do nothing without a process group.

    The interpreter's own shutdown is skipped: during it, threads of a process group may abort a
    rank whose peer has already ended.
    """
    if "torch" not in sys.modules:
        return  # --help and --print-config do not import it
    import torch.distributed as dist

    if dist.is_initialized():
        # The barrier fails on a rank whose peer has already ended; that rank is only late.
        with suppress(Exception):
            dist.barrier()
        _exit(0)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end(message: str, code: int) -> NoReturn:
    """Print a message, unless another rank has already printed one, and exit at once.

    A pending collective must not delay the exit.
    """
    if _is_first_to_fail():
        print(message.rstrip(), file=sys.stderr)
    _exit(code)


def _is_first_to_fail() -> bool:
    """Return whether this rank is the first to fail.

    The ranks count failures in torchrun's store, which outlives them. Without torchrun there is one
    rank.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    from datetime import timedelta

    from torch.distributed import TCPStore

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        return (
            store.add(
                f"titan_ulysses/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1
            )
            == 1
        )
    except Exception:  # the store is gone, so the run is already ending
        return os.environ.get("RANK") == "0"
