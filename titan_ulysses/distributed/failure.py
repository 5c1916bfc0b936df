"""How a run fails: one message from one rank, an exit code that says whose fault it was, and no
rank left waiting.
"""

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


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Run the program: bad input ends it with its message, anything else with a traceback; on one
    rank only.

    Exit codes: 2 for a command line or TOML file that cannot be used, 130 for Ctrl-C, 1 for
    anything else.
    """
    try:
        yield
        _leave_together()
    except UserError as error:
        _end(f"error: {error}", error.exit_code)
    except (
        KeyboardInterrupt
    ):  # before the first step or after the last; between them the trainer saves and stops
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
    """Collective. The reason of the first rank that has one, on every rank: so that all stop where
    one of them must.

    Without a process group there is one rank.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return reason
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next(filter(None, reasons), None)


def one_line(error: BaseException) -> str:
    """What an exception says, short enough to stand inside a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."


def _leave_together() -> None:
    """End a rank that has done its work, when all have: without the interpreter's own end, in which
    threads of a process group may abort a rank whose peer has gone first.
    """
    if "torch" not in sys.modules:
        return  # --help and --print-config
    import torch.distributed as dist

    if dist.is_initialized():
        # A rank that is told that its peer has gone already is late, nothing worse.
        with suppress(Exception):
            dist.barrier()
        _exit(0)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end(message: str, code: int) -> NoReturn:
    """Print message unless another rank has told its own, and end at once: a collective must not
    hold the exit up.
    """
    if _is_first_to_tell():
        print(message.rstrip(), file=sys.stderr)
    _exit(code)


def _is_first_to_tell() -> bool:
    """Ask torchrun's store, which outlives the ranks; without torchrun there is one rank."""
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
    except Exception:  # the store is gone, so the run's end is known already
        return os.environ.get("RANK") == "0"
