"""Compare ALST's published runs of Llama-8B on H100s with this project's plans for them. Nothing is
run on a GPU here.

    python scripts/bench/alst_published.py                    everything, minutes
    python scripts/bench/alst_published.py --what runs
        the three longest sequences and the two step times, with FlashAttention 2 and 3
    python scripts/bench/alst_published.py --what ladder
        the feature ladder on eight GPUs, itemised and drawn
    python scripts/bench/alst_published.py --what million longest
        what streaming adds: steps of 1M and 4M tokens; the longest sequences, also of one hour

The published numbers are in arXiv 2506.13996, sections 5.2 and 5.3, and the settings of each run in
ArcticTraining, projects/sequence-parallelism/run-h100-*.yml. In all of these runs, DeepSpeed keeps
the optimizer and with it the fp32 master weights in host memory (`offload_optimizer`), and on one
GPU the bf16 weights as well. The equivalent here is memory.parameter_offload: FSDP2 keeps master
weights, gradients and optimizer state in host memory, and on the GPU only what is gathered.
Blocks are not streamed in `runs` and in the steps of the ladder that ALST has, because ALST's are
not.

The ladder shows our longest planned sequence next to theirs, for each of ALST's steps. The gap is
the memory of the plan for their length minus that of the GPU. The items show by how much each
component is larger at their length than at our longest, which fills the GPU. The items must add up
to the gap.
"""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path
from typing import Any

from common import ROOT, parser_of

CONFIG = ROOT / "configs" / "llama3_8b.toml"
OUTPUT = ROOT / "outputs" / "bench" / "alst_published.json"
PICTURE = ROOT / "docs" / "memory_ladder.png"
LIKE_ALST = {"memory.parameter_offload": True, "memory.stream_chunk_tokens": -1}
RUNS: list[tuple[str, dict[str, Any], float | None]] = [
    ("1 GPU, 500K", {"plan.world_size": 1, "training.seq_len": 500_000}, None),
    ("8 GPUs, 3.7M", {"plan.world_size": 8, "training.seq_len": 3_700_000}, 3600 + 47 * 60 + 35),
    ("32 GPUs, 15M", {"plan.world_size": 32, "training.seq_len": 15_000_000}, None),
]
"""(name, settings, published seconds of a step or None) of each run."""
BASELINE: tuple[str, dict[str, Any], float | None] = (
    "8 GPUs, 32K, baseline",
    {
        "plan.world_size": 8,
        "training.seq_len": 32_000,
        "parallelism.sequence_parallel_degree": 1,
        "activation_checkpoint.offload": "none",
        "memory.loss_tile_tokens": -1,
        "memory.mlp_tile_tokens": -1,
    },
    17,
)
"""The run without any part of ALST, in which each GPU has a sequence of its own."""
KERNELS = "fa2", "fa3"
"""FlashAttention 2, as in ALST's runs, and 3, which is faster on these GPUs."""
LADDER = [32_000, 160_000, 1_100_000, 1_200_000, 2_400_000, 3_700_000, None, None, None]
"""ALST's longest sequences, for the steps of `ladder` in `plan/search.py`. The last three are not
ALST's.
"""
QWEN = ROOT / "configs" / "qwen3_8b.toml"
ONE = {"plan.world_size": 1, "parallelism.sequence_parallel_degree": 1}
EIGHT = {"plan.world_size": 8, "parallelism.sequence_parallel_degree": 8}
SMALL_HOST, LARGE_HOST = {"plan.host_memory_gib": 128}, {"plan.host_memory_gib": 1770}
STREAMED = {"memory.stream_offload": "host"}
ALL_ON_HOST = STREAMED | {"memory.parameter_offload": True}
FEW = {"activation_checkpoint.every": 8}
"""Few checkpoints, because host memory is what ends these lengths."""
KEPT = {"activation_checkpoint.keep_attention": "all"}
LARGE_CHUNKS = {"memory.stream_chunk_tokens": 131_072}
"""Four times the default on eight ranks: gradients of weights and keys are added up less often."""
EIGHT_BITS = {"optimizer.name": "adamw8bit", "optimizer.stochastic_rounding": True}
MILLION_TOKENS = {"training.seq_len": 2**20}
HOUR = {"plan.max_step_seconds": 3600}
LONGEST: list[tuple[str, dict[str, Any]]] = [
    ("1 GPU, 128 GiB, no master weights", ONE | SMALL_HOST | EIGHT_BITS | STREAMED | FEW),
    ("8 GPUs, 128 GiB", EIGHT | SMALL_HOST | STREAMED | FEW),
    ("8 GPUs, 1.9 TB", EIGHT | LARGE_HOST | ALL_ON_HOST | FEW),
    (
        "8 GPUs, 1.9 TB, one hour",
        EIGHT | LARGE_HOST | KEPT | HOUR | STREAMED | {"activation_checkpoint.every": 2},
    ),
]
"""The longest sequences to look for: (name, settings)."""
MILLION: list[tuple[str, Path, dict[str, Any]]] = [
    ("Qwen3-8B, 8 GPUs", QWEN, EIGHT | LARGE_HOST | KEPT | LARGE_CHUNKS | MILLION_TOKENS),
    ("Llama-3-8B, 8 GPUs", CONFIG, EIGHT | LARGE_HOST | ALL_ON_HOST | MILLION_TOKENS),
    (
        "Llama-3-8B, 8 GPUs, 4M",
        CONFIG,
        EIGHT | LARGE_HOST | ALL_ON_HOST | {"training.seq_len": 2**22},
    ),
    (
        "Llama-3-8B, 1 GPU, 128 GiB, 4 blocks a checkpoint",
        CONFIG,
        ONE
        | SMALL_HOST
        | EIGHT_BITS
        | STREAMED
        | MILLION_TOKENS
        | {"activation_checkpoint.every": 4},
    ),
    (
        "Llama-3-8B, 1 GPU, 128 GiB, 6 blocks a checkpoint",
        CONFIG,
        ONE
        | SMALL_HOST
        | EIGHT_BITS
        | STREAMED
        | MILLION_TOKENS
        | {"activation_checkpoint.every": 6},
    ),
]
"""Steps of given lengths: (name, config, settings)."""
CLOSE = 0.05
"""How far the sum of the items may be from the gap, as a share of the gap."""


