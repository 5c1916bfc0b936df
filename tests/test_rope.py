"""RoPE that depends on a sequence's length: each document of a packed batch by its own, against each one alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from models import LLAMA, STARCODER2, kept_in_fp64, largest_difference, make_rows, train_plain, train_sharded
from ranks import run_on_ranks
from titan_ulysses.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.model.rope import use_document_lengths

BOUND = 11
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 5.0, 7.0],
    "original_max_position_embeddings": BOUND,
}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}
GEMMA3 |= {"sliding_window": 5, "query_pre_attn_scalar": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PHI3 = {**LLAMA, "model_type": "phi3", "pad_token_id": 0, "original_max_position_embeddings": BOUND}
MODELS: dict[str, dict[str, Any]] = {
    "dynamic": {**STARCODER2, "rope_parameters": DYNAMIC},
    "longrope": {**STARCODER2, "rope_parameters": LONG},
    "phi3, longrope": {**PHI3, "rope_parameters": LONG},
    "gemma3, by layer": {**GEMMA3, "rope_parameters": {"sliding_attention": PLAIN, "full_attention": DYNAMIC}},
    "gemma3, both": {**GEMMA3, "rope_parameters": {"sliding_attention": LONG, "full_attention": DYNAMIC}},
}
# Plain "dynamic" remembers how long a sequence was until a short one comes: each long document follows a short one.
LENGTHS = {
    "whole, long": [(24,), (24,)],
    "packed, on both sides": [(10, 13, 1), (6, 6, 12)],
    "packed, short": [(10, 11, 3), (8, 8, 8)],
}


@pytest.mark.parametrize("degrees", [(1, 1, 1), (1, 1, 2), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_parity(name: str, lengths: str, degrees: tuple[int, int, int]) -> None:
    check(name, lengths, degrees, keep_fp64=False)


@pytest.mark.parametrize("name", ["phi3, longrope", "gemma3, by layer", "gemma3, both"])
def test_parity_of_other_families(name: str) -> None:
    if name == "gemma3, both" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("transformers 5.17 cannot do longrope by kinds of layers: its long frequencies are not bound")
    check(name, "packed, on both sides", (1, 1, 2), keep_fp64=True)


def check(name: str, lengths: str, degrees: tuple[int, int, int], *, keep_fp64: bool) -> None:
    model = {**MODELS[name], "max_position_embeddings": BOUND}
    steps = [[make_rows(LENGTHS[lengths], masked="none", vocab_size=61, seed=seed)] for seed in range(2)]
    expected = (
        kept_in_fp64(train_plain, model, steps, torch.float64)
        if keep_fp64
        else train_plain(model, steps, torch.float64)
    )
    options = {"checkpoint_every": int(not keep_fp64), "attention": "blockwise"}
    call = (kept_in_fp64, train_sharded) if keep_fp64 else (train_sharded,)
    ranks = degrees[0] * degrees[1] * degrees[2]
    found = run_on_ranks(ranks, *call, degrees, model, steps, torch.float64, **options)[0]
    worst = largest_difference(found, expected)
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_lengths_matter(name: str) -> None:
    """Frequencies of the wrong length are seen in the loss."""
    steps = [[make_rows([(24,)], masked="none", vocab_size=61, seed=0)]]
    table = {**MODELS[name], "max_position_embeddings": BOUND}
    long = train_plain(table, steps, torch.float64)
    short = {
        "dynamic": {"max_position_embeddings": 64},
        "longrope": {"rope_parameters": {**LONG, "long_factor": [1.0] * 4}},
    }
    worst = largest_difference(train_plain({**table, **short[name]}, steps, torch.float64), long)
    assert worst["loss"] > 1e-4


def test_inside_the_layers_it_is_refused() -> None:
    model = hf.build_on_meta(hf.load_model_config("", MODELS["dynamic"]), torch.float32)
    model.model.layers[0].rotary = model.model.rotary_emb
    with pytest.raises(UserError, match='has RoPE of type "dynamic" inside its layers'):
        use_document_lengths(model, model.model.layers)
