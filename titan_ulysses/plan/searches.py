"""What a search found: on the console, in plan.json, and as options of the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console

from titan_ulysses.config.schema import in_words
from titan_ulysses.config.toml import show
from titan_ulysses.distributed.hardware import GIB
from titan_ulysses.observability.units import size_text, time_text
from titan_ulysses.plan.fastest import Candidate, Search
from titan_ulysses.plan.planner import Estimate, Setup
from titan_ulysses.plan.run_cost import RunCost, run_cost
from titan_ulysses.plan.search import SearchResult, differs, is_unlimited, what_ends
from titan_ulysses.plan.status_line import LINE


def assignments(changes: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {show(in_words(key, value))}" for key, value in changes.items())


def options(changes: dict[str, Any]) -> str:
    """Return changes as options of the command line."""
    return " ".join(f"--{key} {show(in_words(key, value))}" for key, value in changes.items())


def overrides(setup: Setup, changes: dict[str, Any]) -> str:
    """Return the options of the command line that change setup's config to these settings."""
    config = setup.config
    changed = {key: value for key, value in changes.items() if differs(config, {key: value})}
    return options(changed) or "the settings as they are"


def tell_longest(console: Console, title: str, found: Iterable[SearchResult]) -> list[SearchResult]:
    """Print each result of a search as soon as it is found, since a search takes minutes. Returns
    all results.
    """
    tell = partial(console.print, highlight=False, soft_wrap=True)
    tell(f"[bold]{title}[/] (each verified by simulation)")
    results = []
    try:
        for one in found:
            results.append(one)
            tell(f"  {one.what:<36} {_outcome(one)}", markup=False)
    except KeyboardInterrupt:
        LINE.clear()
        tell("  interrupted: the search ends here")
    return results


def _outcome(one: SearchResult) -> str:
    if one.plan is None:
        return f"left out: {one.left_out}" if one.left_out else "does not fit at any length"
    most = "at least " if is_unlimited(one.plan.setup, one.plan.seq_len) else ""
    return (
        f"{f'{most}{one.plan.seq_len:,}':>11} tokens, a step {time_text(one.plan.time.seconds)}; "
        f"{ending(one.plan)}"
    )


def ending(plan: Estimate) -> str:
    """Return in words what ends a longest sequence."""
    ends = what_ends(plan)
    return {
        "search": "the planner looks no further",
        "time": f"at most {time_text(plan.setup.config.plan.max_step_seconds)} a step",
    }.get(ends, f"the {ends} is full")


def tell_fastest(console: Console, search: Search) -> list[Candidate]:
    """Run a search, print the best settings, and return them. Empty if nothing fits."""
    setup = search.setup
    tell = partial(console.print, highlight=False, soft_wrap=True)
    found = search.run()
    if search.is_interrupted:
        tell(f"interrupted: the best of {len(search.tried)} settings that were tried, as estimated")
    if not found:
        tell(_nothing_fits(search))
        return []
    costs = _costs_of(found)
    for line in _table(found, costs):
        tell(line, markup=False)
    if setup.config.training.global_batch_size == -1:
        tell(
            "[dim]A mesh with more data-parallel ranks trains more sequences in a step. Set "
            "training.global_batch_size to compare steps of as many sequences.[/]"
        )
    for number, one in enumerate(found[1:], start=2):
        tell(f"  {number}: {_difference(found[0], one)}")
    tell(
        f"[bold]The fastest that fits[/], {costs[0].sentence()}: "
        f"{overrides(setup, found[0].changes)}"
    )
    return found


def _costs_of(found: Sequence[Candidate]) -> list[RunCost]:
    # training.steps steps of the fastest mesh, not of the one that setup happens to have.
    tokens = run_cost(found[0].planned).tokens if found else 0
    return [run_cost(one.planned, tokens) for one in found]


def fastest_json(found: Sequence[Candidate]) -> list[dict[str, Any]]:
    return [
        {
            "settings": one.changes,
            "simulated": one.is_simulated,
            "step_seconds": one.planned.time.seconds,
            "tokens_per_step": one.planned.setup.tokens_per_step,
            "gpu_peak_gib": one.planned.gpu_bytes / GIB,
            "host_peak_gib": one.planned.host_bytes / GIB,
        }
        | asdict(cost)
        for one, cost in zip(found, _costs_of(found), strict=True)
    ]


def _table(found: Sequence[Candidate], costs: Sequence[RunCost]) -> list[str]:
    """Return the lines of a table. They are not broken: a log file has no width."""
    first = found[0].estimate
    lines = [
        f"fastest settings for {first.seq_len:,} tokens on {first.setup.world_size} x "
        f"{first.setup.gpu.name}",
        f"     {'replicate x shard x sp':<22} {'sequences':>9} {'a step':>14} {'tokens/s':>10} "
        f"{'the run':>14} {'GPU-hours':>12} {'cost':>14} {'GPU':>10} {'node':>12}",
    ]
    for number, (one, cost) in enumerate(zip(found, costs, strict=True), start=1):
        known, d = one.planned, one.planned.setup.degrees
        mesh = f"{d.replicate} x {d.shard} x {d.sequence}"
        price = "-" if cost.cost is None else f"{cost.cost:,.2f}"
        lines.append(
            f"  {number}  {mesh:<22} {d.global_batch_size:>9} "
            f"{time_text(known.time.seconds):>14} {1 / known.seconds_per_token:>10,.0f} "
            f"{time_text(3600 * cost.hours):>14} {cost.gpu_hours:>12,.1f} {price:>14} "
            f"{size_text(known.gpu_bytes):>10} {size_text(known.host_bytes):>12}  "
            f"{'simulated' if one.is_simulated else 'estimated'}"
        )
    return lines


def _difference(best: Candidate, other: Candidate) -> str:
    """Return what separates another candidate from the best: settings, and the time they cost."""
    changed = {key: value for key, value in other.changes.items() if best.changes[key] != value}

    def per_token(candidate: Candidate) -> dict[str, float]:
        # Of the estimate also where there is a plan, so that only the settings differ.
        one = candidate.estimate
        parts = one.time.parts | {"waits for transfers": max(one.time.waits.values())}
        return {name: seconds / one.setup.tokens_per_step for name, seconds in parts.items()}

    before, after = per_token(best), per_token(other)
    slower = other.planned.seconds_per_token / best.planned.seconds_per_token - 1
    most = max(after, key=lambda name: after[name] - before[name])
    because = f", most of it {most}" if after[most] > before[most] else ""
    return f"{assignments(changed)}: {slower:+.1%} time{because}"


def _nothing_fits(search: Search) -> str:
    """Return a sentence that says that nothing fits, and what comes closest."""
    setup = search.setup
    what = (
        f"training.seq_len = {setup.config.training.seq_len:,} on {setup.world_size} x "
        f"{setup.gpu.name}: none of {len(search.tried)} settings that were tried fits."
    )
    nearest = search.nearest()
    if nearest is None:
        no_mesh = (
            "no mesh divides training.seq_len and training.global_batch_size with at most as many "
            "ranks of a sequence as there are query heads."
        )
        return f"{what} All are refused: {search.refusal or no_mesh}"
    closest = nearest.estimate
    host = f" of {size_text(setup.host_memory)}" if setup.host_memory else ""
    return (
        f"{what} The closest needs {size_text(closest.gpu_bytes)} of "
        f"{size_text(setup.gpu_memory)} on a GPU and {size_text(closest.host_bytes)}{host} on a "
        f"node: {overrides(setup, nearest.changes)}. Use more GPUs (plan.world_size), or shorter "
        "sequences."
    )
