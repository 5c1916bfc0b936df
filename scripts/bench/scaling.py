"""Weak and strong scaling, measured on 1 and 2 CPU ranks; bytes of the exchange on 1, 2 and 4, and
their closed form. plans.py plans more ranks.

    python scripts/bench/scaling.py

Sequence length and sequence-parallel degree are doubled together: DeepSpeed-Ulysses (arXiv
2309.14509) hands in the same bytes for each layer then, as long as every KV head has its rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from common import LLAMA, child, parser_of, training_step

from titan_ulysses.ulysses.heads import plan_heads

MODEL = {**LLAMA, "vocab_size": 2048, "intermediate_size": 704}
"""What is measured."""


def exchanged_bytes(model: Any, *, degree: int, tokens: int, itemsize: int) -> int:
    """Return the bytes that rank 0 hands in to all-to-alls in a step, its own part included.

    For layers that are not streamed, each an activation checkpoint: q, k, v to heads and the output
    back, both again in recomputation, the gradient of the output to heads, those of q, k, v back.
    tokens: of this rank, B * T.
    """
    if degree == 1:
        return 0
    plan = plan_heads(model.num_attention_heads, model.num_key_value_heads, degree)
    size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    queries = [len(heads) for heads in plan.query]
    every = [len(q) + 2 * len(k) for q, k in zip(plan.query, plan.key_value, strict=True)]
    from_tokens = 2 * sum(every) + sum(queries)
    from_heads = degree * (2 * queries[0] + every[0])
    return model.num_hidden_layers * tokens * size * itemsize * (from_tokens + from_heads)


def measure(seq_len: int, repeats: int) -> list[dict[str, float]]:
    """On a rank: return the seconds of each step, those of them in exchanges, and its CPU seconds.

    An exchange lasts from its call to its result, so packing and the wait for the other rank count.
    """
    import torch.distributed as dist

    from titan_ulysses.ulysses import exchange

    inside = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal inside
            started = time.perf_counter()
            result = function(*args)
            inside += time.perf_counter() - started
            return result

        return call

    # Exchanges in both directions of both passes go through these two functions, which wait for
    # the all-to-all.
    for name in ("_scatter_heads", "_gather_heads"):
        setattr(exchange, name, timed(getattr(exchange, name)))
    step, found = training_step(MODEL), []
    step(seq_len // 8)  # a short step to warm up
    for _ in range(repeats):
        inside = 0.0
        dist.barrier()
        started, cpu = time.perf_counter(), time.process_time()
        step(seq_len)
        cpu = time.process_time() - cpu
        dist.barrier()
        found.append({"seconds": time.perf_counter() - started, "exchange": inside, "cpu": cpu})
    return found


def count(seq_len: int) -> dict[str, tuple[int, int]]:
    """On a rank: return what it hands in to collectives in a step, {kind: (calls, bytes)}."""
    from titan_ulysses.distributed.collectives import CollectiveCounter

    step = training_step(MODEL)
    with CollectiveCounter() as counter:
        step(seq_len)
    return dict(counter.counts)


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns on rank 0 of so many CPU ranks of one thread each."""
    return child(function, *arguments, ranks=ranks, minutes=10, what=f"{ranks} ranks")[0]


def measured(*, tokens: int, repeats: int) -> None:
    """Measure strong and weak scaling on 1 and 2 ranks, exchange apart, and count on 1, 2 and 4 the
    bytes of the exchange, S / P constant. Every rank needs a core of its own for times.
    """
    from titan_ulysses.model import hf

    print(f"measured: a small llama, fp32, medians of {repeats} steps, seconds of rank 0")
    print(f"{'':<7} {'P':>2} {'S':>7} {'a step':>8} {'exchange':>9} {'the rest':>9} {'CPU':>7}")
    # One rank at S = tokens is the first row of both.
    for what, ranks, seq_len in (("", 1, tokens), ("strong", 2, tokens), ("weak", 2, 2 * tokens)):
        steps = on_ranks(ranks, measure, seq_len, repeats)
        seconds, exchange, cpu = (
            statistics.median(step[key] for step in steps) for key in ("seconds", "exchange", "cpu")
        )
        print(
            f"{what:<7} {ranks:>2} {seq_len:>7,} {seconds:>8.2f} {exchange:>9.3f} "
            f"{seconds - exchange:>9.2f} {cpu:>7.2f}"
        )
    config = hf.load_model_config("", MODEL)
    for ranks in (1, 2, 4):
        short = tokens // 4
        counted = on_ranks(ranks, count, ranks * short)
        handed_in = counted.get("all_to_all", (0, 0))[1]
        closed = exchanged_bytes(config, degree=ranks, tokens=short, itemsize=4)
        print(
            f"P = {ranks}, {short:,} tokens a rank: a rank hands in {handed_in:,} bytes, closed "
            f"form {closed:,}"
        )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps")
    options = parser.parse_args()
    measured(tokens=options.tokens, repeats=options.repeats)


if __name__ == "__main__":
    main()
