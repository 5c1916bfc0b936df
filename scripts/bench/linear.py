"""Memory and time of a layer that carries a state, streamed and not, by the functions of PyTorch.

    python scripts/bench/linear.py
    python scripts/bench/linear.py --tokens 4096 8192 --chunk 1024 --kinds mamba2

A model of a single block, whose MLP is small, runs forward and backward on one process, whole and
chunk by chunk, at each length. The peak is that of the process's anonymous memory above what it has
before. It holds everything that grows with the length: the layer, the block's input and output,
and token ids and positions. The slope is that of the peak over the lengths.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from common import ALLOCATOR, batch_of, launch, peak_memory, run, sequence, sharded_model, slope

BLOCK: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2**22,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_TILE_TOKENS = 1024
"""Small, so that the peak is not in the last norm or in the head."""
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gated_deltanet": (
        "Gated DeltaNet, 8 heads of 64 x 64",
        {
            "model_type": "qwen3_5_text",
            "layer_types": ["linear_attention"],
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
    "mamba2": (
        "Mamba-2, 8 heads of 64 x 64",
        {
            "model_type": "granitemoehybrid",
            "layer_types": ["linear_attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 32,
            "mamba_n_heads": 8,
            "mamba_d_head": 64,
            "mamba_d_state": 64,
            "mamba_n_groups": 1,
        },
    ),
    "short_conv": (
        "short convolution of 3",
        {
            "model_type": "lfm2",
            "layer_types": ["conv"],
            "block_ff_dim": 32,
            "block_auto_adjust_ff_dim": False,
        },
    ),
}


def measure(kind: str, tokens: int, chunk: int) -> None:
    """Print the bytes of the peak and the CPU seconds of forward and backward, of a warm pass."""
    import torch

    model, mesh = sharded_model(
        BLOCK | KINDS[kind][1],
        stream_chunk_tokens=chunk,
        mlp_tile_tokens=_TILE_TOKENS,
        loss_tile_tokens=_TILE_TOKENS,
    )
    found: dict[str, float] = {}

    def pass_through(length: int) -> None:
        batch = batch_of(sequence(0, length), mesh, model)
        with peak_memory() as peaks:
            started = time.process_time()
            loss = model(**batch.inputs(), num_items_in_batch=torch.tensor(length - 1)).loss
            middle = time.process_time()
            loss.backward()
            found.update(forward=middle - started, backward=time.process_time() - middle)
        found["peak"] = peaks["anonymous"] - peaks["before_anonymous"]
        found["loss"] = loss.item()

    pass_through(1024)
    pass_through(tokens)
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a streamed chunk")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, tokens, chunk = args.measure
        return measure(kind, int(tokens), int(chunk))

    print(f"a block of width {BLOCK['hidden_size']}, fp32, one process, one thread", flush=True)
    for kind in args.kinds:
        print(KINDS[kind][0], flush=True)
        peaks: dict[int, list[tuple[float, float]]] = {-1: [], args.chunk: []}
        for tokens in args.tokens:
            found = {}
            for chunk in peaks:
                command = [*launch(1, __file__), "--measure", kind, str(tokens), str(chunk)]
                found[chunk] = run(command, threads=1, minutes=10, env=ALLOCATOR)
                show(tokens, chunk, found[chunk])
                if isinstance(found[chunk], dict):
                    peaks[chunk].append((tokens, found[chunk]["peak"]))
            if all(isinstance(x, dict) for x in found.values()):
                whole, streamed = found.values()
                ratios = {name: streamed[name] / whole[name] for name in ("peak", "backward")}
                print(
                    f"  {tokens:>7,} tokens: streamed, {ratios['peak']:.2f} times the peak and "
                    f"{ratios['backward']:.2f} times the backward",
                    flush=True,
                )
        for chunk, points in peaks.items():
            if len(points) > 1:
                print(f"  {said(chunk)}: {slope(points) / 1024:.2f} KiB a token", flush=True)


def said(chunk: int) -> str:
    return "whole" if chunk < 0 else f"chunks of {chunk:,}"


def show(tokens: int, chunk: int, found: dict[str, float] | str) -> None:
    if not isinstance(found, str):
        found = (
            f"peak {found['peak'] / 2**20:7.1f} MiB, forward {found['forward']:6.2f} s, backward "
            f"{found['backward']:6.2f} s, loss {found['loss']:.6f}"
        )
    print(f"  {tokens:>7,} tokens, {said(chunk):<16} {found}", flush=True)


if __name__ == "__main__":
    main()
