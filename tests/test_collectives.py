"""The counter that metrics.jsonl shows: calls and bytes of one step against closed forms."""

from __future__ import annotations

import pytest
import torch

from helpers.meshes import mesh_of
from helpers.models import LLAMA
from helpers.ranks import run_on_ranks
from helpers.rows import local_batch, make_rows
from helpers.training import OPTIMIZER
from titan_ulysses.distributed.collectives import CollectiveCounter
from titan_ulysses.model import hf
from titan_ulysses.optim.optimizer import build_optimizer
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.train.step import train_step

LAYERS, ROWS, TOKENS, ITEM = 2, 2, 24, 4


def counted(checkpoint: bool, micro_batches: int) -> tuple[dict[str, tuple[int, int]], list[int]]:
    """The counts of one step on (sp2), and the elements of the parameters."""
    mesh = mesh_of(1, 1, 2)
    model = hf.build_on_meta(hf.load_model_config("", LLAMA), torch.float32)
    mode = "full" if checkpoint else "none"
    parallelize(model, mesh, activation_checkpoint={"mode": mode}, param_dtype=torch.float32)
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=0)
    optimizer = build_optimizer(model, OPTIMIZER)
    rows = make_rows([(10, 14), (TOKENS,)], masked="none", vocab_size=61, seed=0)
    batches = [local_batch(rows, mesh)] * micro_batches
    with CollectiveCounter() as counter:
        train_step(model, optimizer, batches, mesh, max_norm=1.0)
    return dict(counter.counts), [p.numel() for p in model.parameters()]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
def test_counts_and_bytes_of_a_step(checkpoint, micro_batches):
    (counts, parameters), (others, _) = run_on_ranks(2, counted, checkpoint, micro_batches)
    assert counts == others
    passes = (3 if checkpoint else 2) * micro_batches  # forward, backward, and forward again
    # Q, k, v there, the output back.
    heads = 2 * LLAMA["num_attention_heads"] + 2 * LLAMA["num_key_value_heads"]
    a_pass = ROWS * TOKENS // 2 * heads * LLAMA["head_dim"] * ITEM
    assert counts["all_to_all"] == (2 * LAYERS * passes, LAYERS * passes * a_pass)
    # FSDP hands in its half of each parameter to gather, the whole gradient to reduce (padded to
    # two equal halves).
    calls, size = counts["reduce_scatter"]
    # Blocks, embedding, head, the root with the last norm.
    assert calls == micro_batches * (LAYERS + 3)
    assert 0 <= size - micro_batches * sum(parameters) * ITEM < 1024
    # The number of tokens once, each micro-batch's loss, the norm of all parameters once.
    assert counts["all_reduce"] == (2 + micro_batches, 8 * (2 + micro_batches))