def plan_of(settings: dict[str, Any]) -> Any:
    from titan_ulysses.config.load import load_config
    from titan_ulysses.plan.planner import make_plan, set_up

    changes = LIKE_ALST | settings
    degree = changes.setdefault("parallelism.sequence_parallel_degree", changes["plan.world_size"])
    changes["training.seq_len"] -= changes["training.seq_len"] % degree
    return make_plan(set_up(load_config(CONFIG, changes.items())))


def runs() -> list[dict]:
    """Plan each published run, and print whether it fits and how long a step takes."""
    from titan_ulysses.distributed.hardware import GIB
    from titan_ulysses.plan.report import as_json

    print(
        "published runs         kernel  fits   GPU GiB  host GiB   step s   ALST's     MFU  FLOPs' "
        "rate  planned in"
    )
    found = []
    for (what, settings, published), kernel in product([*RUNS, BASELINE], KERNELS):
        started = time.perf_counter()
        plan = plan_of(settings | {"plan.attention_kernel": kernel})
        took = time.perf_counter() - started
        rate = plan.simulation.cost.flops / plan.time.seconds / 1e12
        theirs = f"{published:8,.0f}" if published else f"{'-':>8}"
        print(
            f"{what:<22} {kernel:>6} {'yes' if plan.fits else 'no':>5} {plan.gpu_bytes / GIB:9.1f} "
            f"{plan.host_bytes / GIB:9.0f} {plan.time.seconds:8,.0f} {theirs} {plan.mfu:7.1%} "
            f"{rate:7.0f} TFLOP/s {took:6.0f} s",
            flush=True,
        )
        beside = {"what": what, "kernel": kernel, "published_seconds": published}
        found.append(beside | as_json(plan))
    for one in found:
        if theirs := one["published_seconds"]:
            parts = ", ".join(f"{name} {s:,.1f}" for name, s in one["seconds"].items() if s > 0.05)
            print(
                f"{one['what']}, {one['kernel']}: ours takes {one['step_seconds'] / theirs:.2f} of "
                f"ALST's step: {parts}"
            )
    return found


def ladder() -> list[dict]:
    """Print for each step of the ladder ALST's length, ours, and the memory between them."""
    from titan_ulysses.config.load import load_config
    from titan_ulysses.distributed.hardware import GIB
    from titan_ulysses.plan import search
    from titan_ulysses.plan.console import gpu_components
    from titan_ulysses.plan.planner import make_plan, set_up

    setup = set_up(load_config(CONFIG, LIKE_ALST.items()))
    print(
        "\nfeature ladder, 8 GPUs               ALST's       ours   at ALST's: GiB   gap GiB   "
        "items GiB",
        flush=True,
    )
    found = []
    for rung, theirs in zip(search.ladder(setup), LADDER, strict=True):
        if theirs is None:
            print(f"{rung.what:<32} {'-':>10} {rung.plan.seq_len:>10,}", flush=True)
            found.append({"what": rung.what, "theirs": None, "ours": rung.plan.seq_len})
            continue
        rung_setup = search.with_settings(setup, rung.changes)
        degree = rung_setup.degrees.sequence
        there = make_plan(search.at_length(rung_setup, theirs - theirs % degree))
        here = rung.plan
        assert here is not None, f"{rung.what}: no length fits"
        before, after = gpu_components(here), gpu_components(there)
        items = {name: after.get(name, 0) - before.get(name, 0) for name in after | before}
        gap, total = there.gpu_bytes - setup.gpu_memory, sum(items.values())
        binding = here.setup.host_memory and here.host_bytes > 0.99 * here.setup.host_memory
        print(
            f"{rung.what:<32} {theirs:>10,} {rung.plan.seq_len:>10,} {there.gpu_bytes / GIB:16.1f} "
            f"{gap / GIB:9.2f} "
            f"{total / GIB:11.2f}" + ("  (host memory is what ends ours)" if binding else ""),
            flush=True,
        )
        print(
            "    "
            + ", ".join(
                f"{k} {v / GIB:+.2f}"
                for k, v in sorted(items.items(), key=lambda item: -item[1])
                if abs(v) > 0.005 * GIB
            )
        )
        close = abs(total - gap) <= CLOSE * abs(gap) or abs(total - gap) < 0.1 * GIB
        print(
            f"    items are within {CLOSE:.0%} of the gap: {'yes' if close else 'NO'}", flush=True
        )
        found.append(
            {
                "what": rung.what,
                "theirs": theirs,
                "ours": rung.plan.seq_len,
                "gap": gap,
                "items": dict(items),
            }
        )
    return found


