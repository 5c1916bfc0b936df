"""`memory.stream_offload` on a GPU, with a stand-in for it: parts come ahead, nothing is read
before its copy has ended, no gradient comes too late, and random numbers are those of the GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.families import FAMILIES, model_of
from helpers.meshes import ONE, SP2, SP4
from helpers.models import STARCODER2
from helpers.precision import kept_in_fp64
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from helpers.training import largest_difference, train_plain, train_sharded
from test_streaming import table_of
from titan_ulysses.memory import loss_head, replay
from titan_ulysses.memory.offload import CudaStore, OffDevice, host_buffer
from titan_ulysses.memory.sequences import SequenceStore
from titan_ulysses.model import hf
from titan_ulysses.model.families import CHECKED_FAMILIES, computes_with_embeddings
from titan_ulysses.setup import parallelize
from titan_ulysses.setup.blocks import find_blocks
from titan_ulysses.streaming import block, chunks, embeddings, keys

DOCUMENTS = [[11, 9, 4], [5, 19]]
GPU = torch.device("cpu", 0)
"""Stands for the GPU; hidden states are on `torch.device("cpu")`, which is not equal to it."""


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
        streams: list[LateStream] = []

        def make_stream() -> LateStream:
            streams.append(LateStream())
            return streams[-1]

        def synchronize() -> None:
            for stream in streams:
                stream.run_until(stream.issued)

        cuda = SimpleNamespace(
            Stream=make_stream, current_stream=lambda: compute, synchronize=synchronize
        )
        super().__init__(make_buffer, cuda)

    def _copy(self, target: Tensor, source: Tensor, stream: LateStream) -> Callable[[], None]:
        # Autograd sees this copy when it is issued.
        return stream.add(lambda: target.data.copy_(source.data))

    def _fetch(self, kept: Any) -> None:
        super()._fetch(kept)
        if kept.tensor.dtype.is_floating_point:
            kept.fetched[0].fill_(torch.nan)

    def get(self, kept: Any) -> Tensor:
        self.reads += 1
        self.ahead += kept.fetched is not None
        return super().get(kept)


def late_store() -> SequenceStore:
    return SequenceStore(LateCopies(partial(host_buffer, setting="")), GPU)


def lose_late_gradients(patch: pytest.MonkeyPatch, function: Any) -> None:
    """Lose what the backward of an autograd function returns for parameters.

    It is what FSDP may do on a GPU. A node runs in the thread of the device of its outputs, or else
    in the caller's (`Node::device` in torch/csrc/autograd/function.h); with hidden states on the
    host, FSDP's post-backward is one of the latter, and `AccumulateGrad` of the parameters none.
    """
    forward, backward = function.forward, function.backward

    def remember(ctx: Any, *inputs: Any) -> Any:
        tensors = [(i, x) for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.late = [i for i, x in tensors if x.is_leaf and x.requires_grad]
        return forward(ctx, *inputs)

    def lose(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = backward(ctx, *upstream)
        return tuple(None if i in ctx.late else x for i, x in enumerate(gradients))

    patch.setattr(function, "forward", staticmethod(remember))
    patch.setattr(function, "backward", staticmethod(lose))


def give_the_gpu_its_random_numbers(patch: pytest.MonkeyPatch) -> None:
    """Let blocks draw from the GPU's generator alone: that of the host knows nothing of it."""

    def rng_state(device: torch.device) -> Tensor:
        return replay.rng_state(device) if device == GPU else torch.zeros(1)

    def replayed(device: torch.device, state: Tensor) -> AbstractContextManager[None]:
        return replay.replayed(device, state) if device == GPU else nullcontext()

    patch.setattr(block, "rng_state", rng_state)
    patch.setattr(block, "replayed", replayed)


def train_with_late_copies(*args: Any, **options: Any):
    """Keys too leave the device, however few a chunk reads."""
    stores = []

    def open_late(offload: str, folder: str | None, device: torch.device) -> SequenceStore:
        stores.append(late_store())
        return stores[-1]

    with pytest.MonkeyPatch.context() as patch:
        for function in (
            block._StreamedFunction,
            embeddings._EmbeddingFunction,
            loss_head._TiledCrossEntropy,
        ):
            lose_late_gradients(patch, function)
        give_the_gpu_its_random_numbers(patch)
        patch.setattr(chunks, "RESIDENT_CHUNKS", 0)
        patch.setattr(keys, "BLOCK_TOKENS", 8)  # two chunks in a block
        patch.setattr(parallelize, "wrap", partial(parallelize.wrap, open_sequences=open_late))
        record = train_sharded(*args, stream_offload="host", **options)
    copies = stores[0]._copies
    record.ahead = copies.ahead / copies.reads
    return record


