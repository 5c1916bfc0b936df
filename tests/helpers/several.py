"""Several runs, one after the other, on the ranks of one start, since a start costs seconds:
`launch.py ... several.py CONFIG SETTINGS ...`, where each SETTINGS is an object in JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from helpers.runs import train
    from titan_ulysses.distributed.failure import exit_on_error

    with exit_on_error():
        for number, settings in enumerate(sys.argv[2:]):
            # As if torchrun had started the ranks again: each run has keys of its own in the store.
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
            train(Path(sys.argv[1]), json.loads(settings))
