"""The section of report.html about a plan: what `plan.json` has, for a person."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from titan_ulysses.config.load import dump_toml
from titan_ulysses.config.schema import in_words
from titan_ulysses.config.toml import show
from titan_ulysses.distributed.hardware import GIB
from titan_ulysses.observability.pictures import has_matplotlib
from titan_ulysses.observability.report_page import PageSection, write_page
from titan_ulysses.observability.units import size_text, time_text, time_unit_of
from titan_ulysses.plan.planner import Plan
from titan_ulysses.plan.search import SearchResult
from titan_ulysses.plan.words import component_name, moment_name, tensor_name

_LARGEST = 12


def write_plan_page(
    folder: Path,
    plan: Plan,
    values: dict[str, Any],
    *,
    summary: str,
    steps: Sequence[SearchResult],
) -> Path:
    """Write the section of a plan into report.html of its folder.

    values: those of plan.json. summary: what would fit, in words. steps: those of the ladder.
    """
    section = PageSection("plan")
    setup, config = plan.setup, plan.setup.config
    d = setup.degrees
    verdict = "It fits." if plan.fits else "It does not fit."
    section.text(
        f"{config.training.seq_len:,} tokens on {setup.world_size} x {setup.gpu.name}. {verdict} "
        f"What binds: {plan.bottleneck}."
    )
    if summary:
        section.text(summary)
    rows = [
        ("mesh", f"dp_replicate {d.replicate} x dp_shard {d.shard} x sp {d.sequence}"),
        ("memory of a GPU", f"{size_text(plan.gpu_bytes)} of {size_text(setup.gpu_memory)}"),
        ("host memory of a node", _of(plan.host_bytes, setup.host_memory)),
        ("a step", f"{time_text(plan.time.seconds)}, MFU {plan.mfu:.1%}"),
    ]
    if values["longest_seq_len"] is not None:
        exact = "" if values["longest_seq_len_verified"] else "about "
        rows.append(("longest sequence", f"{exact}{values['longest_seq_len']:,} tokens"))
    section.table(["", ""], rows)
    _memory(section, plan, values)
    _time(section, plan)
    _what_would_fit(section, values, steps)
    if plan.notes:
        section.heading("Notes")
        section.text(*plan.notes)
    section.folded("The settings", dump_toml(config))
    return write_page(folder, section, title=config.job.name)


def _of(size: float, limit: float | None) -> str:
    return f"{size_text(size)} of {size_text(limit)}" if limit else size_text(size)


def _memory(section: PageSection, plan: Plan, values: dict[str, Any]) -> None:
    section.heading("Memory of one GPU over the step")
    if has_matplotlib():
        from titan_ulysses.plan import plots

        section.figure("By part, over the planned time of a step", partial(plots.timeline, plan))
        at_peak = {component_name(k): v for k, v in values["components"].items()}
        section.heading("Memory at the peak, by part")
        section.figure(
            f"The peak is in {moment_name(plan.peak.moment)}",
            partial(plots.parts, at_peak, unit=1.0, label="GiB on one GPU"),
        )
    rows = [
        (component_name(name), size_text(size * GIB), f"{size * GIB / plan.gpu_bytes:.1%}")
        for name, size in sorted(values["components"].items(), key=lambda one: -one[1])
        if size
    ]
    section.table(["part", "size", "share"], rows)
    section.heading("The largest tensors then")
    alive = sorted(plan.peak.alive.items(), key=lambda one: -one[1])[:_LARGEST]
    largest = [
        (tensor_name(tensor), "x".join(map(str, tensor.shape)) or "one", size_text(size))
        for tensor, size in alive
    ]
    section.table(["tensor", "shape", "size"], largest)
    if plan.host_bytes:
        section.heading("Host memory of a node")
        host = [(name, size_text(size)) for name, size in plan.host_components.items()]
        section.table(["part", "size"], host)


def _time(section: PageSection, plan: Plan) -> None:
    section.heading("Time of a step")
    time_ = plan.time
    unit, name = time_unit_of(time_.seconds)
    waits = {f"waiting for {what}": seconds for what, seconds in time_.waits.items()}
    longest = max(waits, key=waits.__getitem__)
    one_after_the_other = time_.parts | {longest: waits[longest]}
    if has_matplotlib():
        from titan_ulysses.plan import plots

        section.figure(
            "One after the other",
            partial(plots.parts, one_after_the_other, unit=unit, label=f"planned {name}"),
        )
    rows = [(what, time_text(seconds), "") for what, seconds in one_after_the_other.items()]
    rows += [
        (what, time_text(seconds), "at the same time") for what, seconds in time_.hidden.items()
    ]
    section.table(["part", "time", ""], [row for row in rows if row[1] != time_text(0)])


def _what_would_fit(
    section: PageSection, values: dict[str, Any], steps: Sequence[SearchResult]
) -> None:
    if steps:
        section.heading("Ladder: the longest sequence, feature by feature")
        if has_matplotlib():
            from titan_ulysses.plan import plots

            section.figure("Tokens of the longest sequence that fits", partial(plots.ladder, steps))
    for key, title in (("ladder", "The steps"), ("search", "What would fit")):
        if not values[key]:
            continue
        section.heading(title)
        rows = [
            (
                one["what"],
                f"{one['seq_len']:,}" if one["seq_len"] else "-",
                time_text(one["step_seconds"]) if one["seq_len"] else "-",
                size_text(one["gpu_peak_gib"] * GIB) if one["seq_len"] else "-",
                _options(one["settings"]),
            )
            for one in values[key]
        ]
        section.table(["", "tokens", "a step", "a GPU", "settings"], rows)
    if values["fastest"]:
        section.heading("The fastest settings that fit")
        fastest = [
            (
                "simulated" if one["simulated"] else "estimated",
                time_text(one["step_seconds"]),
                f"{one['tokens_per_step'] / one['step_seconds']:,.0f}",
                size_text(one["gpu_peak_gib"] * GIB),
                _options(one["settings"]),
            )
            for one in values["fastest"]
        ]
        section.table(["", "a step", "tokens/s", "a GPU", "settings"], fastest)


def _options(settings: dict[str, Any]) -> str:
    return " ".join(f"--{key} {show(in_words(key, value))}" for key, value in settings.items())
