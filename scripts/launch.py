"""torchrun, except that a failed rank ends it with the rank's exit code and not with the launcher's
own traceback.

A rank has then said what is wrong; forty lines about the launcher below would hide it. Takes
torchrun's arguments. A signal is handed on to the ranks, which finish their step and save; torchrun
would kill them after 30 seconds.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

_DAY = 24 * 60 * 60


def main(argv: list[str]) -> int:
    # Until the ranks have ended, whose step may take long: a second Ctrl-C ends them at once.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_DAY))
    # Torchrun's own reports, which repeat the exit code of each rank.
    logging.disable(logging.ERROR)
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        return _exit_code({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


def _exit_code(codes: dict[int, int]) -> int:
    """That of the first rank that told what is wrong; a negative one is the signal that ended a
    rank.

    Where all were ended by signals, nobody has told anything: one for a reason of its own, the
    others because of it.
    """
    if told := next((code for code in codes.values() if code > 0), None):
        return told
    rank = next(
        (rank for rank, code in codes.items() if code != -signal.SIGTERM), next(iter(codes))
    )
    name = signal.Signals(-codes[rank]).name
    print(
        f"error: rank {rank} was ended by "
        f"{name}{' (out of memory?)' if name == 'SIGKILL' else ''}.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if sys.stdout.isatty():
        # A rank that was killed while it had a bar has left the cursor hidden.
        print("\x1b[?25h", end="")
    sys.stdout.flush()
    sys.stderr.flush()
    # In the interpreter's own end, threads of torchrun's store may abort the launcher.
    os._exit(code)
