"""Compiled MLPs and norms: a run with them is the run without, and how many they are, in one graph
each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from helpers.meshes import mesh_of
from helpers.models import LLAMA
from helpers.options import sections
from helpers.ranks import run_on_ranks
from helpers.rows import local_batch, make_rows
from helpers.runs import Settings, logged, train, write_run
from titan_ulysses.config.schema import Optimizer
from titan_ulysses.model import hf
from titan_ulysses.optim.optimizer import build_optimizer
from titan_ulysses.setup.blocks import compile_blocks, find_blocks
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.train.step import train_step

# nn.LayerNorm is a class of torch's own, where Dynamo looks into none.
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 257,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "n_positions": 128,
}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
TILED: Settings = {"memory.mlp_tile_tokens": 16, "activation_checkpoint.offload": "host"}
WHOLE: Settings = {"memory.mlp_tile_tokens": -1, "activation_checkpoint.mode": "none"}
STEPS, LAYERS = 50, 2
OPTIMIZER = Optimizer(lr=1e-3)


def graphs_of(config: Path, settings: Settings) -> int:
    """How many graphs a run compiles."""
    torch._dynamo.utils.counters.clear()
    train(config, settings)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("model", "memory"),
    [
        pytest.param({}, TILED, id="llama, tiled"),
        pytest.param({"model.config": GPT2}, WHOLE, id="gpt2, whole", marks=pytest.mark.slow),
        pytest.param({}, WHOLE, id="llama, whole", marks=pytest.mark.slow),
        pytest.param({"model.config": GPT2}, TILED, id="gpt2, tiled", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_run(model: Settings, memory: Settings, tmp_path: Path) -> None:
    """Has the losses of an eager one, and its collectives are counted alike."""
    config = write_run(tmp_path)
    settings = memory | {
        "parallelism.sequence_parallel_degree": 2,
        "checkpoint.enable": False,
        "training.steps": 3,
    }
    settings |= model or {"model.config.num_hidden_layers": 1}
    graphs = {}
    for name, enable in {"eager": False, "compiled": True}.items():
        run = settings | {"job.name": name, "compile.enable": enable}
        graphs[name] = run_on_ranks(2, graphs_of, config, run, timeout=300)[0]
    assert graphs["eager"] == 0 and graphs["compiled"] >= 2
    eager, compiled = (logged(tmp_path / "outputs" / name) for name in graphs)
    assert [line["loss"] for line in compiled] == pytest.approx(
        [line["loss"] for line in eager], rel=1e-6
    )
    assert [line["grad_norm"] for line in compiled] == pytest.approx(
        [line["grad_norm"] for line in eager], rel=1e-5
    )
    assert [line["collectives"] for line in compiled] == [line["collectives"] for line in eager]
    assert (
        eager[0]["collectives"]["all_to_all"]["calls"] >= 8 and eager[-1]["loss"] < eager[0]["loss"]
    )


def losses(compiled: bool, options: dict) -> tuple[list[float], dict[str, int], int]:
    """Of each step on (sp2); graphs and their breaks; compiled parts."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    mesh = mesh_of(1, 1, 2)
    model = hf.build_on_meta(
        hf.load_model_config("", LLAMA | {"num_hidden_layers": LAYERS}), torch.float32
    )
    parallelize(model, mesh, param_dtype=torch.float32, **sections(compile=compiled, **options))
    parts = sum(
        "forward" in vars(part)
        for part in _parts(model, whole=options.get("mlp_tile_tokens") is None)
    )
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=0)
    optimizer, found = build_optimizer(model, OPTIMIZER), []
    for step in range(STEPS):
        rows = make_rows([(10, 13, 1), (24,)], masked="uneven", vocab_size=61, seed=step % 5)
        found.append(
            train_step(model, optimizer, [local_batch(rows, mesh)], mesh, max_norm=1.0)[0].item()
        )
    return (
        found,
        {
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
        },
        parts,
    )


def _parts(model: PreTrainedModel, *, whole: bool) -> Iterator[torch.nn.Module]:
    """Each block's MLP and first norm, or what stands for them in the tiles."""
    for block in model.model.layers:
        for module in (block.mlp, block.input_layernorm):
            yield module if whole else module.forward.fn


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"mlp_tile_tokens": 5, "checkpoint_every": 2, "offload": "host"}, {"checkpoint_every": 0}],
    ids=["tiled and offloaded", "whole and kept"],
)
def test_fifty_steps(options):
    """Fused kernels round otherwise than eager ones, and training multiplies that: within 1e-4 of
    each loss.
    """
    eager, _, none = run_on_ranks(2, losses, False, options, timeout=300)[0]
    compiled, graphs, parts = run_on_ranks(2, losses, True, options, timeout=300)[0]
    assert (none, parts) == (0, 2 * LAYERS)
    assert graphs["breaks"] == 0 and graphs["graphs"] >= 2
    worst = max(abs(a - b) / b for a, b in zip(compiled, eager, strict=True))
    print(f"{parts} compiled parts, {graphs}, largest relative difference of a loss {worst:.1e}")
    assert worst < 1e-4


def test_the_number_of_parts():
    model = hf.build_on_meta(hf.load_model_config("", LLAMA), torch.float32)
    assert compile_blocks(find_blocks(model)[1]) == 3 * LAYERS, (
        "untiled: the MLP and both norms of each block"
    )
