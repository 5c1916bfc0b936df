"""Pictures of runs, from their metrics.jsonl: loss, memory, speed, balance, loss by position.

Each is drawn of one run or several. Matplotlib is imported only where something is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.observability.pictures import COLORS, picture

Lines = list[dict[str, Any]]
MARKERS = "os^Dv*P"
STEPS = "optimizer step"
_SMOOTHED = 100
"""A curve with at least this many points is shown with its running mean, over a fiftieth of them.
"""


def read_runs(folders: list[Path]) -> dict[str, Lines]:
    """Read each run's metrics.jsonl: its lines by the run's name. UserError where one has none."""
    runs: dict[str, Lines] = {}
    for folder in folders:
        try:
            text = (folder / "metrics.jsonl").read_text()
        except OSError as error:
            raise UserError(
                f"{folder}/metrics.jsonl: {error.strerror}. Give the folder of a run, "
                "<job.dump_folder>/<job.name>."
            ) from error
        # The last line may be incomplete, where the run is still going on.
        whole = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            raise UserError(f"{folder}/metrics.jsonl is empty: the run has logged nothing yet.")
        name = folder.resolve().name
        runs[str(folder) if name in runs else name] = lines
    return runs


def values(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    """Return (steps, values) of the lines that have a value for key."""
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


class StyledRun(NamedTuple):
    """A run and how it is drawn."""

    name: str
    lines: Lines
    marker: str
    style: dict[str, Any]
    """its colour and width: where runs coincide, the earlier one is a rim around the later one"""


def drawn(runs: dict[str, Lines]) -> Iterator[StyledRun]:
    """Give each run its own colour, line width and marker."""
    rim = min(2.2, 8 / len(runs))
    for number, (name, lines) in enumerate(runs.items()):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        width = 1.6 + rim * (len(runs) - 1 - number)
        style = {"color": color, "linewidth": width, "markersize": 4 + 1.5 * width}
        yield StyledRun(name, lines, marker, style)


def curve(axes: Any, run: StyledRun, key: str, *, label: str) -> None:
    """Draw the values of key over steps. Many values are drawn pale, with their running mean."""
    steps, found = values(run.lines, key)
    if len(steps) < _SMOOTHED:
        line = run.marker + "-" if len(steps) < 30 else "-"
        axes.plot(steps, found, line, label=label, **run.style)
        return
    import numpy as np

    width = len(steps) // 50
    mean = np.convolve(found, np.ones(width) / width, mode="valid")
    axes.plot(steps, found, color=run.style["color"], alpha=0.25, linewidth=0.8)
    axes.plot(steps[width // 2 :][: len(mean)], mean, label=label, **run.style)


def finish(figure: Any, axes: Any, *, ylabel: str, xlabel: str = STEPS) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if xlabel == STEPS:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if handles and not figure.legends:
        # Below the axes, where the legend covers no curve.
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(3, len(handles)), frameon=False
        )


def loss_label(runs: dict[str, Lines]) -> str:
    """Return what the losses of runs are, with their unit if all have the same."""
    of_pairs = {
        "rewards" in line or "validation_rewards" in line
        for lines in runs.values()
        for line in lines
        if "loss" in line or "validation_loss" in line
    }
    if len(of_pairs) > 1:
        return "loss"
    return "loss, nats a pair" if True in of_pairs else "loss, nats a token"


def draw_loss(runs: dict[str, Lines], path: Path | IO[str]) -> None:
    with picture(path, size=(9, 5)) as (figure, axes):
        for run in drawn(runs):
            curve(axes, run, "loss", label=f"{run.name}: training")
            steps, losses = values(run.lines, "validation_loss")
            if steps:
                style = run.style | {"markerfacecolor": "white", "label": f"{run.name}: validation"}
                axes.plot(steps, losses, run.marker + "--", **style)
        finish(figure, axes, ylabel=loss_label(runs))


def draw_sets(runs: dict[str, Lines], path: Path | IO[str]) -> None:
    """Draw the loss of each named validation set: of one run in a colour each, of several in a
    line style each.
    """
    with picture(path, size=(9, 5)) as (figure, axes):
        for run in drawn(runs):
            lines = [line for line in run.lines if line.get("validation_sets")]
            for number, name in enumerate(lines[-1]["validation_sets"] if lines else ()):
                found = [
                    (x["step"], x["validation_sets"][name]["loss"])
                    for x in lines
                    if name in x["validation_sets"]
                ]
                marker, line = MARKERS[number % len(MARKERS)], ("-", "--", ":", "-.")[number % 4]
                style = run.style | {"label": f"{run.name}: {name}"}
                if len(runs) == 1:
                    style["color"] = COLORS[number % len(COLORS)]
                axes.plot(*zip(*found, strict=True), marker + line, **style)
        finish(figure, axes, ylabel=f"validation {loss_label(runs)}")


def begin_at_zero(axes: Any) -> None:
    """Let the y axis begin at 0, with room above the highest value also where all are alike."""
    axes.update_datalim([(0, 0)], updatex=False)
    axes.autoscale_view(scalex=False)
    axes.set_ylim(0, None)


def draw_memory(runs: dict[str, Lines], path: Path | IO[str]) -> None:
    with picture(path, size=(9, 4.5)) as (figure, axes):
        for run in drawn(runs):
            axes.plot(
                *values(run.lines, "peak_memory_gib"), label=f"{run.name}: measured", **run.style
            )
            steps, planned = values(run.lines, "planned_memory_gib")
            if steps:
                axes.plot(steps, planned, ":", label=f"{run.name}: planned", **run.style)
        begin_at_zero(axes)
        finish(figure, axes, ylabel="peak memory of a rank so far, GiB")


def draw_speed(runs: dict[str, Lines], path: Path | IO[str]) -> None:
    with picture(path, size=(9, 7), panels=(2, 1)) as (figure, panels):
        keys = {"tokens_per_second": "tokens a second, all ranks", "step_seconds": "seconds a step"}
        for axes, (key, label) in zip(panels, keys.items(), strict=True):
            for run in drawn(runs):
                curve(axes, run, key, label=run.name)
            begin_at_zero(axes)
            finish(figure, axes, ylabel=label)


def draw_balance(runs: dict[str, Lines], path: Path | IO[str]) -> None:
    """Draw how many times as long attention takes as if it were spread evenly over the ranks."""
    with picture(path, size=(9, 3.5)) as (figure, axes):
        for run in drawn(runs):
            curve(axes, run, "balance", label=run.name)
        axes.axhline(1, color="black", linewidth=0.6, linestyle=":")
        finish(figure, axes, ylabel="attention, times evenly spread")


def draw_positions(runs: dict[str, Lines], path: Path | IO[str]) -> None:
    """Draw the loss by position, of each run's first validation (dashed) and its last (solid)."""
    import numpy as np
    from matplotlib.ticker import LogLocator

    firsts = sorted(
        {
            first
            for lines in runs.values()
            for line in validations(lines)
            for first, *_ in ranges_of(line)
        }
    )
    places = {first: place for place, first in enumerate(firsts)}
    with picture(path, size=(9, 5)) as (figure, axes):
        for run in drawn(runs):
            found = validations(run.lines)
            for line in [*found[:1], *found[1:][-1:]]:
                dashes, face = ("--", "white") if line is found[0] else ("-", run.style["color"])
                x, losses = zip(
                    *((places[first], loss) for first, loss, _ in ranges_of(line)), strict=True
                )
                style = run.style | {
                    "markerfacecolor": face,
                    "label": f"{run.name}: step {line['step']}",
                }
                axes.plot(x, losses, run.marker + dashes, **style)
        axes.set_xticks(
            range(len(firsts)),
            [f"{first:,}" for first in firsts],
            rotation=45 if len(firsts) > 12 else 0,
        )
        right = axes.secondary_yaxis(
            "right", functions=(np.exp, lambda x: np.log(np.maximum(x, 1e-9)))
        )
        right.set_ylabel("perplexity")
        # Between two of these ticks the locator falls back to evenly spaced ones.
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter(lambda x, _: f"{x:,.4g}" if x < 1000 else f"{x:,.0f}")
        finish(
            figure,
            axes,
            ylabel="validation loss, nats a token",
            xlabel="position in the document, from ... on",
        )


def validations(lines: Lines) -> Lines:
    return [line for line in lines if line.get("validation_by_position") and ranges_of(line)]


def ranges_of(line: dict[str, Any]) -> list[tuple[int, float, int]]:
    """Return (first position, mean loss, number of labels) of each range of positions whose loss
    is finite.
    """
    return [one for one in line["validation_by_position"] if one[1] is not None]
