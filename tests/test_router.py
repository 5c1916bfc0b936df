"""Router losses: over the mesh, over tiles and in recomputation what transformers' are of the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from contextvars import copy_context
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from models import (
    KeepFp64,
    Record,
    Row,
    kept_in_fp64,
    largest_difference,
    local_batch,
    make_rows,
    mesh_of,
    train_plain,
    train_sharded,
)
from ranks import RankFailure, run_on_ranks
from titan_ulysses import parallelize, shard
from titan_ulysses.collectives import CollectiveCounter
from titan_ulysses.errors import UserError
from titan_ulysses.model import hf

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,  # so large that it is seen
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 5, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
}
SP2, SP4, DP2_SP2 = (1, 1, 2), (1, 1, 4), (1, 2, 2)


def model_of(family: str) -> dict[str, Any]:
    return {**SMALL, "model_type": family, **FAMILIES[family]}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- against transformers ---------------------------------------------------------------------------------------------

LENGTHS = {
    "whole": [(24,), (24,)],
    "packed": [(10, 13, 1), (6, 6, 12)],
}


def steps_of(lengths: str, accumulate: int) -> list[list[list[Row]]]:
    """Two steps; labels are masked, and not equally many in the accumulated batches, but tokens route all the same."""
    return [
        [
            make_rows(LENGTHS[lengths], masked=("uneven", "none")[batch], vocab_size=61, seed=10 * step + batch)
            for batch in range(accumulate)
        ]
        for step in range(2)
    ]


CASES = [
    ("qwen3_moe", SP2, "packed", 2),
    ("qwen3_moe", SP4, "whole", 1),
    ("qwen3_moe", DP2_SP2, "packed", 1),
    ("qwen3_moe", (2, 1, 2), "whole", 2),
    ("mixtral", SP2, "whole", 1),
    ("mixtral", DP2_SP2, "packed", 2),
    ("gpt_oss", SP4, "packed", 2),
    ("gpt_oss", DP2_SP2, "whole", 1),
]


def differences(family: str, degrees: tuple[int, int, int], lengths: str, accumulate: int) -> dict[str, float]:
    model, steps = model_of(family), steps_of(lengths, accumulate)
    ranks = degrees[0] * degrees[1] * degrees[2]
    found = run_on_ranks(
        ranks, kept_in_fp64, train_sharded, degrees, model, steps, torch.float64, checkpoint=False, attention="blockwise"
    )
    assert all(other.losses == found[0].losses for other in found)
    return largest_difference(found[0], kept_in_fp64(train_plain, model, steps, torch.float64))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity_in_fp64(case: tuple) -> None:
    """Losses, gradients, two AdamW steps."""
    worst = differences(*case)
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}


def test_the_loss_is_seen() -> None:
    model, steps = model_of("qwen3_moe"), steps_of("packed", 1)
    without = train_plain({**model, "output_router_logits": False}, steps, torch.float64)
    worst = largest_difference(train_plain(model, steps, torch.float64), without)
    assert worst["loss"] > 0.1 and worst["gradient of model.layers.0.mlp.gate.weight"] > 0.1
