"""What `--plan` says: tables on the console, plan.json, two pictures, and one sentence in plain words."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from titan_ulysses.config import Config
from titan_ulysses.pictures import has_matplotlib
from titan_ulysses.plan.attribution import COMPONENTS
from titan_ulysses.plan.hardware import GIB
from titan_ulysses.plan.planner import Plan, check_idle, make_plan, set_up
from titan_ulysses.plan.search import Found, Need, at_length, ladder, limit, search, with_settings
from titan_ulysses.toml import show


def plan_and_report(config: Config) -> None:
    """Plan config, say so on the console, and write <dump_folder>/<name>/plan.json and pictures. UserError: cannot."""
    started = time.perf_counter()
    console = Console()
    setup = set_up(config)
    plan = make_plan(setup)
    folder = Path(config.job.dump_folder) / config.job.name
    folder.mkdir(parents=True, exist_ok=True)
    say(console, plan)
    found = tell_each(console, "longest sequences", search(setup, plan)) if config.plan.search else []
    steps = (
        tell_each(console, "feature ladder", ladder(setup, found[0] if found else None)) if config.plan.ladder else []
    )
    fitting = [one for one in found if one.need]
    best = found[0].need if found else _estimate(plan)
    values = as_json(plan) | {
        "longest_seq_len": best.seq_len if isinstance(best, Need) else best,
        "longest_seq_len_verified": bool(found),
        "search": [_found_json(one) for one in found],
        "ladder": [_found_json(one) for one in steps],
    }
    aside = folder / ".plan.json.partial"
    aside.write_text(json.dumps(values, indent=2))
    os.replace(aside, folder / "plan.json")
    pictures = _draw(plan, steps, folder)
    console.print(closing(plan, values["longest_seq_len"], fitting), highlight=False)
    console.print(
        f"[dim]{folder}/plan.json{pictures}; planned in {time.perf_counter() - started:.0f} s[/]",
        highlight=False,
        soft_wrap=True,
    )


def _estimate(plan: Plan) -> int:
    """The longest sequence with these settings, by one more simulation and the line through both; not verified."""
    setup, own = plan.setup, Need.of(plan)
    unit = 256 * setup.degrees.sequence
    other = at_length(setup, max(unit, (own.seq_len // 2 if plan.fits else own.seq_len // 4) // unit * unit))
    if other.seq_len == own.seq_len:
        other = at_length(setup, 2 * own.seq_len)
    return limit(setup, *sorted((own, other), key=lambda need: need.seq_len))


# --- the console ------------------------------------------------------------------------------------------------------


def say(console: Console, plan: Plan) -> None:
    """Everything about one plan."""
    setup, config = plan.setup, plan.setup.config
    d, t = setup.degrees, config.training
    idle = check_idle(setup)
    console.print(
        f"[bold]{config.job.name}[/] planned for {setup.world_size} x {setup.gpu.name} "
        f"({setup.gpu_memory / GIB:.1f} GiB each, {config.plan.gpus_per_node} a node)\n"
        f"mesh: dp_replicate {d.replicate} x dp_shard {d.shard} x sp {d.sequence}; {t.seq_len:,} tokens a sequence, "
        f"{t.seq_len // d.sequence:,} a rank" + (f"\n[bold]{idle}[/]" if idle else ""),
        highlight=False,
    )
    for note in plan.notes:
        console.print(f"[dim]{note}[/]", highlight=False)
    table = Table("component", title="GPU memory at the peak", title_justify="left", min_width=60)
    table.add_column("GiB", justify="right")
    table.add_column("share", justify="right")
    for name, size in gpu_components(plan).items():
        table.add_row(name, f"{size / GIB:.2f}", f"{size / plan.gpu_bytes:.1%}")
    table.add_section()
    table.add_row("[bold]all[/]", f"[bold]{plan.gpu_bytes / GIB:.2f}[/]", f"of {setup.gpu_memory / GIB:.1f}")
    console.print(table)
    moment = plan.peak.moment
    console.print(f"The peak is in {moment.phase}, {moment.owner.module}, at {moment.operation}. Largest there:")
    for allocation, size in sorted(plan.peak.alive.items(), key=lambda item: -item[1])[:6]:
        console.print(
            f"  {size / GIB:7.2f} GiB  {allocation.component}: {allocation.owner.module} {allocation.operation} "
            f"{list(allocation.shape)}",
            highlight=False,
            no_wrap=True,
            overflow="ellipsis",
        )
    if plan.host_bytes:
        limit_of_it = f" of {setup.host_memory / GIB:.0f}" if setup.host_memory else ""
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in plan.host_components.items())
        console.print(f"host memory of a node: {plan.host_bytes / GIB:.1f} GiB{limit_of_it} ({parts})", highlight=False)
    say_time(console, plan)


def say_time(console: Console, plan: Plan) -> None:
    time_ = plan.time
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in time_.parts.items() if seconds)
    hidden = ", ".join(
        f"{name} {seconds:.1f}" + (f" (waits {time_.waits[name]:.1f})" if time_.waits[name] else "")
        for name, seconds in time_.hidden.items()
        if seconds
    )
    counts = ", ".join(f"{k} {n} ({b / GIB:.1f} GiB)" for k, (n, b) in sorted(plan.simulation.collectives.items()))
    console.print(
        f"step: {time_.seconds:,.1f} s, MFU {plan.mfu:.1%} ({parts}; beside them {hidden or 'nothing'})\n"
        f"collectives a rank: {counts}",
        highlight=False,
    )


def tell_each(console: Console, title: str, found: Any) -> list[Found]:
    """Show each as it is found: a search takes minutes."""
    console.print(f"[bold]{title}[/] (each verified by simulation)")
    all_of_them = []
    for one in found:
        all_of_them.append(one)
        if one.need is None:
            console.print(f"  {one.what:<34} does not fit at any length", highlight=False)
        else:
            plan = one.need.plan
            console.print(
                f"  {one.what:<34} {one.need.seq_len:>11,} tokens {plan.time.seconds:>9,.0f} s a step", highlight=False
            )
    return all_of_them


def closing(plan: Plan, longest_seq_len: int, found: Sequence[Found]) -> str:
    """One sentence: fits or not, what binds, what helps most; found: what a search found to fit."""
    setup = plan.setup
    what = f"{setup.config.training.seq_len:,} tokens on {setup.world_size} x {setup.gpu.name}"
    verdict = "fit" if plan.fits else "do not fit"
    reason = {
        "GPU memory": f"a GPU would need {plan.gpu_bytes / GIB:.1f} GiB of {setup.gpu_memory / GIB:.1f}",
        "host memory": f"a node would need {plan.host_bytes / GIB:.0f} GiB of host memory",
    }.get(plan.binds, f"the step's time goes to {plan.binds}")
    longer = f"with these settings {longest_seq_len:,} would" if longest_seq_len else "with these settings none would"
    best = max(found, key=lambda one: one.need.seq_len, default=None)
    if best and best.changes:
        settings = " ".join(f"--{key} {show(value)}" for key, value in best.changes.items())
        helps = f"The longest found is {best.need.seq_len:,}: {settings}"
    else:
        helps = advice(plan)
    return f"[bold]{what} {verdict}[/]: {reason}; {longer}. {helps}"


def advice(plan: Plan) -> str:
    """The one change, of those not made yet, that lowers the binding need most, simulated."""
    setup, config = plan.setup, plan.setup.config
    table = config.model_dump()
    alive = plan.peak.components
    changes: list[tuple[float, dict[str, Any]]] = []
    if plan.binds == "host memory":
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
        if 2 * setup.degrees.sequence <= min(heads, setup.world_size) and setup.degrees.shard % 2 == 0:
            more = {"parallelism.sequence_parallel_degree": 2 * setup.degrees.sequence}
            changes.append((alive.get("attention", 0), more))
    open_ = [
        (size, c) for size, c in changes if any(table[k.split(".")[0]][k.split(".")[1]] != v for k, v in c.items())
    ]
    if not open_ or max(size for size, _ in open_) <= 0:
        return "More memory, or more GPUs a sequence, is what would help."
    _, change = max(open_, key=lambda item: item[0])
    other = make_plan(with_settings(setup, change))
    settings = ", ".join(f"{key} = {show(value)}" for key, value in change.items())
    if plan.binds == "host memory":
        return f"What helps most: {settings} (host memory then {other.host_bytes / GIB:.0f} GiB a node)."
    return f"What helps most: {settings} (the GPU's peak then is {other.gpu_bytes / GIB:.1f} GiB)."


# --- files ------------------------------------------------------------------------------------------------------------


def gpu_components(plan: Plan) -> dict[str, float]:
    """Bytes of the peak by component, with what no tensor accounts for."""
    return plan.peak.components | {reserve.what: reserve.bytes for reserve in plan.reserves}


def as_json(plan: Plan) -> dict[str, Any]:
    moment = plan.peak.moment
    return {
        "fits": plan.fits,
        "binds": plan.binds,
        "gpu": plan.setup.gpu.name,
        "world_size": plan.setup.world_size,
        "seq_len": plan.setup.config.training.seq_len,
        "gpu_peak_gib": plan.gpu_bytes / GIB,
        "gpu_tensors_gib": plan.peak.bytes / GIB,
        "gpu_memory_gib": plan.setup.gpu_memory / GIB,
        "host_peak_gib": plan.host_bytes / GIB,
        "step_seconds": plan.time.seconds,
        "mfu": plan.mfu,
        "components": {name: size / GIB for name, size in gpu_components(plan).items()},
        "host_components": {name: size / GIB for name, size in plan.host_components.items()},
        "peak": {"phase": moment.phase, "module": moment.owner.module, "operation": moment.operation},
        "seconds": plan.time.parts | {f"{name} (beside)": s for name, s in plan.time.hidden.items()},
        "collectives": {k: {"calls": n, "bytes": b} for k, (n, b) in plan.simulation.collectives.items()},
        "reserves": {reserve.what: reserve.source for reserve in plan.reserves},
        "notes": list(plan.notes),
    }


def _found_json(one: Found) -> dict[str, Any]:
    if one.need is None:
        return {"what": one.what, "settings": one.changes, "seq_len": None}
    return {"what": one.what, "settings": one.changes, "seq_len": one.need.seq_len} | as_json(one.need.plan)


def _draw(plan: Plan, steps: list[Found], folder: Path) -> str:
    """The pictures, and what to say of them."""
    if not has_matplotlib():
        return " (no pictures: pip install matplotlib)"
    from titan_ulysses.plan import plots

    plots.timeline(plan, folder / "plan_memory.png", COMPONENTS)
    if steps:
        plots.ladder(steps, folder / "plan_ladder.png")
    return ", plan_memory.png" + (", plan_ladder.png" if steps else "")
