"""Several runs, one after the other, on the ranks of one start, since a start costs seconds:
`launch.py ... several.py CONFIG SETTINGS ...`, where each SETTINGS is an object in JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from helpers.runs import train
    from titan_ulysses.launch.failure import exit_on_error

    with exit_on_error():
        for settings in sys.argv[2:]:
            train(Path(sys.argv[1]), json.loads(settings))
