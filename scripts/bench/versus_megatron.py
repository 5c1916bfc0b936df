"""Ulysses against Megatron-style tensor and sequence parallelism (megatron.py), as in the paper of
DeepSpeed-Ulysses (arXiv 2309.14509): bytes and time on CPU ranks. plans.py plans both on GPUs.

    python scripts/bench/versus_megatron.py
    python scripts/bench/versus_megatron.py --seq-lens 8192
    python scripts/bench/versus_megatron.py --ranks 4 --repeats 0     # bytes alone

The same llama is trained both ways, in turns in the same processes. Their losses and gradient norms
must agree. Bytes are counted in the real calls and planned by simulating the step.

Bytes are those that leave a rank, as rings: of an all-gather P - 1 times what the rank hands in, of
a reduce-scatter or an all-to-all (P - 1)/P of it, of an all-reduce twice that.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from common import LLAMA, batch_of, child, parser_of, sequence
from megatron import tensor_parallelize
from torch.distributed.tensor.parallel import loss_parallel

from titan_ulysses.config.schema import Config
from titan_ulysses.observability.units import size_text
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


def on_ranks(options: argparse.Namespace) -> None:
    """Run both on CPU ranks, and compare what was counted with plans."""
    ranks, given = options.ranks, (options.ranks, options.seq_lens, options.repeats)
    what = f"on {ranks} ranks"
    everyone = child(contend, *given, ranks=ranks, minutes=options.minutes, what=what)
    print(f"\n{options.ranks} CPU ranks, one thread each, fp32, medians of {options.repeats} turns")
    for seq_len, of in zip(options.seq_lens, everyone[0], strict=True):
        spec = spec_of(options.ranks, seq_len)
        closed = megatron_bytes(spec.model_config, degree=options.ranks, tokens=seq_len, itemsize=4)
        for name, one in of.items():
            row: dict[str, Any] = {"what": name, "seq_len": seq_len, "step": one["step"]}
            row["counted"] = sent(one["counts"], options.ranks)
            row["planned"] = sent(planned(name, spec), options.ranks)
            row["seconds"] = statistics.median(one["seconds"]) if one["seconds"] else None
            row |= {"closed_form": closed} if name == "megatron" else {}
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


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=3, help="timed turns")
    parser.add_argument("--minutes", type=float, default=20, help="patience with the ranks")
    on_ranks(parser.parse_args())


if __name__ == "__main__":
    main()
