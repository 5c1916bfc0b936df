"""The section of report.html about a run, from its metrics.jsonl and its config.toml."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import Any

from titan_ulysses.distributed.hardware import GIB
from titan_ulysses.observability.report_page import PageSection, write_page
from titan_ulysses.observability.run_pictures import (
    Lines,
    draw_balance,
    draw_loss,
    draw_memory,
    draw_positions,
    draw_speed,
    ranges_of,
    read_runs,
    validations,
    values,
)
from titan_ulysses.observability.units import size_text, time_text


def _gib(size: float) -> str:
    return size_text(size * GIB)


_OF_LAST_STEP: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("tokens_per_second", "tokens a second, last", "{:,.0f}".format),
    ("peak_memory_gib", "peak memory of a rank, measured", _gib),
    ("planned_memory_gib", "peak memory of a rank, planned", _gib),
    ("mfu", "MFU, last", "{:.1%}".format),
    ("skipped_steps", "skipped steps", "{:,}".format),
)


def write_run_page(folder: Path) -> Path:
    """Write the section of a run into report.html of its folder. UserError where nothing is logged.

    It may be called at any time, also while the run is going on.
    """
    ((name, lines),) = read_runs([folder]).items()
    section, runs = PageSection("run"), {name: lines}
    section.table(["", ""], _summary(lines))
    if sources := _sources(lines):
        section.heading("Data")
        section.table(["source", "passes over it", "loss, first and last"], sources)
    if values(lines, "loss")[0] or values(lines, "validation_loss")[0]:
        section.heading("Loss")
        section.figure("Loss of training, and of held-out data", partial(draw_loss, runs))
    if validations(lines):
        section.heading("Loss by position in the document")
        section.figure(
            "First validation (dashed) and last one (solid)", partial(draw_positions, runs)
        )
        _positions(section, validations(lines))
    if samples := [line["validation_samples"] for line in lines if line.get("validation_samples")]:
        section.heading("Samples")
        first, last = samples[0], samples[-1]
        # In quotes, so that spaces at the ends are seen; a page has its line breaks.
        rows = [[f'"{x}"' for x in (one, first.get(one, ""), last[one])] for one in last]
        section.table(["prompt", "at the first validation", "at the last one"], rows)
    if values(lines, "step_seconds")[0]:
        section.heading("Speed")
        section.figure("Tokens a second, and seconds a step", partial(draw_speed, runs))
        section.heading("Memory")
        section.figure("Peak of a rank so far, measured and planned", partial(draw_memory, runs))
    section.heading("Balance")
    if values(lines, "balance")[0]:
        section.figure(
            "How many times as long attention takes as if it were spread evenly over the "
            "data-parallel ranks",
            partial(draw_balance, runs),
        )
    else:
        section.text("One data-parallel rank reads all sequences: there is nothing to balance.")
    with suppress(OSError):  # of a run of an older version
        section.folded("config.toml", (folder / "config.toml").read_text(encoding="utf-8"))
    return write_page(folder, section, title=name)


def _summary(lines: Lines) -> list[tuple[str, str]]:
    """Return (what, value) of a run in numbers; what was not logged is left out."""
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "validation_loss" in line]
    last: dict[str, Any] = steps[-1] if steps else {}
    rows = []
    if steps:
        rows += [("steps", f"{last['step']:,}"), ("tokens", f"{last.get('tokens') or 0:,}")]
        rows += [("loss of the first and of the last logged step", _both(steps, "loss"))]
    if held_out:
        rows += [("validation loss, first and last", _both(held_out, "validation_loss"))]
    for key in ("rewards", "validation_rewards"):
        found = [line[key] for line in lines if line.get(key)]
        what = f"{key.replace('_', ' ')}, first and last"
        rows += [(f"{what}: {name}", _both(found, name)) for name in (found[0] if found else {})]
    if times := [line["step_seconds"] for line in steps if line.get("step_seconds")]:
        rows += [("a step, median", time_text(median_high(times)))]
    rows += [(what, text(last[key])) for key, what, text in _OF_LAST_STEP if last.get(key)]
    for kind, count in (last.get("collectives") or {}).items():
        rows += [(f"{kind} of a step", f"{count['calls']:,} calls, {size_text(count['bytes'])}")]
    return rows


def last_numbers(lines: Lines) -> dict[str, str]:
    """Return the numbers of the end of a run, by what they are, to compare it with others."""
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "validation_loss" in line]
    found = {"steps": f"{steps[-1]['step']:,}"} if steps else {}
    for what, some, key in (
        ("loss", steps, "loss"),
        ("validation loss", held_out, "validation_loss"),
    ):
        if some:
            found[what] = "not finite" if some[-1][key] is None else f"{some[-1][key]:.4f}"
    last: dict[str, Any] = steps[-1] if steps else {}
    return found | {what: text(last[key]) for key, what, text in _OF_LAST_STEP if last.get(key)}


def _sources(lines: Lines) -> list[tuple[str, str, str]]:
    """Return the sources of a mixture, with how often each was read, and its losses."""
    steps = [line for line in lines if isinstance(line.get("epoch"), dict)]
    losses = [line["loss_by_source"] for line in steps if line.get("loss_by_source")]
    return [
        (name, f"{passes:.3f}", _both(losses, name))
        for name, passes in (steps[-1]["epoch"].items() if steps else ())
    ]


def _both(lines: Lines, key: str) -> str:
    known = [line[key] for line in lines if line.get(key) is not None]
    return f"{known[0]:.4f}, {known[-1]:.4f}" if known else "not finite"


def _positions(section: PageSection, found: Lines) -> None:
    first = {position: loss for position, loss, _ in ranges_of(found[0])}
    rows = [
        (
            f"{position:,}",
            f"{first[position]:.4f}" if position in first else "",
            f"{loss:.4f}",
            f"{labels:,}",
        )
        for position, loss, labels in ranges_of(found[-1])
    ]
    section.table(["from position", "first", "last", "labels"], rows)
