"""Compiled MLPs and norms: how many, in one graph each, and what it does to fifty steps of training."""

from __future__ import annotations

import pytest
import torch

from models import LLAMA, local_batch, make_rows, mesh_of
from ranks import run_on_ranks
from titan_ulysses.config import Optimizer
from titan_ulysses.memory.optimizer import build_optimizer
from titan_ulysses.model import hf
from titan_ulysses.parallelize import compile_blocks, find_blocks, parallelize
from titan_ulysses.step import train_step

STEPS, LAYERS = 50, 2
OPTIMIZER = Optimizer(lr=1e-3)


def losses(compiled: bool, options: dict) -> tuple[list[float], dict[str, int], int]:
    """Of each step on (sp2); graphs and their breaks; compiled parts."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    mesh = mesh_of(1, 1, 2)
    model = hf.build_on_meta(hf.load_model_config("", LLAMA | {"num_hidden_layers": LAYERS}), torch.float32)
    parallelize(model, mesh, param_dtype=torch.float32, compile=compiled, **options)
    parts = sum(m._compiled_call_impl is not None for m in _parts(model))
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=0)
    optimizer, found = build_optimizer(model.parameters(), OPTIMIZER), []
    for step in range(STEPS):
        rows = make_rows([(10, 13, 1), (24,)], masked="uneven", vocab_size=61, seed=step % 5)
        found.append(train_step(model, optimizer, [local_batch(rows, mesh)], mesh, max_norm=1.0)[0].item())
    return found, {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}, parts


def _parts(model) -> list[torch.nn.Module]:
    """Each block's MLP and first norm, or what stands for them in the tiles."""
    for block in model.model.layers:
        for module in (block.mlp, block.input_layernorm):
            yield getattr(module.forward, "fn", module)


@pytest.mark.parametrize(
    "options",
    [{"mlp_tile_tokens": 5, "checkpoint_every": 2, "offload": "host"}, {"checkpoint_every": 0}],
    ids=["tiled and offloaded", "whole and kept"],
)
def test_fifty_steps(options):
    """Fused kernels round otherwise than eager ones, and training multiplies that: within 1e-4 of each loss."""
    eager, _, none = run_on_ranks(2, losses, False, options, timeout=300)[0]
    compiled, graphs, parts = run_on_ranks(2, losses, True, options, timeout=300)[0]
    assert (none, parts) == (0, 2 * LAYERS)
    assert graphs["breaks"] == 0 and graphs["graphs"] >= 2
    worst = max(abs(a - b) / b for a, b in zip(compiled, eager, strict=True))
    print(f"{parts} compiled parts, {graphs}, largest relative difference of a loss {worst:.1e}")
    assert worst < 1e-4


def test_the_number_of_parts():
    model = hf.build_on_meta(hf.load_model_config("", LLAMA), torch.float32)
    assert compile_blocks(find_blocks(model)[1]) == 3 * LAYERS, "untiled: the MLP and both norms of each block"
