"""Streaming: blocks that work through the sequence chunk by chunk train as one plain process does,
on every mesh, whatever the chunks, the documents, the family and the other settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import cycle, product
from math import prod
from typing import Any

import pytest
import torch

from helpers.families import FAMILIES, model_of
from helpers.meshes import DP2_SP2, ONE, SP2, SP4
from helpers.models import STARCODER2
from helpers.precision import kept_in_fp64
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from helpers.training import Record, largest_difference, train_plain, train_sharded

SP3 = (1, 1, 3)
MESHES = {"one": ONE, "sp2": SP2, "sp3": SP3, "sp4": SP4, "dp2 x sp2": DP2_SP2}
# Two rows of 24 tokens for each of two data-parallel ranks. Chunks of 12 are exactly one document
# or two of them, with borders on theirs; others hold the end of one document, whole ones, and the
# beginning of the next.
PACKED = [(24,), (10, 13, 1), (6, 6, 12), (1, 1, 21, 1)]
DOCUMENTS = {"packed": PACKED, "whole": [(24,)] * 4, "exact": [(12, 12)] * 4}
# The last chunk of 20 is smaller; 5 and 7 are rounded up to a multiple of P.
CHUNKS = (12, 20, 5, 7)
STEPS = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steps_of(documents: str, micro_batches: int = 1):
    return [
        [
            make_rows(DOCUMENTS[documents], masked="uneven", vocab_size=61, seed=10 * step + micro)
            for micro in range(micro_batches)
        ]
        for step in range(STEPS)
    ]


def table_of(model: str | tuple) -> dict[str, Any]:
    """A family's name, or the heads of a starcoder2: (query heads, KV heads)."""
    if isinstance(model, str):
        return STARCODER2 if model == "starcoder2" else model_of(model)
    queries, keys = model
    return STARCODER2 | {
        "hidden_size": 8 * queries,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
    }


@lru_cache
def plain(model: str | tuple, documents: str, micro_batches: int = 1) -> Record:
    steps = steps_of(documents, micro_batches)
    return kept_in_fp64(train_plain, table_of(model), steps, torch.float64)


def check(
    model: str | tuple, degrees, documents: str, chunk: int, micro_batches: int = 1, **options
) -> None:
    """Streamed training equals plain training: losses, gradients, norms, parameters."""
    found = run_on_ranks(
        prod(degrees),
        kept_in_fp64,
        train_sharded,
        degrees,
        table_of(model),
        steps_of(documents, micro_batches),
        torch.float64,
        stream_chunk_tokens=chunk,
        **options,
    )[0]
    worst = largest_difference(found, plain(model, documents, micro_batches))
    bound = 5e-12 if model == "gemma4_text" else 1e-12
    assert max(worst.values()) < bound, {k: v for k, v in worst.items() if v >= bound}


# --- chunks, documents, meshes --------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("mesh", MESHES)
def test_equals_one_plain_process(mesh: str, documents: str, chunk: int) -> None:
    check("starcoder2", MESHES[mesh], documents, chunk)


HEADS = [(9, 3), (5, 1), (14, 2), (2, 2), (3, 1)]


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]} of {heads[1]}")
def test_any_head_count(heads: tuple[int, int]) -> None:
    check(heads, SP4, "packed", 8)


# --- families -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, mesh: str) -> None:
    check(family, MESHES[mesh], "packed", 9, checkpoint_every=2)
