"""Draw pictures of one or several runs: loss, memory, speed, and loss by position in the document.

    titan-ulysses plot outputs/quickstart
    titan-ulysses plot outputs/short outputs/long --output pictures

Reads metrics.jsonl of each folder and writes loss.png, memory.png, speed.png and, where a run
validated, positions.png, and sets.png where it has named sets. They go to --output, which for
a single run is its plots/ by default.
Curves that coincide are all visible, because those of later runs are thinner and drawn on top.
Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.observability.pictures import has_matplotlib
from titan_ulysses.observability.run_pictures import (
    draw_loss,
    draw_memory,
    draw_positions,
    draw_sets,
    draw_speed,
    read_runs,
    validations,
)
from titan_ulysses.tools import parser_of


def main(argv: list[str]) -> None:
    parser = parser_of("plot", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="of the pictures; default for one RUN: its plots/",
    )
    arguments = parser.parse_args(argv)
    if not has_matplotlib():
        raise UserError("titan-ulysses plot needs matplotlib: pip install matplotlib")
    runs = read_runs(arguments.runs)
    if len(runs) > 1 and not arguments.output:
        raise UserError(
            "Pictures of several runs belong to no folder of a run: name one with --output FOLDER."
        )
    output = arguments.output or arguments.runs[0] / "plots"
    pictures = {
        "loss": draw_loss,
        "memory": draw_memory,
        "speed": draw_speed,
        "positions": draw_positions,
    }
    if any("validation_sets" in line for lines in runs.values() for line in lines):
        pictures["sets"] = draw_sets
    if not any(map(validations, runs.values())):
        del pictures["positions"]
    for name, draw in pictures.items():
        draw(runs, output / f"{name}.png")
        print(output / f"{name}.png")
