"""Ulysses against Megatron-style tensor and sequence parallelism (megatron.py), as in the paper of
DeepSpeed-Ulysses (arXiv 2309.14509): bytes, time, and the longest sequence.

    python scripts/bench/versus_megatron.py                              # all of it
    python scripts/bench/versus_megatron.py --what ranks --seq-lens 8192
    python scripts/bench/versus_megatron.py --what ranks --ranks 4 --repeats 0     # bytes alone
    python scripts/bench/versus_megatron.py --what plan
    python scripts/bench/versus_megatron.py --what plan --gpus 32 --kv-heads 32    # four nodes

"ranks" trains the same llama both ways on CPU ranks, in turns in the same processes. Their losses
and gradient norms must agree. Bytes are counted in the real calls and planned by simulating the
step. "plan" simulates both steps of Llama-3-8B on 8 GPUs with the planner of this project.

Bytes are those that leave a rank, as rings: of an all-gather P - 1 times what the rank hands in, of
a reduce-scatter or an all-to-all (P - 1)/P of it, of an all-reduce twice that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common import LLAMA, batch_of, child, parser_of, sequence
from megatron import tensor_parallelize
from torch.distributed.tensor.parallel import loss_parallel

from titan_ulysses.config.load import load_config
from titan_ulysses.config.schema import Config
from titan_ulysses.observability.units import size_text, time_text
from titan_ulysses.plan.cost import Time, step_time
from titan_ulysses.plan.planner import Plan, Setup, make_plan, set_up
from titan_ulysses.plan.search import at_length, longest, with_settings
from titan_ulysses.plan.simulate import simulate
from titan_ulysses.setup.parallelize import parallelize, wrap
from titan_ulysses.setup.resolve import RunSpec, resolve

CONTENDERS: dict[str, Callable[..., Any]] = {"ulysses": parallelize, "megatron": tensor_parallelize}
TOLERANCE = 1e-5
"""Relative difference of losses and gradient norms, in fp32."""

Counts = Mapping[str, tuple[float, float]]


def sent(counts: Counts, degree: int) -> dict[str, float]:
    """Return the bytes that leave a rank, by kind of collective. counts: see CollectiveCounter."""
    share = (degree - 1) / degree
    factors = {"all_gather": degree - 1, "all_reduce": 2 * share}
    return {kind: size * factors.get(kind, share) for kind, (_, size) in counts.items()}


def megatron_bytes(model: Any, *, degree: int, tokens: int, itemsize: int) -> float:
    """Return the bytes of hidden states that leave a rank in a step of B S = `tokens`: closed form.

    A block gathers them before attention and before the MLP and scatters the sums after both: four
    collectives in forward, four in backward, and three in recomputation, which ends before the
    last. The embedding scatters a sum, and the head gathers; each has its counterpart in backward.
    """
    hidden = tokens * model.hidden_size * itemsize * (degree - 1) / degree
    return hidden * (11 * model.num_hidden_layers + 4)


# --- real ranks -----------------------------------------------------------------------------------


def spec_of(ranks: int, seq_len: int, model: dict[str, Any] = LLAMA) -> RunSpec:
    """Return the run of both contenders: fp32, whole sequences, checkpoints of all blocks."""
    table = {
        "model": {"config": model, "tokenizer": "bytes"},
        "training": {"seq_len": seq_len, "param_dtype": "float32"},
        "parallelism": {"sequence_parallel_degree": ranks},
        "memory": {"stream_chunk_tokens": -1},
    }
    return resolve(Config.model_validate(table), world_size=ranks, device_type="cpu")


def planned(name: str, spec: RunSpec) -> Counts:
    """Return the collectives of a simulated step."""
    with loss_parallel():
        by = wrap if name == "ulysses" else tensor_parallelize
        return simulate(spec, cuda=None, wrap=by).collectives


def step_of(name: str, spec: RunSpec) -> Callable[[int, int], tuple[float, float]]:
    """Build a contender on the ranks that call this. Returns a function of (S, index) that trains a
    step on that sequence and returns loss and gradient norm.
    """
    from titan_ulysses.distributed.mesh import build_mesh
    from titan_ulysses.model import hf
    from titan_ulysses.optim.optimizer import build_optimizer
    from titan_ulysses.setup.build import build_model
    from titan_ulysses.train.step import train_step

    mesh = build_mesh(sequence=spec.degrees.sequence)
    model, _ = build_model(spec, mesh, wrap=CONTENDERS[name])
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=0)
    optimizer = build_optimizer(model, spec.config.optimizer)

    def step(seq_len: int, index: int) -> tuple[float, float]:
        batch = batch_of(sequence(index, seq_len), mesh, model)
        with loss_parallel():
            loss, norm = train_step(model, optimizer, [batch], mesh, max_norm=1.0)[:2]
        return float(loss), float(norm)

    return step


def contend(ranks: int, seq_lens: list[int], repeats: int) -> list[dict[str, dict[str, Any]]]:
    """Train both on these ranks, in turns: for each length, what each contender did."""
    import torch.distributed as dist

    from titan_ulysses.distributed.collectives import CollectiveCounter
    from titan_ulysses.distributed.mesh import init_distributed

    init_distributed()
    spec = spec_of(ranks, max(seq_lens))
    steps = {name: step_of(name, spec) for name in CONTENDERS}
    found = []
    for seq_len in seq_lens:
        of: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in steps}
        for name, step in steps.items():
            with CollectiveCounter() as counter:
                of[name]["step"] = step(seq_len, 0)
            of[name]["counts"] = dict(counter.counts)
        for turn in range(1, repeats + 1):
            for name, step in steps.items():
                dist.barrier()
                started = time.perf_counter()
                step(seq_len, turn)
                dist.barrier()
                of[name]["seconds"].append(time.perf_counter() - started)
        found.append(of)
    return found


def on_ranks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run both on CPU ranks, and compare what was counted with plans."""
    ranks, given = options.ranks, (options.ranks, options.seq_lens, options.repeats)
    what = f"on {ranks} ranks"
    everyone = child(contend, *given, ranks=ranks, minutes=options.minutes, what=what)
    print(f"\n{options.ranks} CPU ranks, one thread each, fp32, medians of {options.repeats} turns")
    rows = []
    for seq_len, of in zip(options.seq_lens, everyone[0], strict=True):
        spec = spec_of(options.ranks, seq_len)
        closed = megatron_bytes(spec.model_config, degree=options.ranks, tokens=seq_len, itemsize=4)
        for name, one in of.items():
            row: dict[str, Any] = {"what": name, "seq_len": seq_len, "step": one["step"]}
            row["counted"] = sent(one["counts"], options.ranks)
            row["planned"] = sent(planned(name, spec), options.ranks)
            row["seconds"] = statistics.median(one["seconds"]) if one["seconds"] else None
            row |= {"closed_form": closed} if name == "megatron" else {}
            rows.append(row)
            show(row)
        ours, theirs = (of[name]["step"] for name in CONTENDERS)
        if any(abs(a / b - 1) > TOLERANCE for a, b in zip(ours, theirs, strict=True)):
            raise SystemExit(f"(loss, gradient norm) {ours} and {theirs}: nothing to compare.")
        if options.repeats:
            turns = zip(*(of[name]["seconds"] for name in CONTENDERS), strict=True)
            ratios = [b / a for a, b in turns]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            times = f"{statistics.median(ratios):.2f} times as long"
            print(f"         megatron takes {times} ({spread})")
    return rows


