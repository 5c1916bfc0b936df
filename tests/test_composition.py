"""FSDP2 + SP composition: on every mesh the loss, every gradient, the gradient norm and the
parameters after three optimizer steps equal one process of unmodified transformers, to 1e-12 in
fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import pytest
import torch

from helpers.models import LLAMA, STARCODER2
from helpers.ranks import run_on_ranks
from helpers.rows import Row, make_rows
from helpers.training import Record, largest_difference, train_plain, train_sharded

STEPS = 3
FAMILIES = {"starcoder2": STARCODER2, "llama": LLAMA}
MESHES = {  # dp_replicate, dp_shard, sp
    "one": (1, 1, 1),
    "sp2": (1, 1, 2),
    "dp2": (1, 2, 1),
    "rep2": (2, 1, 1),
    "sp4": (1, 1, 4),
    "dp2 x sp2": (1, 2, 2),
    "rep2 x sp2": (2, 1, 2),
    "rep2 x dp2": (2, 2, 1),
}
# Eight rows of 24 tokens, so that every mesh has two rows a rank or more, with different documents
# in each: borders inside a rank's slice, exactly at a rank's border (6, 12, 18), one-token
# documents, and one document as long as S.
PACKED = [(24,), (10, 14), (6, 6, 12), (1, 1, 21, 1), (12, 12), (5, 19), (7, 1, 16), (3, 20, 1)]
WHOLE = [(24,)] * 8


def steps_of(lengths: str, masked: str, accumulation: int) -> list[list[list[Row]]]:
    rows = PACKED if lengths == "packed" else WHOLE
    return [
        [
            make_rows(rows, masked=masked, vocab_size=61, seed=10 * step + micro)
            for micro in range(accumulation)
        ]
        for step in range(STEPS)
    ]


@lru_cache
def plain(family: str, tied: bool, lengths: str, masked: str, accumulation: int) -> Record:
    model = FAMILIES[family] | {"tie_word_embeddings": tied}
    return train_plain(model, steps_of(lengths, masked, accumulation), torch.float64)


def compare(
    family: str, degrees, tied: bool, lengths: str, masked: str, accumulation: int
) -> dict[str, float]:
    world_size = degrees[0] * degrees[1] * degrees[2]
    model = FAMILIES[family] | {"tie_word_embeddings": tied}
    steps = steps_of(lengths, masked, accumulation)
    found = run_on_ranks(world_size, train_sharded, degrees, model, steps, torch.float64)
    assert all(
        r.losses == found[0].losses and r.grad_norms == found[0].grad_norms for r in found
    ), "ranks disagree"
    return largest_difference(found[0], plain(family, tied, lengths, masked, accumulation))


def _cases() -> Iterator:
    """Every combination of the four settings on every mesh.

    Those that are not slow have each combination of any two settings on one and two ranks. On four
    ranks they are what is hardest, with tied weights and without.
    """
    for (mesh, degrees), choices in product(MESHES.items(), product((False, True), repeat=4)):
        tied, packed, uneven, accumulated = choices
        hardest = (False, True, True, True), (True, True, True, False)
        in_ci = sum(choices) in (0, 3) if math.prod(degrees) < 4 else choices in hardest
        values = (
            tied,
            "packed" if packed else "whole",
            "uneven" if uneven else "none",
            2 if accumulated else 1,
        )
        names = (
            "tied" if tied else "untied",
            values[1],
            f"{values[2]} masked",
            f"{values[3]} accumulated",
        )
        yield pytest.param(
            degrees,
            *values,
            id=f"{mesh}-{', '.join(names)}",
            marks=[] if in_ci else [pytest.mark.slow],
        )


@pytest.mark.parametrize(("degrees", "tied", "lengths", "masked", "accumulation"), list(_cases()))
def test_equals_one_plain_process(degrees, tied, lengths, masked, accumulation):
    worst = compare("starcoder2", degrees, tied, lengths, masked, accumulation)
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}


LLAMA_IN_CI = ("sp2", "dp2 x sp2", "rep2 x dp2")


@pytest.mark.parametrize(
    "tied", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"]
)
@pytest.mark.parametrize(
    "degrees",
    [
        # The others are above, without steps in fp32.
        pytest.param(degrees, id=name, marks=[] if name in LLAMA_IN_CI else [pytest.mark.slow])
        for name, degrees in MESHES.items()
    ],
)
def test_llama_equals_one_plain_process(degrees, tied):
    """To 1e-6: llama's own norms compute in fp32, so a last bit of fp64 can become a last bit of
    fp32.
    """
    worst = compare("llama", degrees, tied, "packed", "uneven", 2)
    assert max(worst.values()) < 1e-6, {k: v for k, v in worst.items() if v >= 1e-6}


@pytest.mark.parametrize(
    "checkpoint",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["kept", "recomputed"],
)
@pytest.mark.parametrize("degrees", [MESHES["sp4"], MESHES["dp2 x sp2"]], ids=["sp4", "dp2 x sp2"])
def test_fp32_and_activation_checkpointing(degrees, checkpoint):
    steps = steps_of("packed", "uneven", 2)
    found = run_on_ranks(
        4, train_sharded, degrees, LLAMA, steps, torch.float32, checkpoint_every=int(checkpoint)
    )[0]
    worst = largest_difference(found, train_plain(LLAMA, steps, torch.float32))
    # AdamW divides by the root of its second moment: small gradients weigh.
    assert max(worst.values()) < 2e-4, worst
    # A few units in the last place of fp32 sums.
    assert max(worst["loss"], worst["grad norm"]) < 3e-6, worst


HEADS = [
    (9, 3),
    (5, 1),
    (2, 2),
    # In test_ulysses.py they are exchanged and attended with.
    *(pytest.param(heads, marks=pytest.mark.slow) for heads in [(14, 2), (8, 8), (8, 1), (3, 1)]),
]


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]} of {heads[1]}")
def test_any_head_count(heads):
    """P need not divide the heads, nor the key-value heads; with fewer heads than ranks some ranks
    are idle.
    """
    heads = {
        "hidden_size": 8 * heads[0],
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
    }
    steps = steps_of("packed", "uneven", 1)
    found = run_on_ranks(4, train_sharded, MESHES["sp4"], STARCODER2 | heads, steps, torch.float64)[
        0
    ]
    worst = largest_difference(found, train_plain(STARCODER2 | heads, steps, torch.float64))
    assert max(worst.values()) < 1e-12, worst