def heading() -> None:
    print(f"\n{'':<50} kernel      tokens  fits  GPU GiB  host GiB   step s  planned in")


def planned_line(what: str, kernel: str, plan: Any, seconds: float) -> dict:
    """Print a line of `million` and `longest`; return the plan."""
    from titan_ulysses.distributed.hardware import GIB
    from titan_ulysses.plan.report import as_json

    length = plan.setup.config.training.seq_len
    print(
        f"{what:<50} {kernel:>6} {length:>11,} {'yes' if plan.fits else 'no':>5} "
        f"{plan.gpu_bytes / GIB:8.2f} {plan.host_bytes / GIB:9.0f} {plan.time.seconds:8,.0f} "
        f"{seconds:7.0f} s",
        flush=True,
    )
    return {"what": what, "kernel": kernel} | as_json(plan)


def million() -> list[dict]:
    """Plan steps of a million tokens and more, streamed."""
    from titan_ulysses.config.load import load_config
    from titan_ulysses.plan.planner import make_plan, set_up

    heading()
    found = []
    for (what, config, settings), kernel in product(MILLION, KERNELS[::-1]):
        started = time.perf_counter()
        wanted = settings | {"plan.attention_kernel": kernel}
        plan = make_plan(set_up(load_config(config, wanted.items())))
        found.append(planned_line(what, kernel, plan, time.perf_counter() - started))
    return found


def longest_streamed() -> list[dict]:
    """Look for the longest sequences, streamed, with hidden states, keys and values on the host."""
    from titan_ulysses.config.load import load_config
    from titan_ulysses.plan.planner import set_up
    from titan_ulysses.plan.search import longest

    heading()
    found = []
    for (what, settings), kernel in product(LONGEST, KERNELS[::-1]):
        started = time.perf_counter()
        wanted = settings | {"plan.attention_kernel": kernel}
        setup = set_up(load_config(CONFIG, wanted.items()))
        most = longest(setup, near=3_000_000 // (8 // setup.world_size), close=0.01)
        if most is None:
            print(f"{what:<50} {kernel:>6} does not fit at any length", flush=True)
        else:
            seconds = time.perf_counter() - started
            found.append(planned_line(what, kernel, most, seconds))
    return found


def draw(steps: list[dict], path: Path) -> None:
    """Draw the longest sequence of each step of the ladder, ALST's (measured) and ours (planned),
    on a logarithmic axis.
    """
    from titan_ulysses.observability.pictures import COLORS, picture

    with picture(path, size=(8, 4.4)) as (_, axes):
        contenders = {
            "theirs": "ALST, measured (arXiv 2506.13996)",
            "ours": "titan_ulysses, planned: simulated",
        }
        for number, (key, label) in enumerate(contenders.items()):
            drawn = [(place, step[key]) for place, step in enumerate(steps) if step[key]]
            lengths = [length for _, length in drawn]
            places = [-place - 0.38 * number for place, _ in drawn]
            axes.barh(places, lengths, height=0.36, color=COLORS[(4, 0)[number]], label=label)
            for place, length in zip(places, lengths, strict=True):
                axes.text(length, place, f" {length:,}", va="center", fontsize=8)
        axes.set_yticks(
            [-place - 0.19 for place in range(len(steps))], [step["what"] for step in steps]
        )
        axes.set_xscale("log")
        longest = max(step["ours"] for step in steps)
        axes.set(xlim=(10_000, longest * 5), xlabel="longest sequence, tokens (logarithmic)")
        axes.set_title(
            "Llama-3-8B on one node of eight H100-80GB, 1.9 TB of host memory", fontsize=10
        )
        axes.legend(loc="upper right", frameon=False, fontsize=9)


def main() -> None:
    tables = {"runs": runs, "ladder": ladder, "million": million, "longest": longest_streamed}
    parser = parser_of(__doc__)
    parser.add_argument("--what", nargs="+", choices=list(tables), default=list(tables))
    parser.add_argument(
        "--picture",
        type=Path,
        default=PICTURE,
        help="of the ladder (default: docs/memory_ladder.png)",
    )
    args = parser.parse_args()
    print("planned (simulated), not measured")
    table = {what: tables[what]() for what in args.what}
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(table, indent=1))
    print(f"written to {OUTPUT.relative_to(ROOT)}")
    if "ladder" in table:
        draw(table["ladder"], args.picture)
        print(f"drawn: {args.picture}")


if __name__ == "__main__":
    main()
