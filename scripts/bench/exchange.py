"""Compare the exchange with what it replaces, forward and backward.

    python scripts/bench/exchange.py  2 and 4 gloo ranks, S 4K to 64K
    python scripts/bench/exchange.py --ranks 2 --seq-lens 8192

Each contender moves q, k and v of one layer (h 1,024: 16 query heads of size 64, 4 KV heads, fp32)
from sequence shards to head shards and the output back, and all four gradients the other way. The
contenders take turns, and a ratio is the median of the ratios within each turn, so that other work
on the machine affects all of them alike.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

from common import CACHING, child, parser_of

HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS = 64, 16, 4
TARGETS = {"redistribute": 5.0, "four all-to-alls": 1.1, "four, KV heads repeated": 1.3}


# ---------------------------------------------------------------- the contenders
# Each takes local q, k, v and o, and returns local results.


def exchange(mesh, q, k, v, o):
    from torch.distributed.tensor import DTensor

    from titan_ulysses.ulysses.exchange import SEQUENCE, heads_to_sequence, sequence_to_heads
    from titan_ulysses.ulysses.heads import plan_heads

    plan = plan_heads(q.shape[2], k.shape[2], mesh.size())
    q, k, v = (DTensor.from_local(x, mesh, (SEQUENCE,), run_check=False) for x in (q, k, v))
    (query,), *keys = sequence_to_heads(q, k, v, plan)
    return [query, *keys, heads_to_sequence((o,), plan, mesh).to_local()]


def redistribute(mesh, q, k, v, o):
    from torch.distributed.tensor import DTensor, Shard

    def move(x, source: int, target: int):
        placed = DTensor.from_local(x, mesh, (Shard(source),), run_check=False)
        return placed.redistribute(placements=(Shard(target),)).to_local()

    return [*(move(x, 1, 2) for x in (q, k, v)), move(o, 2, 1)]


def four_all_to_alls(mesh, q, k, v, o):
    """Exchange as most implementations do: one all-to-all per tensor, with contiguous tensors
    before and after it.
    """
    import torch.distributed._functional_collectives as funcol

    degree, group = mesh.size(), mesh.get_group()

    def all_to_all(blocks):
        rows = [1] * degree
        return funcol.wait_tensor(
            funcol.all_to_all_single_autograd(blocks.contiguous(), rows, rows, group)
        )

    def to_heads(x):  # [B, T, H, D] -> [P, B, T, h, D] on the wire -> [B, S, h, D]
        received = all_to_all(x.unflatten(2, (degree, -1)).permute(2, 0, 1, 3, 4))
        return received.transpose(0, 1).flatten(1, 2).contiguous()

    def to_sequence(x):  # [B, S, h, D] -> [P, B, T, h, D] on the wire -> [B, T, H, D]
        received = all_to_all(x.unflatten(1, (degree, -1)).transpose(0, 1))
        return received.permute(1, 2, 0, 3, 4).flatten(2, 3).contiguous()

    return [*(to_heads(x) for x in (q, k, v)), to_sequence(o)]


def four_with_repeated_kv_heads(mesh, q, k, v, o):
    group_size = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group_size, dim=2) for x in (k, v))
    return four_all_to_alls(mesh, q, k, v, o)


CONTENDERS: dict[str, Callable] = {
    "exchange": exchange,
    "redistribute": redistribute,
    "four all-to-alls": four_all_to_alls,
    "four, KV heads repeated": four_with_repeated_kv_heads,
}


def step(contender: Callable, mesh, inputs: list) -> list:
    """Run forward and backward. Returns the results and the gradients."""
    import torch

    results = contender(mesh, *inputs)
    gradients = torch.autograd.grad(
        results, inputs, grad_outputs=[torch.ones_like(x) for x in results]
    )
    return [*results, *gradients]


def make_inputs(heads: tuple[int, int], plan, rank: int, seq_len: int, rows: int = 1) -> list:
    """Make local q, k, v [B, T, H, D] and o [B, S, h, D], where o has the shape of attention's
    output for these queries.
    """
    import torch

    tokens, generator = seq_len // plan.degree, torch.Generator().manual_seed(rank)
    shapes = [(tokens, heads[0]), *[(tokens, heads[1])] * 2, (seq_len, len(plan.query[rank]))]
    return [
        torch.randn(rows, *shape, HEAD_SIZE, generator=generator).requires_grad_()
        for shape in shapes
    ]


# ---------------------------------------------------------------- in child processes


def measure(seq_lens: list[int], rows: int, repeats: int) -> list[dict[str, list[float]]]:
    """Measure on one of several gloo ranks. Returns, for each S, the seconds of each contender in
    each turn.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from titan_ulysses.ulysses.heads import plan_heads

    # DTensor warns that it gathers on a CPU. This is part of what is measured.
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan, rank = plan_heads(NUM_HEADS, NUM_KV_HEADS, mesh.size()), dist.get_rank()
    found = []
    for seq_len in seq_lens:
        inputs = make_inputs((NUM_HEADS, NUM_KV_HEADS), plan, rank, seq_len, rows)
        # All contenders must compute the same.
        reference = step(redistribute, mesh, inputs)
        for name in ("exchange", "four all-to-alls"):
            for x, expected in zip(step(CONTENDERS[name], mesh, inputs), reference, strict=True):
                assert torch.equal(x, expected), f"{name} does not equal redistribute"
        step(four_with_repeated_kv_heads, mesh, inputs)
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(repeats):
            for name, contender in CONTENDERS.items():
                dist.barrier()
                started = time.perf_counter()
                step(contender, mesh, inputs)
                dist.barrier()
                seconds[name].append(time.perf_counter() - started)
        found.append(seconds)
    return found


# ---------------------------------------------------------------- the report


def show_times(ranks: int, seq_lens: list[int], rows: int, repeats: int, minutes: float) -> None:
    given = seq_lens, rows, repeats
    everyone = child(measure, *given, ranks=ranks, minutes=minutes, env=CACHING)
    if isinstance(everyone, str):
        print(f"{ranks} ranks: {everyone}")
        return
    found = everyone[0]
    heads = f"{NUM_HEADS}/{NUM_KV_HEADS} heads"
    print(f"\n{ranks} gloo ranks, {heads}, fp32, B = {rows}, one thread each, median of {repeats}")
    wanted = "  ".join(f"{f'x {name} (>= {t})':>34}" for name, t in TARGETS.items())
    print(f"{'S':>8}  {'exchange':>10}  {wanted}")
    for seq_len, seconds in zip(seq_lens, found, strict=True):
        ours = seconds["exchange"]
        ratios = []
        for name in TARGETS:
            turns = zip(ours, seconds[name], strict=True)
            ratios.append(f"{statistics.median(other / own for own, other in turns):>34.2f}")
        print(f"{seq_len:>8,}  {1e3 * statistics.median(ours):>7.1f} ms  {'  '.join(ratios)}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[2**i for i in range(12, 17)])
    parser.add_argument("--rows", type=int, default=1, help="B")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=20, help="patience a number of ranks")
    args = parser.parse_args()
    for ranks in args.ranks:
        show_times(ranks, args.seq_lens, args.rows, args.repeats, args.minutes)


if __name__ == "__main__":
    main()
