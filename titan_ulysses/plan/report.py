"""The output of `--plan`: tables on the console, plan.json, pictures, a summary in plain words."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from titan_ulysses.config.schema import Config
from titan_ulysses.config.toml import show
from titan_ulysses.distributed.atomic import whole_file
from titan_ulysses.distributed.hardware import GIB
from titan_ulysses.observability.pictures import has_matplotlib
from titan_ulysses.observability.units import size_text, time_text
from titan_ulysses.plan.fastest import Search
from titan_ulysses.plan.fastest_table import tell_fastest
from titan_ulysses.plan.page import write_plan_page
from titan_ulysses.plan.planner import (
    Plan,
    Setup,
    check_idle,
    check_nodes,
    make_plan,
    set_up,
)
from titan_ulysses.plan.run_cost import RunCost, grace_of, run_cost, tokens_of_run
from titan_ulysses.plan.search import (
    SearchResult,
    estimate,
    is_unlimited,
    ladder,
    search,
    with_settings,
)
from titan_ulysses.plan.words import component_name, kernel_name, moment_name, tensor_name

_LARGEST = 6
"""How many tensors of the peak are listed."""
_SHORT = 1.0
"""Seconds. In shorter steps, kernels may be too small to hide the time of their launch."""


def plan_and_report(config: Config) -> None:
    """Plan config, print the plan, and write plan.json and pictures to <dump_folder>/<name>.

    UserError where config cannot be planned.
    """
    started = time.perf_counter()
    console = Console()
    setup = set_up(config)
    plan = make_plan(setup)
    folder = Path(config.job.dump_folder) / config.job.name
    folder.mkdir(parents=True, exist_ok=True)
    say(console, plan)
    found = (
        tell_each(console, "longest sequences that fit", search(setup, plan))
        if config.plan.search == "longest"
        else []
    )
    fastest = tell_fastest(console, Search(setup)) if config.plan.search == "fastest" else []
    first = found[0] if found else None
    rungs = "longest sequences with ALST's features, one after the other"
    steps = tell_each(console, rungs, ladder(setup, first)) if config.plan.ladder else []
    best = None
    if config.plan.search != "fastest":
        best = (first.need.seq_len if first.need else 0) if first else estimate(plan)
    values = as_json(plan) | {
        "longest_seq_len": best,
        "longest_seq_len_verified": bool(found),
        "longest_seq_len_is_at_least": best is not None and is_unlimited(setup, best),
        "search": [_found_json(one) for one in found],
        "ladder": [_found_json(one) for one in steps],
        "fastest": fastest,
    }
    with whole_file(folder / "plan.json") as partial:
        partial.write_text(json.dumps(values, indent=2))
    pictures = _draw(plan, steps, folder)
    summary = closing(plan, best, found) if best is not None else ""
    if summary:
        console.print(summary, highlight=False, soft_wrap=True)
    write_plan_page(folder, plan, values, summary=Text.from_markup(summary).plain, steps=steps)
    console.print(
        f"[dim]{folder}/report.html, plan.json{pictures}; planned in "
        f"{time_text(time.perf_counter() - started)}[/]",
        highlight=False,
        soft_wrap=True,
    )


# --- the console ----------------------------------------------------------------------------------


def say(console: Console, plan: Plan) -> None:
    """Print everything about one plan."""
    setup, config = plan.setup, plan.setup.config
    d, t = setup.degrees, config.training

    def tell(line: str, **style: Any) -> None:
        console.print(line, highlight=False, soft_wrap=True, **style)

    tell(
        f"[bold]{config.job.name}[/] planned for {setup.world_size} x {setup.gpu.name} "
        f"({size_text(setup.gpu_memory)} each, {config.plan.gpus_per_node} a node)"
    )
    tell(
        f"mesh: dp_replicate {d.replicate} x dp_shard {d.shard} x sp {d.sequence}; {t.seq_len:,} "
        f"tokens a sequence, {t.seq_len // d.sequence:,} a rank"
    )
    if idle := check_idle(plan):
        tell(f"[bold]{idle}[/]")
    if across := check_nodes(setup):
        tell(f"[bold]{across}[/]")
    for note in plan.notes:
        tell(f"[dim]{note}[/]")
    console.print(_components(plan))
    tell(f"The peak is in {moment_name(plan.peak.moment)}. The largest tensors then:")
    for line in largest(plan):
        tell(f"  {line}", markup=False)
    if plan.host_bytes:
        limit_of_it = f" of {size_text(setup.host_memory)}" if setup.host_memory else ""
        parts = ", ".join(
            f"{name} {size_text(size)}" for name, size in plan.host_components.items()
        )
        tell(f"host memory of a node: {size_text(plan.host_bytes)}{limit_of_it} ({parts})")
    for line in time_lines(plan):
        tell(line)
    tell(cost_of(plan).sentence())
    tell(grace_of(plan).sentence())


def cost_of(plan: Plan) -> RunCost:
    """Return what a run with the settings of a plan takes."""
    setup = plan.setup
    a_token = plan.time.seconds / setup.tokens_per_step
    return run_cost(setup, tokens=tokens_of_run(setup), seconds_per_token=a_token)


def _components(plan: Plan) -> Table:
    """Build the table of components at the peak."""
    table = Table("component", title="GPU memory at the peak", title_justify="left", min_width=60)
    table.add_column("size", justify="right")
    table.add_column("share", justify="right")
    for name, size in gpu_components(plan).items():
        if not size:
            continue
        share = size / plan.gpu_bytes
        table.add_row(
            component_name(name), size_text(size), f"{share:.1%}" if share >= 0.001 else "< 0.1%"
        )
    table.add_section()
    table.add_row(
        "[bold]all[/]",
        f"[bold]{size_text(plan.gpu_bytes)}[/]",
        f"of {size_text(plan.setup.gpu_memory)}",
    )
    return table


def largest(plan: Plan) -> list[str]:
    """Return one line for each of the largest tensors at the peak."""
    lines = []
    for allocation, size in sorted(plan.peak.alive.items(), key=lambda item: -item[1])[:_LARGEST]:
        shape = (
            f"  {list(allocation.shape)} {str(allocation.dtype).removeprefix('torch.')}"
            if allocation.shape
            else ""
        )
        lines.append(f"{size_text(size):>11}  {tensor_name(allocation)}{shape}")
    return lines


def time_lines(plan: Plan) -> list[str]:
    """Return lines about the planned time of a step, by what it is spent on, and about its
    collectives.
    """
    time_ = plan.time

    def listed(parts: dict[str, float]) -> list[str]:
        return [f"{name} {time_text(seconds)}" for name, seconds in parts.items() if seconds]

    at_once = listed(time_.hidden)
    longest = max(time_.waits, key=time_.waits.__getitem__)
    collectives = sorted(plan.simulation.collectives.items())
    counts = ", ".join(
        f"{kind} {calls} calls, {size_text(size)}" for kind, (calls, size) in collectives
    )
    lines = [
        f"a step: {time_text(time_.seconds)}, MFU {plan.mfu:.1%}",
        f"  one after the other: {', '.join(listed(time_.parts))}",
    ]
    if plan.exchange_inside_node is not None:
        lines.append(
            f"  the exchange across nodes takes {time_text(time_.parts['exchange'])}; inside a "
            f"node it would take {time_text(plan.exchange_inside_node)}"
        )
    if at_once:
        lines.append(f"  at the same time: {', '.join(at_once)}")
    if waits := time_.waits[longest]:
        lines.append(f"  waiting for {longest}: {time_text(waits)}")
    if time_.seconds < _SHORT:
        lines.append(
            "  not planned: the time to launch kernels, which makes short steps longer than this"
        )
    return [*lines, f"  collectives of a rank: {counts}"]


def tell_each(console: Console, title: str, found: Any) -> list[SearchResult]:
    """Print each result of a search as soon as it is found, since a search takes minutes. Returns
    all results.
    """
    console.print(f"[bold]{title}[/] (each verified by simulation)", soft_wrap=True)
    all_of_them = []
    for one in found:
        all_of_them.append(one)
        if one.need is None:
            why = f"refused: {one.refused}" if one.refused else "does not fit at any length"
            console.print(f"  {one.what:<36} {why}", highlight=False, markup=False, soft_wrap=True)
        else:
            plan = one.need.plan
            most = "at least " if is_unlimited(one.need.plan.setup, one.need.seq_len) else ""
            console.print(
                f"  {one.what:<36} {f'{most}{one.need.seq_len:,}':>11} tokens, a step "
                f"{time_text(plan.time.seconds)}",
                highlight=False,
            )
    return all_of_them


def closing(plan: Plan, longest_seq_len: int, found: Sequence[SearchResult]) -> str:
    """Return a summary in plain words: whether the plan fits, what limits it, and what helps most.

    found: the results of a search, empty where none was made.
    """
    setup = plan.setup
    what = f"{setup.config.training.seq_len:,} tokens on {setup.world_size} x {setup.gpu.name}"
    verdict = "fit" if plan.fits else "do not fit"
    reason = {
        "GPU "
        "memory": f"A GPU would need {size_text(plan.gpu_bytes)} of {size_text(setup.gpu_memory)}.",
        "host memory": f"A node would need {size_text(plan.host_bytes)} of host memory.",
    }.get(plan.bottleneck, f"Most of a step's time goes to {plan.bottleneck}.")
    longer = _longest_sentence(setup, longest_seq_len, verified=bool(found))
    best = max((one for one in found if one.need), key=lambda one: one.need.seq_len, default=None)
    if best and best.changes:
        settings = " ".join(f"--{key} {show(value)}" for key, value in best.changes.items())
        helps = f"The longest found is {best.need.seq_len:,}: {settings}"
    else:
        helps = advice(plan)
    return f"[bold]{what} {verdict}.[/] {reason} {longer} {helps}"


def _longest_sentence(setup: Setup, seq_len: int, *, verified: bool) -> str:
    if not seq_len:
        return "No length fits with these settings."
    if is_unlimited(setup, seq_len):
        sentence = (
            f"With these settings at least {seq_len:,} tokens fit: the planner looks no further."
        )
        if not setup.host_memory:
            sentence += " Host memory was not looked at: plan.host_memory_gib is not set."
    else:
        sentence = f"With these settings {'up to' if verified else 'about'} {seq_len:,} tokens fit"
        most = setup.config.plan.max_step_seconds
        sentence += f", in steps of at most {time_text(most)}." if most else "."
    positions = getattr(setup.model_config, "max_position_embeddings", None)
    if positions and seq_len > positions:
        sentence += (
            f" (Beyond {positions:,}, its max_position_embeddings, the model needs "
            "model.rope_scaling.)"
        )
    return sentence


def advice(plan: Plan) -> str:
    """Return a sentence about one more change of settings that lowers the memory that limits most.

    The change is chosen by the size of the component that it removes from the peak, and simulated.
    """
    setup, config = plan.setup, plan.setup.config
    table = config.model_dump()
    alive = plan.peak.components
    changes: list[tuple[float, dict[str, Any]]] = []
    if plan.bottleneck == "host memory":
        every = config.activation_checkpoint.every
        layers = getattr(setup.model_config, "num_hidden_layers", every)
        if every < layers:
            changes.append((1, {"activation_checkpoint.every": min(layers, 2 * every)}))
    else:
        offload = {"activation_checkpoint.offload": "host"}
        changes += [
            (alive.get("checkpoints", 0), offload | {"activation_checkpoint.mode": "full"}),
            (alive.get("MLP", 0), {"memory.mlp_tile_tokens": 0}),
            (alive.get("loss head", 0), {"memory.loss_tile_tokens": 0}),
            (alive.get("optimizer state", 0), {"memory.optimizer_offload": True}),
        ]
        heads = getattr(setup.model_config, "num_attention_heads", 1)
        if (
            2 * setup.degrees.sequence <= min(heads, setup.world_size)
            and setup.degrees.shard % 2 == 0
        ):
            more = {"parallelism.sequence_parallel_degree": 2 * setup.degrees.sequence}
            changes.append((alive.get("attention", 0), more))
    # Changes that are not already in the settings.
    open_ = [
        (size, c)
        for size, c in changes
        if any(table[k.split(".")[0]][k.split(".")[1]] != v for k, v in c.items())
    ]
    if not open_ or max(size for size, _ in open_) <= 0:
        return "Only GPUs with more memory, or more GPUs a sequence, would help."
    _, change = max(open_, key=lambda item: item[0])
    other = make_plan(with_settings(setup, change))
    settings = ", ".join(f"{key} = {show(value)}" for key, value in change.items())
    if plan.bottleneck == "host memory":
        return (
            f"What lowers host memory most: {settings} (to {size_text(other.host_bytes)} a node)."
        )
    return f"What lowers the GPU's peak most: {settings} (to {size_text(other.gpu_bytes)})."


# --- files ----------------------------------------------------------------------------------------


def gpu_components(plan: Plan) -> dict[str, float]:
    """Return the bytes of the peak by component, reserves included."""
    return plan.peak.components | {reserve.what: reserve.bytes for reserve in plan.reserves}


def as_json(plan: Plan) -> dict[str, Any]:
    moment = plan.peak.moment
    return {
        "fits": plan.fits,
        "binds": plan.bottleneck,
        "gpu": plan.setup.gpu.name,
        "world_size": plan.setup.world_size,
        "seq_len": plan.setup.config.training.seq_len,
        "gpu_peak_gib": plan.gpu_bytes / GIB,
        "gpu_tensors_gib": plan.peak.bytes / GIB,
        "gpu_memory_gib": plan.setup.gpu_memory / GIB,
        "host_peak_gib": plan.host_bytes / GIB,
        "step_seconds": plan.time.seconds,
        "mfu": plan.mfu,
        "run": cost_of(plan).as_json(),
        "grace_seconds": grace_of(plan).seconds,
        "components": {name: size / GIB for name, size in gpu_components(plan).items()},
        "host_components": {name: size / GIB for name, size in plan.host_components.items()},
        "peak": {
            "phase": moment.phase,
            "module": moment.owner.module,
            "operation": kernel_name(moment.operation),
        },
        "seconds": plan.time.parts
        | {f"{name} (beside)": s for name, s in plan.time.hidden.items()},
        "exchange_seconds_inside_node": plan.exchange_inside_node,
        "collectives": {
            k: {"calls": n, "bytes": b} for k, (n, b) in plan.simulation.collectives.items()
        },
        "reserves": {reserve.what: reserve.source for reserve in plan.reserves},
        "notes": list(plan.notes),
    }


def _found_json(one: SearchResult) -> dict[str, Any]:
    if one.need is None:
        return {"what": one.what, "settings": one.changes, "seq_len": None}
    return {"what": one.what, "settings": one.changes, "seq_len": one.need.seq_len} | as_json(
        one.need.plan
    )


def _draw(plan: Plan, steps: list[SearchResult], folder: Path) -> str:
    """Draw the pictures, and return their names as the end of a sentence."""
    if not has_matplotlib():
        return " (no pictures: pip install matplotlib)"
    from titan_ulysses.plan import plots

    plots.timeline(plan, folder / "plan_memory.png")
    if steps:
        plots.ladder(steps, folder / "plan_ladder.png")
    return ", plan_memory.png" + (", plan_ladder.png" if steps else "")
