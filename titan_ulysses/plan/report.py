"""The output of `--plan`: what is printed, plan.json, pictures and the page of the plan."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from titan_ulysses.config.schema import Config
from titan_ulysses.distributed.atomic import whole_file
from titan_ulysses.distributed.hardware import GIB
from titan_ulysses.observability.pictures import has_matplotlib
from titan_ulysses.observability.units import time_text
from titan_ulysses.plan.console import closing, gpu_components, say
from titan_ulysses.plan.fastest import Candidate, Search
from titan_ulysses.plan.names import kernel_name
from titan_ulysses.plan.page import write_plan_page
from titan_ulysses.plan.planner import Plan, make_plan, set_up
from titan_ulysses.plan.run_cost import grace_of, half_as_fast, other_kernels, run_cost
from titan_ulysses.plan.search import SearchResult, estimate, is_unlimited, ladder, search
from titan_ulysses.plan.searches import fastest_json, tell_fastest, tell_longest
from titan_ulysses.plan.simulate import shared_ranks
from titan_ulysses.plan.status_line import LINE


@shared_ranks()
def plan_and_report(config: Config, known: Plan | None = None) -> None:
    """Plan config, print the plan, and write plan.json and pictures to <dump_folder>/<name>.

    known: its plan, where it has been made. UserError where config cannot be planned.
    """
    started = time.perf_counter()
    console = Console()
    setup = set_up(config)
    plan = replace(known, setup=setup) if known else make_plan(setup)
    folder = Path(config.job.dump_folder) / config.job.name
    folder.mkdir(parents=True, exist_ok=True)
    say(console, plan)
    found: list[SearchResult] = []
    steps: list[SearchResult] = []
    fastest: list[Candidate] = []
    best: int | None = None
    if config.plan.search == "longest":
        found = tell_longest(console, "longest sequences that fit", search(setup, plan))
    if config.plan.search == "fastest":
        fastest = tell_fastest(console, Search(setup))
    if config.plan.ladder:
        rungs = "longest sequences with ALST's features, one after the other"
        steps = tell_longest(console, rungs, ladder(setup, found[0] if found else None))
    if found:
        best = found[0].plan.seq_len if found[0].plan else 0
    elif config.plan.search != "fastest":
        try:
            best = estimate(plan)
        except KeyboardInterrupt:  # what is known is written; the longest sequence is not
            LINE.clear()
    values = as_json(plan) | {
        "longest_seq_len": best,
        "longest_seq_len_verified": bool(found),
        "longest_seq_len_is_at_least": best is not None and is_unlimited(setup, best),
        "search": [_result_json(one) for one in found],
        "ladder": [_result_json(one) for one in steps],
        "fastest": fastest_json(fastest),
    }
    with whole_file(folder / "plan.json") as partly:
        partly.write_text(json.dumps(values, indent=2))
    tell = partial(console.print, highlight=False, soft_wrap=True)
    pictures = " (no pictures: pip install matplotlib)"
    if has_matplotlib():
        pictures = ", plan_memory.png" + ", plan_ladder.png" * bool(steps)
    summary = closing(plan, best, found) if best is not None else ""
    if summary:
        tell(summary)
    write_plan_page(folder, plan, values, summary=Text.from_markup(summary).plain, steps=steps)
    tell(
        f"[dim]{folder}/report.html, plan.json{pictures}; planned in "
        f"{time_text(time.perf_counter() - started)}[/]"
    )


def as_json(plan: Plan) -> dict[str, Any]:
    moment = plan.peak.moment
    return {
        "fits": plan.fits,
        "binds": plan.bottleneck,
        "gpu": plan.setup.gpu.name,
        "world_size": plan.setup.world_size,
        "seq_len": plan.seq_len,
        "gpu_peak_gib": plan.gpu_bytes / GIB,
        "gpu_tensors_gib": plan.peak.bytes / GIB,
        "gpu_memory_gib": plan.setup.gpu_memory / GIB,
        "host_peak_gib": plan.host_bytes / GIB,
        "disk_gib": plan.disk_bytes / GIB,
        "step_seconds": plan.time.seconds,
        "mfu": plan.mfu,
        "run": asdict(run_cost(plan)),
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
        "longer_with_half_the_link": half_as_fast(plan),
        "step_seconds_with": other_kernels(plan),
        "collectives": {k: {"calls": n, "bytes": b} for k, (n, b) in plan.collectives.items()},
        "reserves": {reserve.what: reserve.source for reserve in plan.setup.reserves},
        "notes": list(plan.notes),
    }


def _result_json(one: SearchResult) -> dict[str, Any]:
    values = {"what": one.what, "settings": one.changes, "seq_len": None}
    return values | (as_json(one.plan) if one.plan else {})
