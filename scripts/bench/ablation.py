"""Measure what each part of ALST's recipe saves on this machine: peak memory over S, its slope, and
step time.

    python scripts/bench/ablation.py  2 CPU ranks, or all GPUs
    python scripts/bench/ablation.py --what recipe --seq-lens 2048 4096 --repeats 1

There are three tables. `recipe`: the parts, added one by one to activation checkpointing under
FSDP. `head`: the loss alone, in one process. `layers`: the memory that activation checkpoints take
per layer, on the device and off it (off a CPU: on disk; off a GPU: in host memory).

Every number comes from fresh processes. On a CPU, memory is the part of the resident set that no
file backs (RssAnon of /proc/self/status, sampled), with an allocator that returns freed memory.
Times are measured with an allocator that keeps it. On a GPU, memory is that of tensors. One unit is
h * itemsize bytes, the size of the hidden state of one token.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from common import (
    ALLOCATOR,
    CACHING,
    LLAMA,
    ROOT,
    child,
    measure,
    parser_of,
    peak_memory,
    slope,
    training_step,
)

FOLDER = ROOT / "outputs" / "bench"
RECIPE: dict[str, dict[str, Any]] = {
    "baseline": {"degree": 1, "loss_tile_tokens": -1, "mlp_tile_tokens": -1},
    "+ tiled loss": {"loss_tile_tokens": 0},
    "+ Ulysses": {"degree": None},
    "+ tiled MLP": {"mlp_tile_tokens": 0},
    "+ offloaded checkpoints": {"offload": "disk"},
}
"""The settings that each part adds to those of the parts before it, all but `degree` (P) of
[memory] or [activation_checkpoint]. The last is the whole recipe.
"""
FLAT = 0.02
"""The slope with tiles should be 0. It may be at most this share of the slope without tiles."""


# ---------------------------------------------------------------- in child processes


def train(dtype: str, options: dict[str, Any], layers: int, lengths: list[int]) -> Any:
    """Train one step per length on every rank: its time and memory. Memory is measured with two
    steps, because only the second one has optimizer state.
    """
    step = training_step(
        {**LLAMA, "num_hidden_layers": layers},
        dtype=dtype,
        degree=options.pop("degree", None),
        activation_checkpoint={
            "offload": options.pop("offload", "none"),
            "offload_folder": str(FOLDER),
        },
        memory=options,
    )
    return measure(step, lengths)


def head(dtype: str, tile_tokens: int, seq_len: int) -> list[dict[str, int]]:
    """Measure in one process the peak of a loss head's forward and backward."""
    import torch

    from titan_ulysses.memory.loss_head import LossHead

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden_size, vocab = LLAMA["hidden_size"], LLAMA["vocab_size"]
    kind = {"dtype": getattr(torch, dtype), "device": device}
    linear = torch.nn.Linear(hidden_size, vocab, bias=False, **kind)
    loss_head = LossHead(linear, tile_tokens=tile_tokens)
    labels = torch.arange(seq_len, device=device)[None] % vocab
    with peak_memory() as peaks:
        hidden = torch.randn(1, seq_len, hidden_size, **kind, requires_grad=True)
        loss_head(hidden, labels, torch.tensor(seq_len, device=device)).backward()
    return [peaks]


# ---------------------------------------------------------------- the parent


