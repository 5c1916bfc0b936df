"""Run torchrun, but where a rank fails, exit with the exit code of that rank and without the
launcher's own traceback.

The rank has already printed what is wrong, and forty lines about the launcher below would hide it.
Takes torchrun's arguments. A signal is passed on to the ranks, which finish their step and save
before they end. torchrun would kill them after 30 seconds.
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
    # Wait for the ranks to end, since a step may take long. A second Ctrl-C ends them at once.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_DAY))
    # Silence torchrun's own reports, which only repeat the exit code of each rank.
    logging.disable(logging.ERROR)
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        return _exit_code({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


def _exit_code(codes: dict[int, int]) -> int:
    """Return the exit code for the run, from those of its ranks by rank.

    It is the code of the first rank that exited by itself, since that rank has printed what is
    wrong. A negative code is the signal that ended a rank. Where all ranks were ended by signals,
    none has printed anything. Then the first rank whose signal is not the launcher's own SIGTERM is
    reported here, and the code is 1.
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
        # A rank that was killed while it showed a progress bar has left the cursor hidden.
        print("\x1b[?25h", end="")
    sys.stdout.flush()
    sys.stderr.flush()
    # While the interpreter shuts down, threads of torchrun's store may abort the launcher.
    os._exit(code)
