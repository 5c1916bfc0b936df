"""Write report.html of a run, or one page that compares several runs.

    titan-ulysses report outputs/quickstart
    titan-ulysses report outputs/short outputs/long --output outputs/compared

Of one run it is the page that a run writes at its end, also while the run is going on. Of several,
the pictures have a curve of each, and a table of their last numbers links to their own pages.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.observability.report_page import PAGE, PageSection, write_page
from titan_ulysses.observability.run_page import last_numbers, write_run_page
from titan_ulysses.observability.run_pictures import (
    draw_loss,
    draw_memory,
    draw_positions,
    draw_speed,
    read_runs,
    validations,
)
from titan_ulysses.tools import parser_of


def main(argv: list[str]) -> None:
    parser = parser_of("report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of the page of several runs")
    arguments = parser.parse_args(argv)
    if len(arguments.runs) == 1 and not arguments.output:
        print(write_run_page(arguments.runs[0]))
        return
    if not arguments.output:
        raise UserError(
            "The page of several runs belongs to no folder of a run: name one with --output FOLDER."
        )
    print(compare(arguments.runs, arguments.output))


def compare(folders: list[Path], output: Path) -> Path:
    """Write the page of several runs. UserError where one of them has logged nothing."""
    runs, section = read_runs(folders), PageSection("runs")
    rows = []
    for folder, (name, lines) in zip(folders, runs.items(), strict=True):
        page = folder / PAGE
        if not page.exists():
            write_run_page(folder)
        rows.append((name, os.path.relpath(page, output), last_numbers(lines)))
    whats = list(dict.fromkeys(what for *_, numbers in rows for what in numbers))
    links = {name: link for name, link, _ in rows}
    section.table(
        ["run", *whats],
        [(name, *(numbers.get(what, "") for what in whats)) for name, _, numbers in rows],
        links=links,
    )
    pictures = {"Loss": draw_loss, "Speed": draw_speed, "Memory": draw_memory}
    for title, draw in pictures.items():
        section.heading(title)
        section.figure(f"{title} of each run", partial(draw, runs))
    if any(map(validations, runs.values())):
        section.heading("Loss by position in the document")
        caption = "First validation (dashed) and last one (solid)"
        section.figure(caption, partial(draw_positions, runs))
    output.mkdir(parents=True, exist_ok=True)
    return write_page(output, section, title=", ".join(runs))
