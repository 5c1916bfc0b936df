"""The section of report.html about a plan: what `plan.json` has, for a person."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from titan_ulysses.config.load import dump_toml
from titan_ulysses.distributed.hardware import GIB
from titan_ulysses.observability.report_page import PageSection, write_page
from titan_ulysses.observability.units import size_text, time_text, time_unit_of
from titan_ulysses.plan import plots
from titan_ulysses.plan.console import component_rows, gpu_components, largest
from titan_ulysses.plan.names import component_name, moment_name
from titan_ulysses.plan.planner import Plan
from titan_ulysses.plan.search import SearchResult
from titan_ulysses.plan.searches import options


def write_plan_page(
    folder: Path,
    plan: Plan,
    values: dict[str, Any],
    *,
    summary: str,
    steps: Sequence[SearchResult],
) -> Path:
    """Write the section of a plan into report.html of its folder, and its pictures beside it.

    values: those of plan.json. summary: what would fit, in words. steps: those of the ladder.
    """
    section, setup = PageSection("plan"), plan.setup
    verdict = "It fits." if plan.fits else "It does not fit."
    section.text(
        f"{plan.seq_len:,} tokens on {setup.world_size} x {setup.gpu.name}. {verdict} "
        f"What binds: {plan.bottleneck}."
    )
    if summary:
        section.text(summary)
    host = f" of {size_text(setup.host_memory)}" if setup.host_memory else ""
    rows = [
        ("mesh", setup.mesh),
        ("memory of a GPU", f"{size_text(plan.gpu_bytes)} of {size_text(setup.gpu_memory)}"),
        ("host memory of a node", f"{size_text(plan.host_bytes)}{host}"),
        *([("files of a node", size_text(plan.disk_bytes))] if plan.disk_bytes else []),
        ("a step", f"{time_text(plan.time.seconds)}, MFU {plan.mfu:.1%}"),
    ]
    if values["longest_seq_len"] is not None:
        exact = "" if values["longest_seq_len_verified"] else "about "
        rows.append(("longest sequence", f"{exact}{values['longest_seq_len']:,} tokens"))
    section.table(["", ""], rows)
    _memory(section, plan, folder)
    _time(section, plan)
    _what_would_fit(section, values, steps, folder)
    if plan.notes:
        section.heading("Notes")
        section.text(*plan.notes)
    section.folded("The settings", dump_toml(setup.config))
    return write_page(folder, section, title=setup.config.job.name)


def _memory(section: PageSection, plan: Plan, folder: Path) -> None:
    section.heading("Memory of one GPU over the step")
    draw = partial(plots.timeline, plan, folder / "plan_memory.png")
    section.figure("By part, over the planned time of a step", draw)
    section.heading("Memory at the peak, by part")
    section.figure(
        f"The peak is in {moment_name(plan.peak.moment)}",
        partial(
            plots.parts,
            {component_name(name): size for name, size in gpu_components(plan).items()},
            unit=GIB,
            label="GiB on one GPU",
        ),
    )
    section.table(["part", "size", "share"], component_rows(plan))
    section.heading("The largest tensors then")
    rows = [(name, shape or "one", size) for size, name, shape in largest(plan, 12)]
    section.table(["tensor", "shape", "size"], rows)
    if plan.host_bytes:
        section.heading("Host memory of a node")
        host = [(name, size_text(size)) for name, size in plan.host_components.items()]
        section.table(["part", "size"], host)


def _time(section: PageSection, plan: Plan) -> None:
    section.heading("Time of a step")
    time_ = plan.time
    unit, name = time_unit_of(time_.seconds)
    longest = max(time_.waits, key=time_.waits.__getitem__)
    in_order = time_.parts | {f"waiting for {longest}": time_.waits[longest]}
    section.figure(
        "One after the other", partial(plots.parts, in_order, unit=unit, label=f"planned {name}")
    )
    rows = [(what, time_text(seconds), "") for what, seconds in in_order.items()]
    rows += [(what, time_text(s), "at the same time") for what, s in time_.hidden.items()]
    section.table(["part", "time", ""], [row for row in rows if row[1] != time_text(0)])


def _what_would_fit(
    section: PageSection, values: dict[str, Any], steps: Sequence[SearchResult], folder: Path
) -> None:
    if steps:
        section.heading("Ladder: the longest sequence, feature by feature")
        draw = partial(plots.ladder, steps, folder / "plan_ladder.png")
        section.figure("Tokens of the longest sequence that fits", draw)
    for key, title in (("ladder", "The steps"), ("search", "What would fit")):
        if not values[key]:
            continue
        section.heading(title)
        rows = []
        for one in values[key]:
            numbers = ("-", "-", "-")
            if length := one["seq_len"]:
                size = size_text(one["gpu_peak_gib"] * GIB)
                numbers = (f"{length:,}", time_text(one["step_seconds"]), size)
            rows.append((one["what"], *numbers, options(one["settings"])))
        section.table(["", "tokens", "a step", "a GPU", "settings"], rows)
    if values["fastest"]:
        section.heading("The fastest settings that fit")
        fastest = [
            (
                "simulated" if one["simulated"] else "estimated",
                time_text(one["step_seconds"]),
                f"{one['tokens_per_step'] / one['step_seconds']:,.0f}",
                size_text(one["gpu_peak_gib"] * GIB),
                options(one["settings"]),
            )
            for one in values["fastest"]
        ]
        section.table(["", "a step", "tokens/s", "a GPU", "settings"], fastest)
