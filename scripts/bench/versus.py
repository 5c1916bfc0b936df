"""Compare our training step with DeepSpeed's ALST and with transformers on FSDP2, for the same
weights, sequences and steps.

    python scripts/bench/versus.py  losses must agree; then time and the slope of memory
    python scripts/bench/versus.py --peers
        also accelerate with DeepSpeed and torch's ring attention; and what a user writes for each
    python scripts/bench/versus.py --what memory --contenders ours alst --dtypes float32

DeepSpeed gets an environment of its own, .venv-deepspeed (see versus_deepspeed.py). Every number
comes from fresh gloo processes with one thread each.

Time: the contenders take turns, and a ratio is the median of the ratios within each turn. Look at
the ratio of CPU seconds where other work uses the cores. Memory: the slope of the resident peak
over S, by least squares, in units of h * itemsize bytes per token of a rank, which is how many
hidden states a token costs. Ranks of ALST and ours hold S / P tokens; those of FSDP2, without
sequence parallelism, hold S. All results are also written as JSON.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from common import ALLOCATOR, CACHING, LLAMA, ROOT, child, measure, parser_of, slope, training_step

FOLDER = ROOT / "outputs" / "bench" / "versus"
SMALL: dict[str, Any] = {**LLAMA, "num_hidden_layers": 2, "vocab_size": 2048}
"""The model for memory: with fewer parameters, the cost of a token is clearer."""
MODELS: dict[str, dict[str, Any]] = {"agreement": LLAMA, "time": LLAMA, "memory": SMALL}
LOSS_TILE_BYTES = {"agreement": 64 * 2**20, "time": 64 * 2**20, "memory": 4 * 2**20}
"""Bytes of fp32 logits in a loss tile, the same for ours and for ALST, except where
--alst-loss-tile-mib applies.
"""
CONTENDERS = {
    "ours": "ours",
    "streamed": "ours, small chunks",
    "kept": "small chunks, attention kept",
    "disk": "small chunks, all in files",
    "whole": "ours, not streamed",
    "library": "ours, an own loop",
    "plain": "one plain process",
    "alst": "DeepSpeed ALST",
    "alst-reentrant": "ALST, reentrant",
    "accelerate": "accelerate + DeepSpeed",
    "fsdp2": "transformers + FSDP2",
    "ring": "torch's ring + FSDP2",
}
"""The contenders and their names. ALST was published with reentrant activation checkpoints, which
were the default of transformers then. Today's default, the non-reentrant ones, costs ALST less.
"""
MODULES = {
    "library": "versus_library",
    "plain": "versus_plain",
    "alst": "versus_alst",
    "alst-reentrant": "versus_alst",
    "accelerate": "versus_accelerate",
    "fsdp2": "versus_fsdp2",
    "ring": "versus_ring",
}
"""The file of each contender whose step is not that of `train.py`."""
DEEPSPEED = ("alst", "alst-reentrant", "accelerate")
UNABLE = "cannot run on this machine"
SMALL_CHUNKS = {"memory": {"stream_chunk_tokens": 2048}}
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "streamed": SMALL_CHUNKS,
    "kept": SMALL_CHUNKS | {"activation_checkpoint": {"keep_attention": "all"}},
    "disk": {"memory": {"stream_chunk_tokens": 2048, "stream_offload": "disk"}},
    "whole": {"memory": {"stream_chunk_tokens": -1}},
}
"""The options of our own contenders. By default a chunk has 4,096 tokens a rank."""
TARGET = 0.75
TOLERANCE = {"float32": (1e-5, 1e-3), "bfloat16": (1e-3, 5e-2)}
"""Relative tolerances of (loss, gradient norm) at the first step; ten times as much at the last."""
OPTIMIZER = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
"""The defaults of this library, for the other contenders."""


# ---------------------------------------------------------------- on the ranks


def contend(settings: dict[str, Any]) -> dict[str, Any]:
    """Train the steps of one contender on every rank: their time, memory and losses."""
    args = argparse.Namespace(**settings, optimizer=OPTIMIZER)
    if args.contender in OURS:
        options = OURS[args.contender]
        memory = {"loss_tile_tokens": args.loss_tile_tokens} | options.get("memory", {})
        step = training_step(args.folder, dtype=args.dtype, **options | {"memory": memory})
    else:
        step = import_module(MODULES[args.contender]).build_step(args)
    try:
        return measure(step, args.lengths)
    except NotImplementedError as error:
        raise SystemExit(f"{UNABLE}: {error}") from error


def save_weights(folder: Path, config: dict) -> None:
    """Save a model's random weights, in fp32 but with values that are exact in bf16, because
    DeepSpeed rounds the weights before it makes its master copy.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)