def show(row: dict[str, Any]) -> None:
    """Print a line about a contender at one length."""
    counted, plan = sum(row["counted"].values()), sum(row["planned"].values())
    seconds = "" if row["seconds"] is None else f"{row['seconds']:8.2f} s a step   "
    kinds = ", ".join(f"{kind} {size_text(size)}" for kind, size in row["counted"].items() if size)
    print(
        f"{row['what']:<8} S {row['seq_len']:>7,} {seconds}loss {row['step'][0]:.6f}   sent "
        f"{counted:,.0f} bytes, planned {plan / counted - 1:+.3%}   {kinds}"
    )
    if closed := row.get("closed_form"):
        print(f"         hidden states in closed form: {closed / counted - 1:+.3%}")


# --- planned for GPUs -----------------------------------------------------------------------------

_WHOLE: dict[str, Any] = {
    "activation_checkpoint.offload": "none",
    "memory.stream_chunk_tokens": -1,
    "memory.mlp_tile_tokens": -1,
    "memory.loss_tile_tokens": -1,
}
_TILED_LOSS = _WHOLE | {"memory.loss_tile_tokens": 2**15}
_STREAMED = dict.fromkeys(_WHOLE, 0) | {"activation_checkpoint.offload": "none"}
_ON_HOST = {"activation_checkpoint.offload": "host", "memory.stream_offload": "host"}
PLANNED: list[tuple[str, str, dict[str, Any]]] = [
    ("megatron", "", _WHOLE),
    ("ulysses", "as published: FSDP, nothing tiled", _WHOLE),
    ("megatron", "loss in tiles of 32,768 tokens", _TILED_LOSS),
    ("ulysses", "loss in tiles of 1 GiB", _WHOLE | {"memory.loss_tile_tokens": 0}),
    ("ulysses", "tiles and streaming, all on the GPU", _STREAMED),
    ("ulysses", "+ checkpoints and hidden states on the host", _STREAMED | _ON_HOST),
]
"""(contender, what it has, its settings). All have activation checkpoints of every block. A rank
has the logits of a tile for the whole vocabulary in Ulysses, and for its part of it in Megatron.
"""


