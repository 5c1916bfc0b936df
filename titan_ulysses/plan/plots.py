"""The planner's pictures. Imported only where matplotlib is installed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps

from titan_ulysses.pictures import COLORS, picture
from titan_ulysses.plan.hardware import GIB
from titan_ulysses.plan.planner import Plan
from titan_ulysses.plan.search import Found

_POINTS = 2000


def timeline(plan: Plan, path: Path, components: Sequence[str]) -> None:
    """GPU memory through the step, stacked by component, over the operations that change it."""
    memory, start = plan.simulation.memory, plan.simulation.start
    alive: Counter[str] = Counter()
    for allocation, change in memory.events[:start]:
        if allocation.place == "device":
            alive[allocation.component] += change
    every = max(1, (len(memory.events) - start) // _POINTS)
    rows, phases = [], []
    highest, its_row = 0, None
    for index, (allocation, change) in enumerate(memory.events[start:]):
        if allocation.place == "device":
            alive[allocation.component] += change
        total = sum(alive.values())
        if total > highest:  # of the events between two points the highest is shown
            highest, its_row = total, [alive[c] for c in components]
        if index % every == every - 1:
            rows.append(its_row or [alive[c] for c in components])
            phases.append(memory.moments[start + index].phase)
            highest, its_row = 0, None
    heights = np.array(rows).T / GIB
    with picture(path, size=(10, 5)) as (_, axes):
        colors = colormaps["tab20"].colors
        axes.stackplot(np.arange(len(rows)), heights, labels=components, colors=colors[: len(components)], linewidth=0)
        backward = next((i for i, phase in enumerate(phases) if phase in ("backward", "recomputation")), None)
        update = next((i for i, phase in enumerate(phases) if phase == "optimizer"), None)
        for name, place in (("backward", backward), ("optimizer", update)):
            if place is not None:
                axes.axvline(place, color="black", linewidth=0.6, linestyle=":")
                axes.text(place, 1.0, f" {name}", va="bottom", fontsize=8, transform=axes.get_xaxis_transform())
        reserved = sum(reserve.bytes for reserve in plan.reserves) / GIB
        axes.axhline(plan.setup.gpu_memory / GIB - reserved, color=COLORS[1], linewidth=1)
        axes.text(0, plan.setup.gpu_memory / GIB - reserved, " what the GPU has for tensors", va="top", fontsize=8)
        axes.set(xlim=(0, max(1, len(rows) - 1)), xlabel="operations of a step", ylabel="GiB on one GPU")
        axes.set_title(
            f"{plan.setup.config.job.name}: {plan.setup.config.training.seq_len:,} tokens", fontsize=10, pad=16
        )
        handles, names = axes.get_legend_handles_labels()
        used = [(h, n) for h, n, row in zip(handles, names, heights, strict=True) if row.max() > 0.005 * heights.max()]
        axes.legend(*zip(*reversed(used), strict=True), loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def ladder(steps: Sequence[Found], path: Path) -> None:
    """The longest sequence of each step of the feature ladder, on a logarithmic axis."""
    lengths = [step.need.seq_len if step.need else 0 for step in steps]
    with picture(path, size=(8, 0.6 * len(steps) + 1.2)) as (_, axes):
        places = np.arange(len(steps))[::-1]
        axes.barh(places, [max(1, length) for length in lengths], color=COLORS[0])
        for place, length in zip(places, lengths, strict=True):
            axes.text(max(1, length), place, f" {length:,}", va="center", fontsize=9)
        axes.set_yticks(places, [step.what for step in steps])
        axes.set_xscale("log")
        least = min([length for length in lengths if length], default=1)
        axes.set_xlim(least / 3, max(*lengths, 2) * 6)
        axes.set_xlabel("tokens of the longest sequence that fits")