# ---------------------------------------------------------------- the parent


def accelerate_launch(ranks: int, dtype: str, python: str) -> list[str]:
    """Return the command that runs common.py by `accelerate launch`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    precision = {"float32": "no", "bfloat16": "bf16"}[dtype]
    command = [python, "-m", "accelerate.commands.launch", "--config_file"]
    command += ["scripts/bench/versus_accelerate.yaml", "--mixed_precision", precision]
    command += ["--num_processes", str(ranks), "--parallelism_config_sp_size", str(ranks)]
    return [*command, "--main_process_port", str(port), "scripts/bench/common.py"]


class Match:
    """Starts the contenders with the same settings, and compares what they print."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.deepspeed: tuple[str, dict[str, str]] = ("", {})
        if any(name in DEEPSPEED for name in args.contenders):
            from versus_deepspeed import environment

            self.deepspeed = environment()

    def model(self, what: str) -> dict[str, Any]:
        """Return the model of a comparison, with as many layers as asked for."""
        layers = self.args.layers or MODELS[what]["num_hidden_layers"]
        return {**MODELS[what], "num_hidden_layers": layers}

    def child(self, contender: str, what: str, dtype: str, lengths: list[int]) -> Any:
        """Run one contender. Returns what its ranks found (`contend`), or a string with the reason
        where it failed.
        """
        config = self.model(what)
        folder = FOLDER / (what if self.args.layers is None else f"{what}-{self.args.layers}")
        if not (folder / "config.json").is_file():
            save_weights(folder, config)
        python, variables = self.deepspeed if contender in DEEPSPEED else (sys.executable, {})
        tile_bytes = LOSS_TILE_BYTES[what]
        if contender.startswith("alst") and what == "time":
            tile_bytes = self.args.alst_loss_tile_mib * 2**20
        settings = {
            "contender": contender,
            "ranks": self.args.ranks,
            "folder": str(folder),
            "dtype": dtype,
            "loss_tile_tokens": tile_bytes // (4 * config["vocab_size"]),
            "lengths": lengths,
        }
        ranks = 1 if contender == "plain" else self.args.ranks
        how: dict[str, Any] = {"ranks": ranks, "python": python, "minutes": self.args.minutes}
        if contender == "accelerate":
            how["launcher"] = accelerate_launch(ranks, dtype, python)
        allocator = CACHING if what == "time" else ALLOCATOR
        return child(contend, settings, **how, env={**allocator, **variables})

    def agreement(self) -> list[dict]:
        """Compare losses and gradient norms of a few steps at a small S. Ends the program where
        they do not agree.
        """
        lengths, rows = [self.args.agreement_seq_len] * 4, []
        for dtype in self.args.dtypes:
            reference = None
            for contender in self.args.contenders:
                found = self.child(contender, "agreement", dtype, lengths)
                name = CONTENDERS[contender]
                if isinstance(found, str) and UNABLE in found:
                    print(f"{dtype:<9} {name:<21} {found}")
                    continue
                if isinstance(found, str):
                    raise SystemExit(f"{name}, {dtype}: {found}")
                losses, norms = found[0]["loss"], found[0]["norm"]
                row = {"contender": contender, "dtype": dtype}
                rows.append(row | {"losses": losses, "norms": norms})
                print(
                    f"{dtype:<9} {name:<21} loss {losses[0]:.6f} -> {losses[-1]:.6f}   gradient "
                    f"norm {norms[0]:.5f} -> {norms[-1]:.5f}"
                )
                reference = reference or (losses, norms)
                for values, expected, tolerance in zip(
                    (losses, norms), reference, TOLERANCE[dtype], strict=True
                ):
                    for at, allowed in ((0, tolerance), (-1, 10 * tolerance)):
                        if not abs(values[at] - expected[at]) <= allowed * abs(expected[at]):
                            raise SystemExit(
                                f"{name} does not train what "
                                f"{CONTENDERS[self.args.contenders[0]]} trains: {values} against "
                                f"{expected}. There is nothing to compare."
                            )
        return rows

    def time(self) -> list[dict]:
        """Measure the seconds of a step, in turns, and the ratio of ours to those of the others."""
        rows = []
        for dtype in self.args.dtypes:
            for seq_len in self.args.seq_lens:
                turns = [self._turn(dtype, seq_len) for _ in range(self.args.rounds)]
                for contender in self.args.contenders:
                    rows.append(self._show_time(contender, dtype, seq_len, turns))
        return rows

    def _turn(self, dtype: str, seq_len: int) -> dict[str, dict[str, float] | str]:
        """Return the seconds per sequence of each contender, on the clock and of rank 0's CPU, or a
        string with the reason where there are none.
        """
        turn: dict[str, dict[str, float] | str] = {}
        for contender in self.args.contenders:
            if contender == "fsdp2" and seq_len > self.args.longest_fsdp2:
                turn[contender] = "not tried (--longest-fsdp2)"
                continue
            # Two short steps to warm up. In the second one DeepSpeed traces what it prefetches from
            # then on.
            lengths = [seq_len // 8] * 2 + [seq_len] * self.args.steps
            found = self.child(contender, "time", dtype, lengths)
            if not isinstance(found, str):
                each = self.args.ranks if contender == "fsdp2" else 1
                found = {x: statistics.median(found[0][x][2:]) / each for x in ("seconds", "cpu")}
            turn[contender] = found
        return turn

    def _show_time(self, contender: str, dtype: str, seq_len: int, turns: list[dict]) -> dict:
        row = {"contender": contender, "dtype": dtype, "seq_len": seq_len}
        row["turns"] = [turn[contender] for turn in turns]
        text = f"{dtype:<9} S {seq_len:>6,}  {CONTENDERS[contender]:<21}"
        good = [turn for turn in turns if not isinstance(turn[contender], str)]
        if not good:
            print(f"{text} {turns[0][contender]}")
            return row
        for key in ("seconds", "cpu"):
            row[key] = statistics.median(turn[contender][key] for turn in good)
        text += f" {row['seconds']:8.2f} s a sequence (CPU {row['cpu']:.2f})"
        both = [turn for turn in good if not isinstance(turn.get("ours", ""), str)]
        if contender != "ours" and both:
            ratios = {
                key: [turn["ours"][key] / turn[contender][key] for turn in both]
                for key in ("seconds", "cpu")
            }
            row["ratio"], row["cpu_ratio"] = (statistics.median(each) for each in ratios.values())
            spread = f"{min(ratios['seconds']):.2f} to {max(ratios['seconds']):.2f}"
            text += f"   ours takes {row['ratio']:.2f} of it ({spread}; CPU {row['cpu_ratio']:.2f})"
            if contender.startswith("alst") and seq_len <= 16_384:
                text += f", at most {TARGET} wanted"
        print(text)
        return row

    def memory(self) -> list[dict]:
        """Measure the slope of the peak over S, for all repeats together and for each."""
        rows = []
        for dtype in self.args.dtypes:
            ours = None
            for contender in self.args.contenders:
                row = self._peaks(contender, dtype)
                rows.append(row)
                self._show_memory(row, ours)
                ours = row.get("units") if contender == "ours" else ours
        return rows

    def _show_memory(self, row: dict, ours: float | None) -> None:
        text = f"{row['dtype']:<9} {CONTENDERS[row['contender']]:<21}"
        if "units" not in row:
            print(f"{text} {row['failed']}")
            return
        medians = (statistics.median(each) / 2**20 for each in row["peaks"].values())
        spread = f"{min(row['each']):.2f} to {max(row['each']):.2f}"
        text += f" {row['units']:6.2f} units a rank-token ({spread})"
        text += f"   peaks {'  '.join(f'{median:,.0f}' for median in medians)} MiB"
        if ours is not None:
            row["ratio"] = ours / row["units"]
            text += f"   ours takes {row['ratio']:.2f} of it"
            text += f", at most {TARGET} wanted" if row["contender"].startswith("alst") else ""
        print(text)

    def _peaks(self, contender: str, dtype: str) -> dict:
        row: dict[str, Any] = {"contender": contender, "dtype": dtype, "peaks": {}}
        unit = SMALL["hidden_size"] * (2 if dtype == "bfloat16" else 4)
        share = 1 if contender == "fsdp2" else self.args.ranks
        for seq_len in self.args.seq_lens:
            if contender == "fsdp2" and seq_len > self.args.longest_fsdp2:
                continue
            peaks = row["peaks"][seq_len] = []
            for _ in range(self.args.repeats):
                # The second step has optimizer state.
                found = self.child(contender, "memory", dtype, [seq_len] * 2)
                if isinstance(found, str):
                    return {**row, "failed": f"S {seq_len:,}: {found}"}
                # Pages of files are not what a rank needs: the system writes them out.
                kind = "anonymous" if contender == "disk" else "peak"
                peaks.append(statistics.mean(rank[kind] for rank in found))
        if len(row["peaks"]) < 2:
            return {**row, "failed": "a slope needs two sequence lengths"}
        runs = [
            [(s / share, p[i] / unit) for s, p in row["peaks"].items()]
            for i in range(self.args.repeats)
        ]
        row["each"] = [slope(points) for points in runs]
        row["units"] = slope([point for points in runs for point in points])
        return row


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--what", nargs="+", choices=["agreement", "time", "memory"], default=list(MODELS))
    add(
        "--contenders",
        nargs="+",
        choices=[name for name in CONTENDERS if name != "plain"],
        default=[name for name in CONTENDERS if name not in ("plain", "library", "ring")],
    )
    add("--dtypes", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    add("--seq-lens", type=int, nargs="+", default=[8192, 16_384, 32_768])
    add(
        "--peers",
        action="store_true",
        help="the comparison of versus_peers.py, with settings of its own but for --ranks and "
        "--minutes",
    )
    add(
        "--longest-fsdp2",
        type=int,
        default=16_384,
        help="beyond it FSDP2, with P times the work, rests",
    )
    add("--layers", type=int, help="layers of the models: 4, for memory 2")
    add("--agreement-seq-len", type=int, default=2048)
    add("--ranks", type=int, default=2)
    add("--rounds", type=int, default=3, help="turns of each contender, for times")
    add("--steps", type=int, default=1, help="timed steps a turn")
    add("--repeats", type=int, default=3, help="for memory")
    add(
        "--alst-loss-tile-mib",
        type=int,
        default=1024,
        help="ALST's loss tiles where time is measured: it gathers the head's weight for each, so "
        "large are faster",
    )
    add("--minutes", type=float, default=30, help="patience a process")
    args = parser.parse_args()
    # Ours is first, because the others are compared with it.
    args.contenders = [name for name in CONTENDERS if name in args.contenders]
    return args


def main() -> None:
    args = arguments()
    if args.peers:
        import versus_peers

        return versus_peers.main(args)
    match, table = Match(args), {}
    print(f"{args.ranks} gloo ranks, one thread each, h {LLAMA['hidden_size']}, 8/4 heads, ffn 896")
    for what in args.what:
        config = match.model(what)
        print(f"\n{what}: {config['num_hidden_layers']} layers, vocab {config['vocab_size']:,}")
        table[what] = getattr(match, what)()
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / "versus.json").write_text(json.dumps({"settings": vars(args), **table}, indent=1))
    print(f"\nwritten to {(FOLDER / 'versus.json').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
