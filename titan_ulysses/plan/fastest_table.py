"""The result of a search for the fastest settings, as a table, as JSON, and as a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from titan_ulysses.config.schema import in_words
from titan_ulysses.config.toml import show
from titan_ulysses.distributed.hardware import GIB
from titan_ulysses.observability.units import size_text, time_text
from titan_ulysses.plan.fastest import Candidate, Search
from titan_ulysses.plan.planner import Setup
from titan_ulysses.plan.run_cost import RunCost, run_cost, tokens_of_run


def tell_fastest(console: Console, search: Search) -> list[dict[str, Any]]:
    """Run a search, print the best settings, and return them as JSON. Empty if nothing fits."""
    setup = search.setup
    found = search.run()
    if not found:
        console.print(_nothing(search), highlight=False, soft_wrap=True)
        return []
    # training.steps steps of the fastest mesh, not of the one that setup happens to have.
    tokens = tokens_of_run(found[0].found.setup)
    costs = [_cost_of(one, tokens) for one in found]
    for line in _table(found, costs):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if setup.config.training.global_batch_size == -1:
        console.print(
            "[dim]A mesh with more data-parallel ranks trains more sequences in a step. Set "
            "training.global_batch_size to compare steps of as many sequences.[/]",
            highlight=False,
            soft_wrap=True,
        )
    for number, one in enumerate(found[1:], start=2):
        console.print(f"  {number}: {_difference(found[0], one)}", highlight=False, soft_wrap=True)
    console.print(
        f"[bold]The fastest that fits[/], {costs[0].sentence()}: {overrides(setup, found[0])}",
        highlight=False,
        soft_wrap=True,
    )
    return [_json(one, cost) for one, cost in zip(found, costs, strict=True)]


def overrides(setup: Setup, candidate: Candidate) -> str:
    """Return the options of the command line that change setup's config to these settings."""
    table = setup.config.model_dump()
    changed = []
    for key, value in candidate.changes.items():
        section, name = key.split(".")
        if table[section][name] != value:
            changed.append(f"--{key} {show(in_words(key, value))}")
    return " ".join(changed) or "the settings as they are"


def _cost_of(candidate: Candidate, tokens: int) -> RunCost:
    return run_cost(
        candidate.found.setup, tokens=tokens, seconds_per_token=candidate.seconds_per_token
    )


def _table(found: Sequence[Candidate], costs: Sequence[RunCost]) -> list[str]:
    """Return the lines of a table. They are not broken: a log file has no width."""
    first = found[0].found.setup
    lines = [
        f"fastest settings for {first.config.training.seq_len:,} tokens on {first.world_size} x "
        f"{first.gpu.name}",
        f"     {'replicate x shard x sp':<22} {'sequences':>9} {'a step':>14} {'tokens/s':>10} "
        f"{'the run':>14} {'GPU-hours':>12} {'cost':>14} {'GPU':>10} {'node':>12}",
    ]
    for number, (one, cost) in enumerate(zip(found, costs, strict=True), start=1):
        d, known = one.found.setup.degrees, one.plan or one.found
        mesh = f"{d.replicate} x {d.shard} x {d.sequence}"
        price = "-" if cost.cost is None else f"{cost.cost:,.2f}"
        lines.append(
            f"  {number}  {mesh:<22} {d.global_batch_size:>9} "
            f"{time_text(known.time.seconds):>14} {1 / one.seconds_per_token:>10,.0f} "
            f"{time_text(3600 * cost.hours):>14} {cost.gpu_hours:>12,.1f} {price:>14} "
            f"{size_text(known.gpu_bytes):>10} {size_text(known.host_bytes):>12}  "
            f"{'simulated' if one.is_simulated else 'estimated'}"
        )
    return lines


def _difference(best: Candidate, other: Candidate) -> str:
    """Return what separates another candidate from the best: settings, and the time they cost."""
    settings = ", ".join(
        f"{key} = {show(in_words(key, value))}"
        for key, value in other.changes.items()
        if best.changes[key] != value
    )
    # Both as estimates, so that only the settings differ.
    a, b = best.found, other.found
    parts = {
        name: seconds / b.setup.tokens_per_step
        - a.time.parts.get(name, 0.0) / a.setup.tokens_per_step
        for name, seconds in b.time.parts.items()
    }
    waits = (max(x.time.waits.values()) / x.setup.tokens_per_step for x in (a, b))
    parts["waits for transfers"] = -next(waits) + next(waits)
    slower = other.seconds_per_token / best.seconds_per_token - 1
    most = max(parts, key=parts.__getitem__)
    because = f", most of it {most}" if parts[most] > 0 else ""
    return f"{settings}: {slower:+.1%} time{because}"


def _nothing(search: Search) -> str:
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
    found = nearest.found
    host = f" of {size_text(setup.host_memory)}" if setup.host_memory else ""
    return (
        f"{what} The closest needs {size_text(found.gpu_bytes)} of "
        f"{size_text(setup.gpu_memory)} on a GPU and {size_text(found.host_bytes)}{host} on a "
        f"node: {overrides(setup, nearest)}. Use more GPUs (plan.world_size), or shorter sequences."
    )


def _json(candidate: Candidate, cost: RunCost) -> dict[str, Any]:
    known = candidate.plan or candidate.found
    return {
        "settings": candidate.changes,
        "simulated": candidate.is_simulated,
        "step_seconds": known.time.seconds,
        "tokens_per_step": candidate.found.setup.tokens_per_step,
        "gpu_peak_gib": known.gpu_bytes / GIB,
        "host_peak_gib": known.host_bytes / GIB,
    } | cost.as_json()
