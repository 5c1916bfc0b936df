"""Copies of `memory.stream_offload` on a GPU, with a stand-in for it: parts come ahead, and nothing
is read before its copy has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.families import model_of
from helpers.meshes import ONE, SP2, SP4
from helpers.models import STARCODER2
from helpers.precision import kept_in_fp64
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from helpers.training import largest_difference, train_plain, train_sharded
from test_streaming import table_of
from titan_ulysses.memory.offload import CudaStore, buffer_maker
from titan_ulysses.memory.stream_offload import SequenceStore
from titan_ulysses.setup import parallelize
from titan_ulysses.ulysses import key_blocks, streamed

DOCUMENTS = [[11, 9, 4], [5, 19]]


class LateStream:
    """A stream whose work waits until something needs it."""

    def __init__(self) -> None:
        self.queue: deque[Callable[[], None]] = deque()
        self.issued, self.ended = 0, 0

    def add(self, work: Callable[[], None]) -> Callable[[], None]:
        """Queue some work; return what does all until its end."""
        self.queue.append(work)
        self.issued += 1
        return partial(self.run_until, self.issued)

    def wait_event(self, event: Callable[[], None]) -> None:
        self.add(event)

    def wait_stream(self, compute: Any) -> None:
        """What computes here is never late."""

    def run_until(self, number: int) -> None:
        while self.ended < number:
            self.queue.popleft()()
            self.ended += 1


class LateCopies(CudaStore):
    """Each copy is made as late as it may be: when the device waits for its event, on a stream of
    each direction.

    Until then the target on the device is full of NaN.
    """

    def __init__(self, make_buffer) -> None:
        self.reads, self.ahead = 0, 0
        compute = SimpleNamespace(wait_event=lambda event: event())
        cuda = SimpleNamespace(Stream=LateStream, current_stream=lambda: compute)
        super().__init__(make_buffer, cuda=cuda)

    def _copy(self, target: Tensor, source: Tensor, stream: LateStream) -> Callable[[], None]:
        # Autograd sees this copy when it is issued.
        return stream.add(lambda: target.data.copy_(source.data))

    def _fetch(self, kept: Any) -> None:
        super()._fetch(kept)
        if kept.dtype.is_floating_point:
            kept.fetched[0].fill_(torch.nan)

    def get(self, kept: Any) -> Tensor:
        self.reads += 1
        self.ahead += kept.fetched is not None
        return super().get(kept)


def late_store() -> SequenceStore:
    make_buffer = buffer_maker("host", None)
    return SequenceStore(make_buffer, torch.device("cpu"), LateCopies(make_buffer))


def train_with_late_copies(*args: Any, **options: Any):
    """Keys too leave the device, however few a chunk reads."""
    stores = []
    streamed.RESIDENT_CHUNKS, key_blocks.BLOCK_TOKENS = 0, 8  # two chunks in a block

    def open_late(offload: str, folder: str | None, device: torch.device) -> SequenceStore:
        stores.append(late_store())
        return stores[-1]

    parallelize.open_sequence_store = open_late  # this rank's process ends with the test
    record = train_sharded(*args, stream_offload="host", **options)
    copies = stores[0]._copies
    record.ahead = copies.ahead / copies.reads
    return record


def check(degrees, table: dict[str, Any], documents: list[list[int]]) -> float:
    """Compare training with plain training; return the share of parts that came ahead."""
    steps = [[make_rows(documents, masked="none", vocab_size=61, seed=step)] for step in range(2)]
    options = {"stream_chunk_tokens": 4, "checkpoint_every": 2, "mlp_tile_tokens": 3}
    found = run_on_ranks(
        prod(degrees),
        kept_in_fp64,
        train_with_late_copies,
        degrees,
        table,
        steps,
        torch.float64,
        **options,
    )[0]
    plain = kept_in_fp64(train_plain, table, steps, torch.float64)
    worst = largest_difference(found, plain)
    assert max(worst.values()) < 1e-12, worst
    return found.ahead


@pytest.mark.parametrize("degrees", [ONE, SP2], ids=["one", "sp2"])
@pytest.mark.parametrize("rows", [1, 2])
def test_training_with_copies_that_come_late(degrees, rows: int) -> None:
    ahead = check(degrees, STARCODER2, DOCUMENTS[:rows])
    # The first part of a sweep does not come ahead, nor do those of several rows.
    assert (ahead > 0.4) == (rows == 1), ahead


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "mistral"])
def test_windows_sinks_and_caps_by_blocks_of_keys(family: str) -> None:
    check(SP2, model_of(family), [[24]])


@pytest.mark.parametrize(
    ("heads", "degrees"), [((9, 3), SP2), ((5, 1), SP4)], ids=["9 of 3", "5 of 1"]
)
def test_any_head_count_by_blocks_of_keys(heads: tuple[int, int], degrees) -> None:
    check(degrees, table_of(heads), [[13, 11]])


def test_a_part_that_was_not_asked_for_is_not_mistaken_for_another() -> None:
    store = late_store()
    whole = store.empty(torch.Size((1, 6, 2)), torch.float32)
    values = torch.arange(12.0).view(1, 6, 2)
    for start in (0, 2, 4):
        store.write(whole[:, start : start + 2], values[:, start : start + 2])
    assert torch.equal(store.read(whole[:, :2], ahead=whole[:, 2:4]), values[:, :2])
    assert torch.equal(store.read(whole[:, 4:]), values[:, 4:])
    assert torch.equal(store.read(whole[:, 2:4]), values[:, 2:4])
