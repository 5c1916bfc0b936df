"""By how much runs lowered their held-out loss, of which the first is from before training.

    python scripts/examples/learned.py 0.05 outputs/smollm2_seed_1 ...

Exits with 1 where one did by less than that.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    least, runs = float(sys.argv[1]), sys.argv[2:]
    falls = []
    for run in runs:
        lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
        losses = {
            line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line
        }
        before, after = losses[min(losses)], losses[max(losses)]
        falls.append(before - after)
        print(
            f"{run}: held-out loss {before:.4f} before, {after:.4f} after {max(losses)} steps: "
            f"-{falls[-1]:.4f}"
        )
    sys.exit(f"fell by less than {least}" if min(falls) < least else 0)


if __name__ == "__main__":
    main()
