"""The planner's pictures. They are drawn only where matplotlib is installed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from titan_ulysses.observability.pictures import COLORS, picture
from titan_ulysses.observability.units import size_text, time_text, time_unit_of, unit_of
from titan_ulysses.plan.names import COMPONENT_NAMES, component_name
from titan_ulysses.plan.planner import Plan
from titan_ulysses.plan.search import SearchResult
from titan_ulysses.plan.searches import ending

_COLUMNS = 1000
"""Columns of the timeline. Each shows the highest moment of its part of the step."""
_VISIBLE = 1e-3
"""The share of a whole from which on a part has a bar."""
_HOUR = 3600.0
_IN_SIGHT = 4
"""The GPU's limit is drawn as a line if it is less than this many times as high as the peak."""


class Timeline(NamedTuple):
    """The memory of one GPU over the time of a step."""

    ends: list[float]
    """seconds at which each column ends"""
    alive: list[Counter[str]]
    """for each column, bytes by component at its highest moment"""
    begins: list[tuple[str, float]]
    """(what begins, seconds): the backward pass of each micro-batch, and the update, which is
    clipping and the optimizer
    """
    peak: tuple[float, int]
    """seconds and bytes of the highest moment"""


def timeline_of(plan: Plan) -> Timeline:
    """Compute the GPU's memory over the planned time of a step, column by column."""
    events, start = plan.simulation.memory.events, plan.simulation.start
    width = (plan.clock[-1][1] or 1.0) / _COLUMNS
    changes = np.array([change if one.place == "device" else 0 for one, change in events])
    # Of the events of the step: when each happens, and in which column.
    numbers, seconds = (np.array(values) for values in zip(*plan.clock, strict=True))
    over = np.searchsorted(numbers, np.arange(start, len(events)), side="right")
    now = np.where(over > 0, seconds[over - 1], 0.0)
    column = np.clip(np.ceil(now / width), 1, _COLUMNS) - 1
    # The number of events before the highest moment of each column.
    totals, edges = changes.cumsum()[start - 1 :], np.arange(_COLUMNS)
    bounds = np.stack([np.searchsorted(column, edges, side=side) for side in ("left", "right")])
    highest = [a + int(totals[a : b + 1].argmax()) for a, b in bounds.T.tolist()]
    columns: list[Counter[str]] = [Counter() for _ in edges]
    numbers_of = {name: i for i, name in enumerate(dict.fromkeys(x.component for x, _ in events))}
    component = np.array([numbers_of[one.component] for one, _ in events])
    for name, number in numbers_of.items():
        sizes = np.where(component == number, changes, 0).cumsum()[start - 1 :][highest]
        for counter, size in zip(columns, sizes.tolist(), strict=True):
            counter[name] = size
    ends = [width * (index + 1) for index in range(_COLUMNS)]
    return Timeline(
        ends, columns, _begins(plan), (plan.seconds_at(plan.peak.event), plan.peak.bytes)
    )


def _begins(plan: Plan) -> list[tuple[str, float]]:
    begins = []
    stage, ended, backward_ended = "forward", 0.0, 0.0
    for tick, (_, end) in zip(plan.simulation.ticks, plan.clock, strict=True):
        if tick.stage == "backward":
            if stage == "forward":
                begins.append(("backward", ended))
            backward_ended = end
        if tick.stage != "update":
            stage = tick.stage
        ended = end
    return [*begins, ("update", backward_ended)]


def timeline(plan: Plan, *paths: Path | IO[str]) -> None:
    """Draw GPU memory over the planned time of a step, stacked by component, and mark its peak."""
    from matplotlib import colormaps

    setup, line = plan.setup, timeline_of(plan)
    unit, unit_name = unit_of(line.peak[1])
    time_unit, time_name = time_unit_of(line.ends[-1])
    present = [name for name in COMPONENT_NAMES if any(column[name] for column in line.alive)]
    heights = np.array([[column[name] / unit for column in line.alive] for name in present])
    ends = np.array([0.0, *line.ends]) / time_unit
    when, peak = line.peak[0] / time_unit, line.peak[1] / unit
    limit = (setup.gpu_memory - sum(reserve.bytes for reserve in setup.reserves)) / unit
    drawn, batches = plan.simulation.batches, setup.degrees.accumulation_steps
    part = f" (the first {drawn} of {batches} batches, and the update)" if batches > drawn else ""
    with picture(*paths, size=(10, 5)) as (_, axes):
        stacked = np.concatenate([heights[:, :1], heights], axis=1)
        names = [component_name(name) for name in present]
        # Each component has its colour, whatever others there are.
        colors = [colormaps["tab20"]([*COMPONENT_NAMES].index(name)) for name in present]
        axes.stackplot(ends, stacked, labels=names, colors=colors, linewidth=0, step="pre")
        axes.set(
            xlim=(0, ends[-1]),
            ylim=(0, 1.15 * (max(limit, peak) if limit < _IN_SIGHT * peak else peak)),
            xlabel=f"planned time in the step, {time_name}{part}",
            ylabel=f"{unit_name} on one GPU",
        )
        _mark(axes, line, time_unit)
        _mark_limit(axes, limit, peak, unit)
        axes.plot([when], [peak], marker="v", color="black", clip_on=False)
        on_the_left = when > ends[-1] / 2
        axes.annotate(
            f"peak: {size_text(line.peak[1])} of tensors",
            (when, peak),
            xytext=(-8 if on_the_left else 8, 5),
            textcoords="offset points",
            ha="right" if on_the_left else "left",
            fontsize=8,
        )
        title = f"{setup.config.job.name}: {plan.seq_len:,} tokens on {setup.world_size} x "
        axes.set_title(f"{title}{setup.gpu.name}", fontsize=10, pad=16)
        # The components that can be seen, in the order of the picture from top to bottom.
        handles = axes.get_legend_handles_labels()[0]
        shown = [at for at, row in enumerate(heights) if row.max() > 0.005 * peak][::-1]
        axes.legend(
            [handles[at] for at in shown],
            [names[at] for at in shown],
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            fontsize=8,
        )


