"""RoPE that depends on a sequence's length: each document of a packed batch by its own, against
each one alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from helpers.models import LLAMA, STARCODER2
from helpers.precision import kept_in_fp64
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from helpers.training import largest_difference, train_plain, train_sharded
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.model.rope import use_document_lengths
from titan_ulysses.model.rope_scaling import scale_rope

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
GEMMA3 = {
    **LLAMA,
    "model_type": "gemma3_text",
    "layer_types": ["sliding_attention", "full_attention"],
}
GEMMA3 |= {
    "sliding_window": 5,
    "query_pre_attn_scalar": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PHI3 = {**LLAMA, "model_type": "phi3", "pad_token_id": 0, "original_max_position_embeddings": BOUND}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 2.5, "beta_fast": 4.0, "beta_slow": 0.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 2.5,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "linear": {**STARCODER2, "rope_parameters": LINEAR},
    "yarn": {**STARCODER2, "rope_parameters": {**YARN, "original_max_position_embeddings": BOUND}},
    "llama3": {
        **STARCODER2,
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": BOUND},
    },
    "dynamic": {**STARCODER2, "rope_parameters": DYNAMIC},
    "longrope": {**STARCODER2, "rope_parameters": LONG},
    "phi3, longrope": {**PHI3, "rope_parameters": LONG},
    "gemma3, by layer": {
        **GEMMA3,
        "rope_parameters": {"sliding_attention": PLAIN, "full_attention": DYNAMIC},
    },
    "gemma3, both": {
        **GEMMA3,
        "rope_parameters": {"sliding_attention": LONG, "full_attention": DYNAMIC},
    },
}
# Plain "dynamic" remembers how long a sequence was until a short one comes: each long document
# follows a short one.
LENGTHS = {
    "whole, long": [(24,), (24,)],
    "packed, on both sides": [(10, 13, 1), (6, 6, 12)],
    "packed, short": [(10, 11, 3), (8, 8, 8)],
}


@pytest.mark.parametrize(
    "degrees", [(1, 1, 1), (1, 1, 2), pytest.param((1, 2, 2), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_parity(name: str, lengths: str, degrees: tuple[int, int, int]) -> None:
    check(name, lengths, degrees, keep_fp64=False)


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3"])
def test_parity_of_types_that_do_not_look_at_lengths(name: str) -> None:
    check(name, "packed, on both sides", (1, 1, 2), keep_fp64=False)


@pytest.mark.parametrize("name", ["phi3, longrope", "gemma3, by layer", "gemma3, both"])
def test_parity_of_other_families(name: str) -> None:
    if name == "gemma3, both" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip(
            "transformers 5.17 cannot do longrope by kinds of layers: its long frequencies are not "
            "bound"
        )
    check(name, "packed, on both sides", (1, 1, 2), keep_fp64=True)


def check(name: str, lengths: str, degrees: tuple[int, int, int], *, keep_fp64: bool) -> None:
    model = {**MODELS[name], "max_position_embeddings": BOUND}
    steps = [
        [make_rows(LENGTHS[lengths], masked="none", vocab_size=61, seed=seed)] for seed in range(2)
    ]
    expected = (
        kept_in_fp64(train_plain, model, steps, torch.float64)
        if keep_fp64
        else train_plain(model, steps, torch.float64)
    )
    options = {"checkpoint_every": int(not keep_fp64), "attention": "sdpa"}
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


# --- [model.rope_scaling] -------------------------------------------------------------------------

SHORT = {**STARCODER2, "max_position_embeddings": BOUND, "rope_parameters": PLAIN}
PHI3_SHORT = {**PHI3, "max_position_embeddings": BOUND, "rope_parameters": PLAIN}
GEMMA3_SHORT = {**GEMMA3, "max_position_embeddings": BOUND}
GEMMA3_SHORT["rope_parameters"] = {
    "sliding_attention": PLAIN,
    "full_attention": {**PLAIN, "rope_theta": 1000.0},
}
ORIGINAL = {"original_max_position_embeddings": BOUND}
# A model, the table of its run, and what transformers is given for the same.
SCALED: dict[str, tuple[dict, dict, dict, int]] = {
    "linear": (SHORT, {"type": "linear", "factor": 2.5}, LINEAR, 27),
    "dynamic": (SHORT, {"rope_type": "dynamic", "factor": 3.0}, DYNAMIC, BOUND),
    "yarn": (
        SHORT,
        {key: YARN[key] for key in ("rope_type", "factor", "beta_fast", "beta_slow")},
        YARN | ORIGINAL,
        27,
    ),
    "longrope": (SHORT, {key: LONG[key] for key in LONG if "original" not in key}, LONG, 44),
    "longrope, phi3": (
        PHI3_SHORT,
        {key: LONG[key] for key in LONG if "original" not in key},
        LONG,
        44,
    ),
    "llama3, of less": (SHORT, LLAMA3 | {"original_max_position_embeddings": 8}, None, 20),
    "again": (
        SHORT | {"rope_parameters": YARN | {"original_max_position_embeddings": 5}},
        LLAMA3,
        None,
        12,
    ),
    "another theta": (SHORT, LINEAR | {"rope_theta": 7.0}, LINEAR | {"rope_theta": 7.0}, 27),
    "gemma3": (
        GEMMA3_SHORT,
        {"rope_type": "linear", "factor": 2.5},
        {"sliding_attention": PLAIN, "full_attention": LINEAR | {"rope_theta": 1000.0}},
        27,
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_scaled_config_is_that_of_transformers(name: str) -> None:
    """The same config as one that is written out: what it trains like, `test_parity` says."""
    model, table, parameters, length = SCALED[name]
    config = hf.load_model_config("", model)
    before = dict(table)
    scale_rope(config, table)
    assert table == before and config.max_position_embeddings == length
    # The original length is the one that the table, or the model's own RoPE, names.
    if parameters is None:
        parameters = LLAMA3 | {
            "original_max_position_embeddings": {"llama3, of less": 8, "again": 5}[name]
        }
    expected = hf.load_model_config(
        "", model | {"rope_parameters": parameters, "max_position_embeddings": length}
    )
    assert config.to_dict() == expected.to_dict()
    assert (
        hf.build_on_meta(config, torch.float32).config.rope_parameters == expected.rope_parameters
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"factor": 2},
            "model.rope_scaling.rope_type = None: the types are linear, dynamic, yarn, longrope, "
            "llama3",
        ),
        (
            {"rope_type": "ntk", "factor": 2},
            'model.rope_scaling.rope_type = "ntk": the types are linear, dynamic, ',
        ),
        (
            {"rope_type": "linear", "factor": 2, "beta_fast": 3},
            'model.rope_scaling.beta_fast: "linear" has no such key, it has factor, rope_theta',
        ),
        ({"rope_type": "llama3", "factor": 2}, '"llama3" needs high_freq_factor, low_freq_factor'),
        (
            {"rope_type": "yarn", "factor": 0.5},
            "model.rope_scaling.factor = 0.5: needs a number from 1 to 1,000,000",
        ),
        (
            YARN | {"original_max_position_embeddings": 12},
            "model.rope_scaling.original_max_position_embeddings = 12: needs a number of tokens, "
            "at most the model's own max_position_embeddings = 11",
        ),
        (
            LONG | {"long_factor": [1.0]},
            "model.rope_scaling.long_factor = [1.0]: needs 4 numbers, one for each pair",
        ),
    ],
)
def test_tables_that_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        scale_rope(hf.load_model_config("", SHORT), table)
    assert message in str(caught.value)
