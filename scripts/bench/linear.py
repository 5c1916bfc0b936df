"""Memory and time of a layer that carries a state, streamed and not, by the functions of PyTorch.

    python scripts/bench/linear.py
    python scripts/bench/linear.py --tokens 4096 8192 --chunk 1024 --kinds mamba2

The layer alone, in one process, runs forward and backward on hidden states of each length, whole
and chunk by chunk. It is a checkpoint, as blocks are. The peak is that of the process's anonymous
memory above what it has before: the hidden states, the gradient of the output, and the parameters.
It holds the output, and the gradient of the hidden states where that is not written over the
gradient of the output. The slope is that of the peak over the lengths.

Another process takes the times, of both in turns. Its allocator keeps memory: where freed memory
is returned at once, as the measurement of the peak needs it, part of the time is page faults.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from common import ALLOCATOR, CACHING, TOKEN_IDS, child, model_table, parser_of, peak_memory, slope

_LONG = 10.0
"""Seconds of a backward that is not repeated."""


def block(kind: str, layer: str, **own: Any) -> dict[str, Any]:
    """Return a model of one block of width 256, with a layer of this kind."""
    table = model_table(kind, vocab=256, width=256, inner=32, layers=1, heads=(4, 4))
    return table | TOKEN_IDS | {"tie_word_embeddings": True, "layer_types": [layer]} | own


_HEADS = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
_SIZES = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
_NO_EXPERTS = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 32}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1}
_CONV = {"block_ff_dim": 32, "block_auto_adjust_ff_dim": False}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gated_deltanet": (
        "Gated DeltaNet, 8 heads of 64 x 64",
        block("qwen3_5_text", "linear_attention", **_HEADS, **_SIZES),
    ),
    "mamba2": (
        "Mamba-2, 8 heads of 64 x 64",
        block("granitemoehybrid", "linear_attention", **_NO_EXPERTS, **_MAMBA),
    ),
    "short_conv": ("short convolution of 3", block("lfm2", "conv", **_CONV)),
}


def measure(kind: str, tokens: int, chunk: int) -> dict[str, Any]:
    """Return the bytes of the peak, and the norms of output and gradient."""
    layer, mesh = layer_of(kind, streamed=chunk > 0)
    pass_through(layer, mesh, 1024, chunk)
    return pass_through(layer, mesh, tokens, chunk)


def take_times(kind: str, tokens: int, chunk: int) -> dict[str, Any]:
    """Return the CPU seconds of forward and backward, whole and in chunks: medians of three turns,
    in which one follows the other, or those of the first turn if it is long. The ratio is the
    median of those of the turns.
    """
    layers = {-1: layer_of(kind, streamed=False), chunk: layer_of(kind, streamed=True)}
    for size, layer in layers.items():
        pass_through(*layer, 1024, size)
    turns: list[list[dict[str, Any]]] = []
    while len(turns) < 3 and not (turns and turns[0][0]["backward"] > _LONG):
        turns.append([pass_through(*layer, tokens, size) for size, layer in layers.items()])
    found: dict[str, Any] = {
        name: [median(of[name] for of in one) for one in zip(*turns, strict=True)]
        for name in ("forward", "backward")
    }
    found["ratio"] = median(streamed["backward"] / whole["backward"] for whole, streamed in turns)
    return found


def pass_through(layer: Any, mesh: Any, length: int, chunk: int) -> dict[str, Any]:
    """One forward and backward: CPU seconds, bytes of the peak, norms of output and gradient."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = 1, length, 256
    hidden, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    hidden.requires_grad_()
    documents = documents_of(mesh, length, chunk)
    with peak_memory() as peaks:
        started = time.process_time()
        output = layer(hidden, ulysses=documents)
        middle = time.process_time()
        size = output.detach().norm().item()
        # No name here holds the output or the gradient while backward runs.
        held = [output, gradient]
        del output, gradient
        torch.autograd.backward(held.pop(0), held.pop())
        backward = time.process_time() - middle
    return {
        "forward": middle - started,
        "backward": backward,
        "peak": peaks["anonymous"] - peaks["before_anonymous"],
        "norms": [size, hidden.grad.norm().item()],
    }


