"""Memory and time of learned sparse attention, against dense attention of the same widths.

    python scripts/bench/sparse.py
    python scripts/bench/sparse.py --tokens 8192 16384 --ranks 1

A streamed step of a model of one block with an indexer (deepseek_v32, whose queries read 256 keys),
and of the same block without one (deepseek_v3). Each length has a process of its own for the peak
of its anonymous memory. CPU seconds are those of the attention kernels, and those of the indexer's
scores, in one process whose allocator keeps memory. In it the lengths take turns, and of the steps
of a length the one with the least seconds counts, since other programs only add to them. Where
dense attention takes as long as sparse attention alone is found by its growth with the square of
the length, from the longest pair.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from common import (
    ALLOCATOR,
    CACHING,
    TOKEN_IDS,
    child,
    measure,
    model_table,
    parser_of,
    slope,
    training_step,
)

MODEL = model_table("deepseek_v3", vocab=256, width=256, inner=512, layers=1, heads=(4, 4))
MODEL |= {"q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}
MODEL |= {"v_head_dim": 32, "first_k_dense_replace": 1} | TOKEN_IDS
INDEXER = {"model_type": "deepseek_v32", "index_topk": 256, "index_n_heads": 4}
MODELS = {"dense": MODEL, "sparse": MODEL | INDEXER | {"index_head_dim": 32}}


def steps_of(kind: str, lengths: list[int], chunk: int) -> list[dict[str, Any]]:
    """On a rank: return what a step of each length takes, after one of a short sequence."""
    import torch

    from titan_ulysses.ulysses import indexer
    from titan_ulysses.ulysses.cores import sdpa
    from titan_ulysses.ulysses.pieces import KERNELS
    from titan_ulysses.ulysses.scores import PieceKernels

    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            result = function(*args, **kwargs)
            seconds[name] += time.thread_time() - started
            return result

        return call

    def core(*args: Any, **kwargs: Any) -> torch.Tensor:
        return sdpa(*args, **kwargs)

    pair = (timed("attention", x) for x in (KERNELS.forward, KERNELS.backward))
    core.pieces = PieceKernels(*pair)  # type: ignore[attr-defined]
    indexer.choose = timed("indexer", indexer.choose)
    memory = {"stream_chunk_tokens": chunk}
    step = training_step(MODELS[kind], attention=core, memory=memory)
    step(2 * chunk)
    found = []
    for tokens in lengths:
        seconds.clear()
        one = measure(step, [tokens])
        one["memory"] = one["anonymous"] - one["before_anonymous"]
        found.append(one | seconds)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a streamed chunk")
    parser.add_argument("--repeats", type=int, default=2, help="steps of each length")
    args = parser.parse_args()
    print("one block of width 256, fp32, 256 keys a query, a thread a rank")
    for ranks in args.ranks:
        found: dict[tuple[str, int], dict[str, float]] = {}
        for kind in MODELS:
            of_kind = of_lengths(kind, ranks, args)
            found |= {(kind, tokens): x for tokens, x in zip(args.tokens, of_kind, strict=True)}
        first, last = args.tokens[0], args.tokens[-1]
        for (kind, tokens), x in found.items():
            print(
                f"  {ranks} ranks, {tokens:>7,} tokens, {kind}: attention {x['attention']:.2f} s, "
                f"indexer {x['indexer']:.2f} s a rank, peak {x['memory'] / 2**20:.1f} MiB"
            )
        ratio = f"{first:,} to {last:,} tokens"
        growth = {k: found[k, last]["attention"] / found[k, first]["attention"] for k in MODELS}
        slopes = {k: slope([(t, found[k, t]["memory"]) for t in args.tokens]) for k in MODELS}
        dense, sparse = (found[kind, last]["attention"] for kind in MODELS)
        print(
            f"  {ranks} ranks, {ratio}: attention grows {growth['dense']:.2f} times (dense) and "
            f"{growth['sparse']:.2f} times (sparse); {slopes['dense'] * ranks:.0f} and "
            f"{slopes['sparse'] * ranks:.0f} bytes a token of a rank, "
            f"{slopes['sparse'] / slopes['dense']:.2f} times as many; equal seconds of attention "
            f"at {last * sparse / dense:,.0f} tokens"
        )


def of_lengths(kind: str, ranks: int, args: Namespace) -> list[dict[str, float]]:
    """Return seconds and bytes of a rank for each length: the mean of the ranks' seconds in the
    step that has the least, and the largest memory.
    """

    def measured(lengths: list[int], env: dict[str, str]) -> list[list[dict[str, float]]]:
        given, what = (kind, lengths, args.chunk), f"{kind}, {lengths} tokens"
        return child(steps_of, *given, ranks=ranks, minutes=30, env=env, what=what)

    lengths, found = args.tokens, []
    steps = [*zip(*measured(lengths * args.repeats, CACHING), strict=True)]
    for i, tokens in enumerate(lengths):
        memory = max(x["memory"] for (x,) in measured([tokens], ALLOCATOR))
        of_steps = [
            {name: sum(x.get(name, 0.0) for x in step) / ranks for name in ("attention", "indexer")}
            for step in steps[i :: len(lengths)]
        ]
        found.append({"memory": memory} | min(of_steps, key=lambda x: x["attention"]))
    return found


if __name__ == "__main__":
    main()
