"""Bytes of the exchange: closed form (scripts/bench/scaling.py), plan, counters. And
Megatron-style parallelism, that scripts/bench/versus_megatron.py compares with Ulysses.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.distributed.tensor.parallel import loss_parallel

from helpers.models import LLAMA
from helpers.precision import kept_in_fp64
from helpers.ranks import run_on_ranks
from helpers.rows import Row, make_rows
from helpers.training import Record, largest_difference, train_plain, train_sharded
from titan_ulysses.ulysses.cores import sdpa

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}
TOKENS = 512


def bench(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts" / "bench"))
    try:
        return __import__(name)
    finally:
        sys.path.pop(0)


def case_of(ranks: int):
    whole = "memory.stream_chunk_tokens=-1"
    return bench("plan_accuracy").case(f"P {ranks}", ranks, ranks * TOKENS, whole, MODEL)


def counted(ranks: int) -> dict:
    return dict(bench("plan_accuracy").train(case_of(ranks), steps=1))


def closed_form(ranks: int) -> int:
    spec = bench("plan_accuracy").spec_of(case_of(ranks))
    return bench("scaling").exchanged_bytes(
        spec.model_config, degree=ranks, tokens=TOKENS, itemsize=4
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_real_ranks_hand_in_what_the_closed_form_says(ranks):
    found = run_on_ranks(ranks, counted, ranks)[0]
    assert found["all_to_all"][1] == closed_form(ranks)


@pytest.mark.parametrize("ranks", [2, pytest.param(32, marks=pytest.mark.slow), 1024])
def test_the_plan_hands_in_what_the_closed_form_says(ranks):
    """Also beyond the KV heads, and with more ranks than heads."""
    planned = bench("plan_accuracy").planned(case_of(ranks))
    assert planned["collectives"]["all_to_all"][1] == closed_form(ranks)


def test_bytes_do_not_grow_while_every_kv_head_has_its_rank():
    """The theorem of DeepSpeed-Ulysses: S and P together."""
    assert closed_form(2) == closed_form(4) < closed_form(8)


# --- against Megatron -----------------------------------------------------------------------------

SMALL = LLAMA | {"vocab_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}


def packed_steps() -> list[list[list[Row]]]:
    """Two steps of two micro-batches of two packed rows, with masked labels."""
    rows = [(10, 14), (1, 1, 21, 1)]
    return [
        [make_rows(rows, masked="uneven", vocab_size=64, seed=2 * step + micro) for micro in (0, 1)]
        for step in (0, 1)
    ]


def train_megatron(degree: int, tile: int) -> Record:
    with loss_parallel():
        return kept_in_fp64(
            train_sharded,
            (1, 1, degree),
            SMALL,
            packed_steps(),
            torch.float64,
            parallelize=bench("megatron").tensor_parallelize,
            attention=sdpa,
            loss_tile_tokens=tile,
        )


@pytest.mark.parametrize(("degree", "tile"), [(2, 7), pytest.param(4, -1, marks=pytest.mark.slow)])
def test_megatron_trains_what_one_process_trains(degree, tile):
    """Else there would be nothing to compare with: losses, norms, every gradient and parameter."""
    found = run_on_ranks(degree, train_megatron, degree, tile)[0]
    worst = largest_difference(
        found, kept_in_fp64(train_plain, SMALL, packed_steps(), torch.float64)
    )
    assert max(worst.values()) < 1e-12, worst


SENT_TOKENS = 512


def contend(ranks: int) -> list[dict]:
    return bench("versus_megatron").contend(ranks, [SENT_TOKENS], 0)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_both_send_what_is_planned(ranks):
    """And train the same. Megatron's bytes are those of its closed form, too."""
    versus = bench("versus_megatron")
    of, spec = run_on_ranks(ranks, contend, ranks)[0][0], versus.spec_of(ranks, SENT_TOKENS)
    assert of["ulysses"]["step"] == pytest.approx(of["megatron"]["step"], rel=versus.TOLERANCE)
    for name, one in of.items():
        planned = versus.planned(name, spec)
        assert {k: v[1] for k, v in planned.items()} == {k: v[1] for k, v in one["counts"].items()}
    sent = sum(versus.sent(of["megatron"]["counts"], ranks).values())
    closed = versus.megatron_bytes(spec.model_config, degree=ranks, tokens=SENT_TOKENS, itemsize=4)
    assert closed == pytest.approx(sent, rel=0.01)


def test_megatron_refuses_what_it_cannot_cut():
    from titan_ulysses.distributed.errors import UserError

    versus = bench("versus_megatron")
    with pytest.raises(UserError, match="8 ranks do not divide 4 KV heads"):
        versus.planned("megatron", versus.spec_of(8, 1024))
