"""Compare loss heads: ours, torch's chunked F.linear_cross_entropy, and F.linear followed by
F.cross_entropy.

    python scripts/bench/loss_head.py  T = 4,096, h 256, vocabulary 32,000; fp32 and bf16
    python scripts/bench/loss_head.py --tokens 16384 --rounds 3
    python scripts/bench/loss_head.py --tiles 130 1024 2048   our head, by the size of its tiles

Each contender runs forward and backward of hidden states [T, h] and weight [V, h], in a separate
process; the contenders take turns. Printed are medians over the runs: seconds, CPU seconds, the
resident memory that is added at the peak, and the relative error of the weight's gradient against
one in fp64 (norm of the difference by norm). The library should not use a contender that is slower,
takes more memory, or is less exact than another.

With --tiles, printed are the CPU seconds of our head with tiles of these sizes, and of the products
alone that add up the gradient of its weight: as they are on a CPU (a product in bf16, then added to
the gradient in fp32), and with operands cast to fp32. CUDA has a third way, an addmm with an output
wider than its operands, which a CPU lacks: scripts/gpu_check.py measures it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from common import ALLOCATOR, child, parser_of, peak_memory

CONTENDERS = {
    "ours": "ours",
    "torch": "F.linear_cross_entropy",
    "plain": "F.linear, F.cross_entropy",
}


def loss_of(contender: str, hidden: Any, weight: Any, labels: Any) -> Any:
    """Return the mean cross-entropy of hidden [T, h] and labels [T]."""
    import torch
    import torch.nn.functional as F

    if contender == "ours":
        from titan_ulysses.memory.loss_head import LossHead

        head = LossHead(torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta"))
        head.weight = weight
        return head(hidden[None], labels[None], torch.tensor(len(labels)))
    if contender == "torch":
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise SystemExit(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
        return F.linear_cross_entropy(
            hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions()
        )
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def contend(
    contender: str, dtype_name: str, tokens: int, width: int, vocabulary: int
) -> dict[str, float]:
    """Measure one contender in a child process."""
    import torch

    torch.manual_seed(0)
    dtype = getattr(torch, dtype_name)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.nn.Parameter((torch.randn(vocabulary, width) / width**0.5).to(dtype))
    labels = torch.randint(vocabulary, (tokens,))

    def gradient(rows: int) -> Any:
        loss_of(contender, hidden[:rows], weight, labels[:rows]).backward()
        grad, weight.grad, hidden.grad = weight.grad, None, None
        return grad

    gradient(tokens // 8)  # warms up
    with peak_memory() as peaks:
        started, cpu = time.perf_counter(), time.process_time()
        gradient(tokens)
        found = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    # The gradient's error. Few tokens, because in fp64 the logits take 16 bytes each.
    few = min(tokens, 2048)
    exact_weight = torch.nn.Parameter(weight.detach().double())
    loss_of("ours", hidden[:few].detach().double(), exact_weight, labels[:few]).backward()
    error = (gradient(few).double() - exact_weight.grad).norm() / exact_weight.grad.norm()
    return found | {"added": peaks["peak"] - peaks["before"], "error": error.item()}


def compare_tiles(args: argparse.Namespace) -> None:
    """Print the CPU seconds of our head and of its weight's gradient, for each size of a tile."""
    import torch

    from titan_ulysses.memory.loss_head import LossHead, add_product

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(1, args.tokens, args.hidden).bfloat16().requires_grad_()
    linear = torch.nn.Linear(args.hidden, args.vocabulary, bias=False, dtype=torch.bfloat16)
    labels = torch.randint(args.vocabulary, (1, args.tokens))
    total = torch.zeros(args.vocabulary, args.hidden)

    def head(tile: int) -> None:
        LossHead(linear, tile_tokens=tile)(hidden, labels, torch.tensor(args.tokens)).backward()
        hidden.grad = linear.weight.grad = None

    def products(tile: int, dtype: torch.dtype) -> None:
        left, right = torch.ones(tile, args.vocabulary).bfloat16(), hidden[0, :tile].detach()
        for _ in range(args.tokens // tile):
            add_product(total, left.t().to(dtype), right.to(dtype), adds_wide=False)

    def cpu_seconds(fn: Callable[..., None], *arguments: Any) -> float:
        found = []
        for _ in range(args.rounds + 1):
            started = time.process_time()
            fn(*arguments)
            found.append(time.process_time() - started)
        return statistics.median(found[1:])  # the first one warms up

    for tile in args.tiles:
        whole, added = cpu_seconds(head, tile), cpu_seconds(products, tile, torch.bfloat16)
        cast = cpu_seconds(products, tile, torch.float32)
        print(
            f"tiles of {tile:>5}: head {whole:6.3f} CPU s; the weight's gradient alone {added:6.3f}"
            f", with operands in fp32 {cast:6.3f}"
        )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiles", type=int, nargs="+", help="compare sizes of tiles instead")
    args = parser.parse_args()
    print(f"T = {args.tokens:,}, h {args.hidden}, vocabulary {args.vocabulary:,}, one thread")
    if args.tiles:
        return compare_tiles(args)
    sizes = args.tokens, args.hidden, args.vocabulary
    for dtype in ("float32", "bfloat16"):
        found: dict[str, list[dict]] = {contender: [] for contender in CONTENDERS}
        for _ in range(args.rounds):
            for contender, results in found.items():
                result = child(contend, contender, dtype, *sizes, minutes=5, env=ALLOCATOR)
                if isinstance(result, str):
                    print(f"{dtype:<10}{CONTENDERS[contender]:<28} {result}")
                else:
                    results.append(result)
        for contender, results in found.items():
            if results:
                median = {key: statistics.median(one[key] for one in results) for key in results[0]}
                print(
                    f"{dtype:<10}{CONTENDERS[contender]:<28} {median['seconds']:7.3f} s (CPU "
                    f"{median['cpu']:.3f})   {median['added'] / 2**20:7.0f} MiB   gradient off by "
                    f"{median['error']:.1e}"
                )


if __name__ == "__main__":
    main()