class Bench:
    """Starts child processes, and summarizes what they print."""

    def __init__(self, args: argparse.Namespace, on_gpu: bool):
        self.args, self.on_gpu = args, on_gpu
        self.unit = LLAMA["hidden_size"] * (2 if args.dtype == "bfloat16" else 4)
        self.offload = {"offload": "host" if on_gpu else "disk"}

    def steps(self, lengths: list[int], options: dict, layers: int, env: dict = ALLOCATOR) -> Any:
        ranks, minutes = self.args.ranks, self.args.minutes
        given = self.args.dtype, options, layers, lengths
        return child(train, *given, ranks=ranks, minutes=minutes, env=env)

    def two_steps(self, seq_len: int, options: dict, layers: int = 4) -> Any:
        return self.steps([seq_len] * 2, options, layers)

    def head(self, seq_len: int, tile_tokens: int) -> Any:
        minutes = self.args.minutes
        return child(head, self.args.dtype, tile_tokens, seq_len, minutes=minutes, env=ALLOCATOR)

    def peaks(
        self, seq_lens: list[int], measure: Callable[..., Any], *given: Any
    ) -> dict[int, list[int] | str]:
        """Return for each S the highest peak of any rank, in bytes, in each repeat of
        measure(S, *given).

        Where a child fails, the value is the reason instead, and no longer S is tried.
        """
        found: dict[int, list[int] | str] = {}
        for seq_len in seq_lens:
            each = [measure(seq_len, *given) for _ in range(self.args.repeats)]
            failed = next((one for one in each if isinstance(one, str)), None)
            found[seq_len] = failed or [max(rank["anonymous"] for rank in one) for one in each]
            if failed:
                break
        return found

    def seconds(self, seq_len: int, options: dict) -> float | str:
        lengths = [seq_len // 8, *[seq_len] * self.args.repeats]
        found = self.steps(lengths, options, 4, CACHING)
        return found if isinstance(found, str) else statistics.median(found[0]["seconds"][1:])


def bytes_a_token(peaks: dict[int, list[int] | str]) -> float | None:
    """Return the slope of the peak over S, or None where fewer than two S were measured."""
    points = [(s, peak) for s, each in peaks.items() if not isinstance(each, str) for peak in each]
    return slope(points) if len({s for s, _ in points}) > 1 else None


def show(
    name: str, peaks: dict[int, list[int] | str], seq_lens: list[int], extra: str = ""
) -> None:
    """Print a line with the median peak at each S, and the slope."""
    cells = []
    for seq_len in seq_lens:
        each = peaks.get(seq_len, "-")
        cells.append(
            f"{each:>9.9}" if isinstance(each, str) else f"{statistics.median(each) / 2**20:>9,.0f}"
        )
    found = bytes_a_token(peaks)
    kib = "-" if found is None else f"{found / 1024:.2f}"
    print(f"{name:<26} {' '.join(cells)}  {kib:>9}{extra}")


def heading(what: str, seq_lens: list[int], extra: str = "") -> None:
    print(f"\n{what:<26} {' '.join(f'{s:>9,}' for s in seq_lens)}  {'KiB/token':>9}{extra}")


def recipe(bench: Bench) -> None:
    """Measure the parts of the recipe, added one by one."""
    seq_lens = bench.args.seq_lens
    options: dict[str, Any] = {}
    heading("peak MiB a rank at S =", seq_lens, f"  step at S = {seq_lens[-1]:,}")
    for name, more in RECIPE.items():
        options |= bench.offload if "offload" in more else more
        peaks = bench.peaks(seq_lens, bench.two_steps, options)
        done = [s for s, each in peaks.items() if not isinstance(each, str)]
        seconds = bench.seconds(seq_lens[-1], options) if seq_lens[-1] in done else "-"
        said = f"  {seconds:8.2f} s" if isinstance(seconds, float) else f"  {seconds:.40}"
        show(name, peaks, seq_lens, said)


def loss_head(bench: Bench) -> None:
    """Measure the loss alone, in one tile and in many."""
    seq_lens = bench.args.head_seq_lens
    slopes = []
    heading("loss head, MiB at S =", seq_lens)
    for name, tile, lengths in (
        ("one tile", -1, [s for s in seq_lens if s <= bench.args.longest_untiled]),
        ("tiles of 64 MiB", 0, seq_lens),
    ):
        peaks = bench.peaks(lengths, bench.head, tile)
        slopes.append(bytes_a_token(peaks))
        show(name, peaks, seq_lens)
    untiled, tiled = slopes
    if untiled and tiled is not None:
        print(f"slope of tiles to that of one tile: {tiled / untiled:.4f} (at most {FLAT} wanted)")


def layers(bench: Bench) -> None:
    """Measure the memory of activation checkpoints per token and layer.

    Slopes over S tell it, because they do not contain parameters and gradients.
    """
    seq_lens, where = bench.args.layers_seq_lens, bench.offload["offload"]
    heading("peak MiB a rank at S =", seq_lens, "  units/token of the rank")
    for offload in ("none", where):
        points = []
        for count in bench.args.layers_counts:
            peaks = bench.peaks(seq_lens, bench.two_steps, {"offload": offload}, count)
            text, found = "  -", bytes_a_token(peaks)
            if found is not None:
                points.append((count, found * bench.args.ranks / bench.unit))
                text = f"  {points[-1][1]:8.2f}"
            show(f"offload {offload}, {count} layers", peaks, seq_lens, text)
        if len(points) == len(bench.args.layers_counts):
            print(f"offload {offload}: {slope(points):.3f} units a token of the rank and layer")


def main() -> None:
    tables = {"recipe": recipe, "head": loss_head, "layers": layers}
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--what", nargs="+", choices=list(tables), default=list(tables))
    add("--seq-lens", type=int, nargs="+", default=[2048, 4096, 8192, 16_384], help="of the recipe")
    add("--head-seq-lens", type=int, nargs="+", default=[2**i for i in range(11, 17)])
    add("--longest-untiled", type=int, default=16_384, help="of the loss head in one tile")
    add("--layers-seq-lens", type=int, nargs="+", default=[4096, 8192, 16_384])
    add("--layers-counts", type=int, nargs="+", default=[2, 4, 8])
    add("--ranks", type=int, help="by default all GPUs, or 2")
    add("--dtype", choices=["float32", "bfloat16"], help="by default fp32 on a CPU, bf16 on a GPU")
    add("--repeats", type=int, default=3)
    add("--minutes", type=float, default=20, help="patience a process")
    args = parser.parse_args()

    import torch

    # The parts of this file that need a GPU are untested.
    gpus = torch.cuda.device_count()
    args.ranks = args.ranks or gpus or 2
    args.dtype = args.dtype or ("bfloat16" if gpus else "float32")
    FOLDER.mkdir(parents=True, exist_ok=True)
    bench = Bench(args, on_gpu=gpus > 0)
    kind = f"{args.ranks} {'GPU' if gpus else 'CPU'} ranks"
    print(f"{kind}, llama, h 256, ffn 896, vocab 32,000, {args.dtype}, median of {args.repeats}")
    for what in args.what:
        tables[what](bench)


if __name__ == "__main__":
    main()