def _mark(axes: Any, line: Timeline, time_unit: float) -> None:
    """Mark where backward and the update begin."""
    above = axes.get_xaxis_transform()
    for name, seconds in line.begins:
        place, side = seconds / time_unit, "right" if seconds > 0.9 * line.ends[-1] else "left"
        axes.axvline(place, color="black", linewidth=0.6, linestyle=":")
        axes.text(place, 1.0, f" {name} ", ha=side, va="bottom", fontsize=8, transform=above)


def _mark_limit(axes: Any, limit: float, peak: float, unit: float) -> None:
    """Show the memory that the GPU has for tensors: as a line, or as text where the line would be
    far above the peak. limit and peak are in `unit` bytes.
    """
    if limit < _IN_SIGHT * peak:
        axes.axhline(limit, color=COLORS[1], linewidth=1)
        axes.text(0, limit, " what the GPU has for tensors", va="bottom", fontsize=8)
    else:
        words = (
            f" the GPU has {size_text(limit * unit)} for tensors, {limit / peak:,.0f} times the "
            "peak"
        )
        axes.text(0, 0.98, words, va="top", fontsize=8, transform=axes.transAxes)


def ladder(
    steps: Sequence[SearchResult],
    *paths: Path | IO[str],
    theirs: Sequence[int | None] = (),
    of_theirs: str = "",
    title: str = "",
) -> None:
    """Draw the longest sequence of each step of the feature ladder, on a logarithmic axis, with
    what ends it and how long a step takes. What a step of an hour can have is darker.

    theirs: lengths that others measured, beside ours; of_theirs: who.
    """
    lengths = [step.plan.seq_len if step.plan else 0 for step in steps]
    width = 0.38 if theirs else 0.8
    with picture(*paths, size=(11, (0.65 if theirs else 0.6) * len(steps) + 1.6)) as (_, axes):
        places = np.arange(len(steps))[::-1].astype(float)
        if theirs:
            measured = [(at, n) for at, n in zip(places, theirs, strict=True) if n]
            axes.barh(*zip(*measured, strict=True), height=width, color=COLORS[4], label=of_theirs)
            for place, length in measured:
                axes.text(length, place, f" {length:,}", va="center", fontsize=9)
            places -= 0.4
        in_an_hour = [_in_an_hour(step.plan) if step.plan else 0 for step in steps]
        longest = [max(1, length) for length in lengths]
        label = "titan_ulysses, planned: simulated"
        axes.barh(places, longest, height=width, color=COLORS[0], alpha=0.55, label=label)
        label = "of it, in steps of at most an hour"
        axes.barh(places, in_an_hour, height=width, color=COLORS[0], label=label)
        for place, length, step in zip(places, longest, steps, strict=True):
            text = " does not fit"
            if step.plan:
                seconds = time_text(step.plan.time.seconds)
                text = f" {length:,}: {ending(step.plan)}, {seconds} a step"
            axes.text(length, place, text, va="center", fontsize=9)
        axes.set_yticks(places + (0.2 if theirs else 0), [step.what for step in steps])
        axes.set_xscale("log")
        least = min([n for n in (*lengths, *theirs) if n], default=1)
        # Room for the text behind the longest bar, of half the width of the picture.
        axes.set_xlim(least / 3, max(*lengths, 2) ** 2 / least * 3)
        axes.set_xlabel("tokens of the longest sequence that fits (logarithmic)")
        axes.set_title(title, fontsize=10)
        axes.legend(loc="upper right", frameon=False, fontsize=9)


def _in_an_hour(plan: Plan) -> float:
    """Return the tokens of a plan's sequence with which a step takes at most an hour: attention
    takes time by the square of the length, all else by the length.
    """
    square = plan.time.parts["attention"]
    rest = plan.time.seconds - square
    share = (sqrt(rest**2 + 4 * square * _HOUR) - rest) / (2 * square) if square else 1.0
    return plan.seq_len * min(1.0, share)


def parts(values: Mapping[str, float], path: Path | IO[str], *, unit: float, label: str) -> None:
    """Draw what a whole is made of as bars, the largest on top, without parts that cannot be seen.

    Values are divided by unit.
    """
    least = _VISIBLE * sum(values.values())
    shown = sorted(((v, name) for name, v in values.items() if v and v >= least), reverse=True)
    with picture(path, size=(8, 0.32 * len(shown) + 1.6)) as (_, axes):
        places = np.arange(len(shown))[::-1]
        axes.barh(places, [value / unit for value, _ in shown], color=COLORS[0])
        for place, (value, _) in zip(places, shown, strict=True):
            axes.text(value / unit, place, f" {value / unit:.3g}", va="center", fontsize=8)
        axes.set_yticks(places, [name for _, name in shown], fontsize=9)
        axes.margins(x=0.12)
        axes.set_xlabel(label)