def steps_of(documents: list[list[int]], number: int) -> list[Any]:
    """Return the steps of a training, each of one batch."""
    rows = [make_rows(documents, masked="none", vocab_size=61, seed=step) for step in range(number)]
    return [[batch] for batch in rows]


def check(degrees, table: dict[str, Any], documents: list[list[int]]) -> float:
    """Compare training with plain training; return the share of parts that came ahead."""
    steps = steps_of(documents, 2)
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


class DecoderOps(TorchDispatchMode):
    """What a decoder computes with the results of its parts, outside of them."""

    def __init__(self, decoder: nn.Module, blocks: nn.ModuleList):
        super().__init__()
        self.inside, self.results, self.found = 0, [], set()
        for part in {*decoder.children(), *blocks} - {blocks}:
            part.register_forward_pre_hook(self.enter)
            part.register_forward_hook(self.leave)

    def enter(self, *_: Any) -> None:
        self.inside += 1

    def leave(self, part: nn.Module, _: Any, output: Any) -> None:
        self.inside -= 1
        self.results += [x for x in tree_leaves(output) if isinstance(x, Tensor)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside:
            known = {x.untyped_storage()._cdata for x in self.results}
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if any(x.untyped_storage()._cdata in known for x in given):
                self.found.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() & CHECKED_FAMILIES))
def test_the_host_waits_for_decoders_that_compute_with_what_their_parts_return(family) -> None:
    model = hf.build_on_meta(hf.load_model_config("", model_of(family)), torch.float32)
    decoder, blocks = find_blocks(model.to_empty(device="cpu"))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad(), DecoderOps(decoder, blocks) as ops:
        decoder(input_ids=ids, position_ids=torch.arange(4)[None], use_cache=False)
    assert bool(ops.found) == computes_with_embeddings(model.config), ops.found


def test_a_decoder_that_computes_with_what_is_off_the_device() -> None:
    """granite scales the embeddings of the whole sequence."""
    check(ONE, model_of("granite"), [[24]])


def test_dropout_is_replayed_from_the_generator_of_the_device() -> None:
    table = STARCODER2 | {"residual_dropout": 0.3}
    options = {"stream_chunk_tokens": 4, "mlp_tile_tokens": -1}
    inputs = ONE, table, steps_of(DOCUMENTS[:1], 2), torch.float64
    ways = (train_sharded, train_with_late_copies)
    streamed_, offloaded = (run_on_ranks(1, seeded, way, *inputs, **options)[0] for way in ways)
    worst = largest_difference(offloaded, streamed_)
    assert max(worst.values()) < 1e-12, worst


def seeded(train: Any, *args: Any, **options: Any) -> Any:
    torch.manual_seed(5)
    return train(*args, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["host", "disk"])
@pytest.mark.parametrize("family", ["starcoder2", "granite"])
def test_cuda_loses_no_gradient_and_replays_dropout(family: str, offload: str) -> None:
    """As with the hidden states on the device, in each of some steps."""
    table = model_of("granite") if family == "granite" else STARCODER2 | {"residual_dropout": 0.3}
    inputs = ONE, table, steps_of(DOCUMENTS[:1], 8), torch.float64
    options = {"stream_chunk_tokens": 4, "checkpoint_every": 2}
    found = [
        seeded(train_sharded, *inputs, **options, stream_offload=where)
        for where in ("none", offload)
    ]
    worst = largest_difference(*found)
    assert max(worst.values()) < 1e-12, worst


def test_a_part_that_was_not_asked_for_is_not_mistaken_for_another() -> None:
    store = late_store()
    whole = store.empty(torch.empty(1, 6, 2))
    values = torch.arange(12.0).view(1, 6, 2)
    for start in (0, 2, 4):
        store.write(whole, slice(start, start + 2), values[:, start : start + 2])
    assert torch.equal(store.read(whole, slice(0, 2), slice(2, 4)), values[:, :2])
    assert torch.equal(store.read(whole, slice(4, 6)), values[:, 4:])
    assert torch.equal(store.read(whole, slice(2, 4)), values[:, 2:4])


def test_a_thread_may_write_to_what_autograd_has_saved() -> None:
    """The thread of a `DiskStore` does, when the hidden states are saved for backward already."""
    whole, weight = late_store().empty(torch.empty(1, 4, 2).double()), torch.ones(2)
    product = whole * weight.double().requires_grad_()
    OffDevice(whole[:, 2:], GPU).buffer.copy_(torch.ones(4).double().view(torch.uint8))
    product.sum().backward()
    assert torch.equal(whole[:, 2:], torch.ones(1, 2, 2).double())