def plan_of(name: str, setup: Setup) -> Plan:
    """Plan a step of a contender."""
    with loss_parallel():
        return make_plan(setup, wrap=wrap if name == "ulysses" else tensor_parallelize)


def time_of_plan(name: str, plan: Plan) -> Time:
    """Return the time of a planned step.

    Tensor parallelism waits for all its collectives, as Ulysses does for its all-to-alls. Those of
    FSDP overlap with the computation.
    """
    if name == "ulysses":
        return plan.time
    setup, links, degree = plan.setup, plan.setup.links, plan.setup.degrees.sequence
    where: dict[str, Any] = {"gpu": setup.gpu, "links": links, "rates": setup.rates}
    time = step_time(plan.cost, exchanged=0, gathered=0, on_host={}, **where)
    size = plan.sent("all_gather") * degree + plan.sent("reduce_scatter")
    size += 2 * plan.sent("all_reduce")
    return replace(time, parts=time.parts | {"exchange": links.fsdp_seconds(size, setup.gpu)})


def on_gpus(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Plan the longest sequence of both, and a step of each at one length."""
    gpus = options.gpus
    changes = {"plan.world_size": gpus, "parallelism.sequence_parallel_degree": gpus}
    if options.kv_heads:
        changes["model.config.num_key_value_heads"] = options.kv_heads
    setup = set_up(load_config(options.config, changes.items()))
    print(
        f"\nplanned, not measured: {options.config} on {setup.world_size} x {setup.gpu.name}; "
        f"bytes, step and GPU memory at S = {options.seq_len:,}"
    )
    rows = []
    for name, what, settings in PLANNED:
        own = with_settings(setup, settings)
        most = longest(own, near=options.seq_len, close=0.01, plan=partial(plan_of, name))
        at = plan_of(name, at_length(own, options.seq_len))
        seconds = time_of_plan(name, at)
        row: dict[str, Any] = {
            "what": name,
            "settings": what,
            "longest": most.seq_len if most else 0,
            "sent": sum(sent(at.collectives, gpus).values()),
            "seconds": seconds.seconds,
            "waits_for_collectives": seconds.parts["exchange"],
            "gpu_bytes": at.gpu_bytes,
            "fits": at.fits,
        }
        rows.append(row)
        print(
            f"{name:<8} {what:<44} longest {row['longest']:>11,}   sent "
            f"{size_text(row['sent']):>9}   a step {time_text(seconds.seconds):>11}, of it "
            f"collectives {time_text(seconds.parts['exchange']):>9}   "
            f"{size_text(at.gpu_bytes)}{'' if at.fits else ' (too much)'}"
        )
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--what", choices=["ranks", "plan", "both"], default="both")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=3, help="timed turns")
    parser.add_argument("--minutes", type=float, default=20, help="patience with the ranks")
    parser.add_argument("--config", type=Path, default=Path("configs/llama3_8b.toml"))
    parser.add_argument("--seq-len", type=int, default=2**18, help="of the planned steps")
    parser.add_argument("--gpus", type=int, default=8, help="that are planned")
    parser.add_argument("--kv-heads", type=int, default=0, help="of the planned model; 0: its own")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    found = {}
    if options.what != "plan":
        found["ranks"] = on_ranks(options)
    if options.what != "ranks":
        found["plan"] = on_gpus(options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