def layer_of(kind: str, *, streamed: bool) -> tuple[Any, Any]:
    """Return the layer of a model of one block, as a sharded model has it, and the mesh."""
    import torch
    from torch import nn

    from titan_ulysses.distributed.mesh import build_mesh, init_distributed
    from titan_ulysses.memory.checkpointing import checkpoint_blocks
    from titan_ulysses.memory.sequences import ON_DEVICE
    from titan_ulysses.model import hf
    from titan_ulysses.setup.blocks import find_blocks
    from titan_ulysses.streaming.block import stream_blocks
    from titan_ulysses.ulysses.linear_attention import linear_layers, use_linear_attention

    init_distributed()
    mesh = build_mesh(sequence=1)
    config = hf.load_model_config("", KINDS[kind][1])
    model = hf.build_on_meta(config, torch.float32)
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=0)
    blocks = find_blocks(model)[1]
    use_linear_attention(blocks)
    (layer,) = linear_layers(blocks[0])
    layers = nn.ModuleList([layer])
    if streamed:
        stream_blocks(layers, ON_DEVICE)
    checkpoint_blocks(layers, every=1, store=None)
    return layer, mesh


def documents_of(mesh: Any, length: int, chunk: int) -> Any:
    """Return what the layer is told: one document, in chunks."""
    import torch

    from titan_ulysses.distributed.sequence import chunk_length
    from titan_ulysses.ulysses.attention import Ulysses
    from titan_ulysses.ulysses.cores import sdpa

    positions = torch.arange(length)[None]
    return Ulysses(mesh.sp, sdpa, ((length,),), positions, chunk_length(chunk, length, 1))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a streamed chunk")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    args = parser.parse_args()
    print("layers of width 256, fp32, one process, one thread")
    for kind in args.kinds:
        print(KINDS[kind][0])
        peaks: dict[int, list[tuple[float, float]]] = {-1: [], args.chunk: []}
        for tokens in args.tokens:
            for chunk, points in peaks.items():
                found = alone(measure, kind, tokens, chunk, ALLOCATOR)
                points.append((tokens, found["peak"]))
                norms = " and ".join(f"{x:.6f}" for x in found["norms"])
                said = f"peak {found['peak'] / 2**20:7.1f} MiB, norms of output and gradient"
                print(f"  {tokens:>7,} tokens, {named(chunk):<16} {said} {norms}")
            times = alone(take_times, kind, tokens, args.chunk, CACHING)
            print(f"  {tokens:>7,} tokens, whole and in chunks: {described(times)}")
            whole, streamed = (points[-1][1] for points in peaks.values())
            print(
                f"  {tokens:>7,} tokens: streamed, {streamed / whole:.2f} times the peak and "
                f"{times['ratio']:.2f} times the backward"
            )
        for chunk, points in peaks.items():
            if len(points) > 1:
                print(f"  {named(chunk)}: {slope(points) / 1024:.2f} KiB a token")


def alone(
    function: Callable[..., Any], kind: str, tokens: int, chunk: int, allocator: dict[str, str]
) -> Any:
    """Return what a function returns on one rank, in a process of its own."""
    given, what = (kind, tokens, chunk), f"{kind}, {tokens:,} tokens"
    return child(function, *given, ranks=1, minutes=10, env=allocator, what=what)[0]


def named(chunk: int) -> str:
    return "whole" if chunk < 0 else f"chunks of {chunk:,}"


def described(times: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {whole:.2f} and {streamed:.2f} s"
        for name in ("forward", "backward")
        for whole, streamed in [times[name]]
    )


if __name__ == "__main__":
    main()
