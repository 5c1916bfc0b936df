"""torchrun, except that a failed rank ends it with the rank's exit code and not with the launcher's own traceback.

A rank has then said what is wrong; forty lines about the launcher below would hide it. Takes torchrun's arguments.
"""

import os
import sys

os.environ.setdefault("LOGLEVEL", "CRITICAL")  # torchrun's own logger, which repeats the exit code of each rank

from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.run import parse_args, run  # noqa: E402

if __name__ == "__main__":
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # The first rank to fail knows why; a rank that was ended because of it has a negative code (a signal).
        sys.exit(next((code for code in codes if code > 0), 1))
    except SignalException as signal:
        sys.exit(128 + signal.sigval)
