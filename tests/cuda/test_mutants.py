"""A test of the tests: mutants of the package that a CPU runs without harm and a GPU does not.

Each is put into the ranks that train, and must be found by what the device says of that training;
without it, the same training shows nothing. One kind each is named here; there may be others.

    numbers   they are not those of the package without the mutant
    race      two streams use the same bytes, in no order
    refused   an error, as of real CUDA
    context   on the device of another rank
    wait      the host waits for the device where it did not
"""

from __future__ import annotations

import mmap
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.device import Seen, on_device, what_is_wrong
from helpers.families import model_of
from helpers.meshes import ONE, SP2, mesh_of
from helpers.models import STARCODER2
from helpers.ranks import close_pools, run_on_ranks
from helpers.rows import local_batch, make_rows
from helpers.training import Record, train_sharded
from titan_ulysses.data.loader import Batch
from titan_ulysses.memory import checkpointing, offload, replay, sequences
from titan_ulysses.memory.offload import CudaStore, DiskStore, OffloadedTensor
from titan_ulysses.memory.sequences import Sequences, SequenceStore
from titan_ulysses.streaming import block, embeddings
from titan_ulysses.train import step
from titan_ulysses.ulysses import exchange, flash_cuda

pytestmark = pytest.mark.cuda(only=True)
Patch = pytest.MonkeyPatch

# --- what is trained ------------------------------------------------------------------------------

MODEL = STARCODER2 | {"num_hidden_layers": 3}
GRANITE = model_of("granite")  # its decoder computes with the embeddings
DROPOUT = MODEL | {"residual_dropout": 0.3}
WINDOWS = MODEL | {"sliding_window": 12}
PACKED = (13, 7, 12)
# Documents that begin a few keys before a chunk with many more queries.
LONG_WINDOWED = (11, 53)


@lru_cache
def steps_of(documents: tuple[int, ...]) -> list[list[Any]]:
    """Two steps of two micro-batches."""
    return [
        [make_rows([documents], masked="none", vocab_size=61, seed=10 * s + m) for m in range(2)]
        for s in range(2)
    ]


def train(mutant: str | None, *args: Any, around: Any = None, **options: Any) -> Record:
    with Patch.context() as patch:
        if around is not None:
            around(patch)
        if mutant is not None:
            MUTANTS[mutant][0](patch)
        return train_sharded(*args, **options)


def forward_in_bf16(patch: Patch) -> None:
    """By autocast, which ends before backward."""
    autocast = torch.autocast("cuda", torch.bfloat16)
    patch.setattr(step.CrossEntropy, "forward", autocast(step.CrossEntropy.forward))


def slow_disk(patch: Patch) -> None:
    to_file = offload._to_file

    def later(*args: Any) -> None:
        time.sleep(0.005)
        to_file(*args)

    patch.setattr(offload, "_to_file", later)


def carry(mutant: str | None, degrees: Any, *_: Any, **options: Any) -> Record:
    """No training: a batch goes to the device and comes back."""
    mesh = mesh_of(*degrees)
    with Patch.context() as patch:
        if mutant is not None:
            MUTANTS[mutant][0](patch)
        batch = local_batch(steps_of(PACKED)[0][0], mesh).to(mesh.device)
        batch = replace(batch, input_ids=batch.input_ids + 0)  # a kernel that has not run yet
        return Record(losses=batch.to("cpu").input_ids[0].tolist(), grad_norms=[1.0])


@dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    options: tuple[tuple[str, Any], ...] = ()
    table: str = "MODEL"
    documents: tuple[int, ...] = PACKED
    dtype: torch.dtype = torch.float64
    degrees: tuple[int, int, int] = ONE
    copies: tuple[str, int] = ("late", 0)
    run: Callable[..., Record] = train

    def __call__(self, mutant: str | None) -> list[Seen]:
        return run_on_ranks(
            prod(self.degrees),
            on_device,
            *self.copies,
            self.run,
            mutant,
            self.degrees,
            globals()[self.table],
            steps_of(self.documents),
            self.dtype,
            **dict(self.options),
        )


def setting(*options: dict[str, Any], **more: Any) -> Setting:
    return Setting(tuple(sorted({k: v for o in options for k, v in o.items()}.items())), **more)


STREAM = {"stream_chunk_tokens": 8}
HOST, DISK = {"offload": "host"}, {"offload": "disk"}
OFF_HOST, OFF_DISK = STREAM | {"stream_offload": "host"}, STREAM | {"stream_offload": "disk"}
LONG = {"dtype": torch.float32, "table": "WINDOWS", "documents": LONG_WINDOWED}
CHUNKS_OF_16 = {"stream_chunk_tokens": 16}
BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}


@lru_cache
def unchanged(setting: Setting) -> tuple[Record, set[str]]:
    """Without a mutant: the numbers, and where the host waits. Nothing is wrong."""
    found = setting(None)
    record, waits = found[0].record, {where for seen in found for where in seen.waits}
    assert not what_is_wrong(found, record, within=0)
    return record, waits


# --- mutants --------------------------------------------------------------------------------------


def left_out(owner: Any, name: str, caller: Any) -> Callable[[Patch], None]:
    """The call of owner.name in caller does nothing."""
    original = getattr(owner, name)

    def call(*args: Any, **keywords: Any) -> Any:
        if sys._getframe(1).f_code is not caller.__code__:
            return original(*args, **keywords)
        return None

    return lambda patch: patch.setattr(owner, name, call)


def buffer_freed_early(patch: Patch) -> None:
    """A buffer is used again before backward has read it."""
    init = OffloadedTensor.__init__

    def made(self, store, x, kind, buffer, before):
        init(self, store, x, kind, buffer, before)
        store.free[buffer.numel()].append(buffer)

    patch.setattr(OffloadedTensor, "__init__", made)


def sequence_freed_early(patch: Patch) -> None:
    """Hidden states off the device are written over while they are needed."""
    patch.setattr(sequences, "_references", lambda x: 0)


def _copying(stream_of: Callable[..., Any], non_blocking: bool = True) -> Callable[..., Any]:
    def copy(self, target, source, stream):
        with self.module.stream(stream_of(self, stream)):
            target.copy_(source, non_blocking=non_blocking)
        return stream.record_event()

    return copy


def copy_on_the_wrong_stream(patch: Patch) -> None:
    """The event is of one stream, the copy of the other."""
    other = _copying(lambda store, s: store.inward if s is store.outward else store.outward)
    patch.setattr(CudaStore, "_copy", other)


def copy_that_blocks(patch: Patch) -> None:
    patch.setattr(CudaStore, "_copy", _copying(lambda store, s: s, non_blocking=False))


def pageable_buffers(patch: Patch) -> None:
    patch.setattr(offload, "host_buffer", lambda n, *_, **__: torch.empty(n, dtype=torch.uint8))


def buffers_that_share_pages(patch: Patch) -> None:
    """Locked where malloc has put them."""
    arena = torch.frombuffer(mmap.mmap(-1, 2**24), dtype=torch.uint8)
    used = 0

    def buffer(size, *_, **__):
        nonlocal used
        found, used = arena[used : used + size], used + size
        assert torch.cuda.cudart().cudaHostRegister(found.data_ptr(), size, 0) == 0, "712"
        return found

    patch.setattr(offload, "host_buffer", buffer)


def thread_on_device_0(patch: Patch) -> None:
    patch.setattr(offload, "ThreadPoolExecutor", lambda n, name, **_: ThreadPoolExecutor(n, name))


def versions_of_hidden_states(patch: Patch) -> None:
    """The thread counts a change of what is saved for backward."""
    buffer = property(lambda self: self.tensor.view(-1).view(torch.uint8))
    patch.setattr(offload.OffDevice, "buffer", buffer)


def gradients_read_early(patch: Patch) -> None:
    """Autograd adds them to the parameters, in the device's thread, when it may be too late."""
    patch.setattr(SequenceStore, "inputs_for", Sequences.inputs_for)
    patch.setattr(SequenceStore, "add_gradients", Sequences.add_gradients)


def generator_of_the_cpu(patch: Patch) -> None:
    cpu = torch.device("cpu")
    patch.setattr(block, "rng_state", lambda device: replay.rng_state(cpu))
    patch.setattr(block, "replayed", lambda device, state: replay.replayed(cpu, state))


def segments_replay_the_cpu(patch: Patch) -> None:
    """Where their hidden states are, not where they are computed."""
    original = checkpointing.checkpoint

    def checkpoint(run: Any, hidden: Tensor, here: Tensor, **options: Any) -> Any:
        return original(run, hidden, hidden.new_empty(0), **options)

    patch.setattr(checkpointing, "checkpoint", checkpoint)


def root_moves_hidden_states(patch: Patch) -> None:
    """A block of FSDP's that is computed again takes itself for the root."""
    init = checkpointing._Recomputation.__init__
    patch.setattr(
        checkpointing._Recomputation, "__init__", lambda self, blocks, _: init(self, blocks, False)
    )


def autocast_of_the_cpu(patch: Patch) -> None:
    patch.setattr(block, "autocast_state", lambda device: replay.autocast_state("cpu"))


def no_limit_by_the_rule_of_fa3(patch: Patch) -> None:
    """Its -1 at the right is the longest query, FA2's the longest key."""
    arguments = flash_cuda._arguments

    def shorter(scores, device):
        by_position, by_name = arguments(scores, device)
        return (*by_position[:3], max(scores.key_lengths), *by_position[4:]), by_name

    patch.setattr(flash_cuda, "_arguments", shorter)


def window_of_one_key_more(patch: Patch) -> None:
    arguments = flash_cuda._arguments

    def wider(scores, device):
        by_position, by_name = arguments(scores, device)
        return by_position, by_name | {"window_size_left": by_name["window_size_left"] + 1}

    patch.setattr(flash_cuda, "_arguments", wider)


def lengths_on_the_cpu(patch: Patch) -> None:
    def borders(lengths, device):
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

    patch.setattr(flash_cuda, "borders", borders)


def collective_before_its_input(patch: Patch) -> None:
    original = exchange._all_to_all

    def exchanged(*args: Any) -> Tensor:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            received = original(*args)
        torch.cuda.current_stream().wait_stream(side)
        return received

    patch.setattr(exchange, "_all_to_all", exchanged)


def collective_not_waited_for(patch: Patch) -> None:
    original = exchange._all_to_all

    def exchanged(*args: Any) -> Tensor:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            return original(*args).clone()

    patch.setattr(exchange, "_all_to_all", exchanged)


def item_in_a_layer(patch: Patch) -> None:
    original = block._StreamedCall.run

    def run(self, *args, **options):
        output, inputs = original(self, *args, **options)
        assert output is None or output.sum().item() == output.sum().item()
        return output, inputs

    patch.setattr(block._StreamedCall, "run", run)


def item_in_the_step(patch: Patch) -> None:
    original = step._clip

    def clip(*args: Any, **options: Any) -> step.GradientNorms:
        norms = original(*args, **options)
        assert norms.total.item() > 0
        return norms

    patch.setattr(step, "_clip", clip)


def batch_read_before_it_has_come(patch: Patch) -> None:
    def to(self, device):
        moved = {
            k: x.to(device, non_blocking=True) for k, x in vars(self).items() if torch.is_tensor(x)
        }
        return replace(self, **moved)

    patch.setattr(Batch, "to", to)


STREAMS, MENDED = torch.cuda.Stream, "mend taken out: "
MUTANTS: dict[str, tuple[Callable[[Patch], None], Setting, str]] = {
    "put does not wait before it lets go": (
        left_out(STREAMS, "wait_event", CudaStore.put),
        setting(HOST),
        "numbers",
    ),
    "get does not wait for its copy": (
        left_out(STREAMS, "wait_event", CudaStore._end_copies),
        setting(HOST),
        "numbers",
    ),
    "a copy starts before the compute stream is there": (
        left_out(STREAMS, "wait_stream", CudaStore.put),
        setting(HOST),
        "race",
    ),
    "a fetch into memory that is still in use": (
        left_out(STREAMS, "wait_stream", CudaStore._fetch),
        setting(HOST),
        "race",
    ),
    "a fetch of what is still on its way out": (
        left_out(STREAMS, "wait_event", CudaStore._fetch),
        setting(OFF_HOST),
        "race",
    ),
    "a file's fetch into memory that is still in use": (
        left_out(STREAMS, "wait_event", DiskStore._from_file),
        setting(DISK),
        "race",
    ),
    "staging is written to while it is read": (
        left_out(STREAMS, "wait_event", DiskStore._send),
        setting(OFF_DISK),
        "race",
    ),
    "staging is written to a file before the copy has come": (
        left_out(offload, "_wait", offload._to_file),
        setting(DISK),
        "numbers",
    ),
    "embeddings are read before their copy has come": (
        left_out(SequenceStore, "finish", embeddings._EmbeddingFunction.forward),
        setting(OFF_HOST, table="GRANITE"),
        "numbers",
    ),
    "the first block's gradient is read before its copy has come": (
        left_out(SequenceStore, "finish", block._StreamedCall.backward),
        setting(OFF_HOST, table="GRANITE"),
        "numbers",
    ),
    "a buffer is freed early": (buffer_freed_early, setting(HOST), "numbers"),
    "hidden states are freed early": (sequence_freed_early, setting(OFF_HOST), "numbers"),
    "a copy on the wrong stream": (copy_on_the_wrong_stream, setting(HOST), "race"),
    "a copy that blocks": (copy_that_blocks, setting(HOST), "wait"),
    "buffers that are not page-locked": (pageable_buffers, setting(HOST), "wait"),
    "lengths of documents on the CPU": (
        lengths_on_the_cpu,
        setting(CHUNKS_OF_16, BF16, **LONG),
        "refused",
    ),
    "a window of one key more": (
        window_of_one_key_more,
        setting(CHUNKS_OF_16, BF16, **LONG),
        "numbers",
    ),
    "a collective before its input is ready": (
        collective_before_its_input,
        setting(degrees=SP2),
        "race",
    ),
    "a collective that nobody waits for": (collective_not_waited_for, setting(degrees=SP2), "race"),
    "item() in a layer": (item_in_a_layer, setting(STREAM), "wait"),
    "item() in the step": (item_in_the_step, setting(STREAM), "wait"),
    # What was wrong once.
    MENDED + "FlashAttention 2 has another rule of no limit": (
        no_limit_by_the_rule_of_fa3,
        setting(CHUNKS_OF_16, BF16, **LONG),
        "numbers",
    ),
    MENDED + "gradients are read early": (gradients_read_early, setting(OFF_HOST), "numbers"),
    MENDED + "chunks replay the generator of the CPU": (
        generator_of_the_cpu,
        setting(OFF_HOST, table="DROPOUT"),
        "numbers",
    ),
    MENDED + "segments replay the generator of the CPU": (
        segments_replay_the_cpu,
        setting(OFF_HOST, {"checkpoint_every": 2}, table="DROPOUT"),
        "numbers",
    ),
    MENDED + "FSDP moves hidden states to the device": (
        root_moves_hidden_states,
        setting(OFF_HOST, {"checkpoint_every": 2}),
        "refused",
    ),
    MENDED + "chunks replay the autocast of the CPU": (
        autocast_of_the_cpu,
        setting(OFF_HOST, {"around": forward_in_bf16}, dtype=torch.float32),
        "numbers",
    ),
    MENDED + "the copying thread is on device 0": (
        thread_on_device_0,
        setting(DISK, degrees=SP2),
        "context",
    ),
    MENDED + "page-locked buffers share pages": (
        buffers_that_share_pages,
        setting(HOST, dtype=torch.float32),  # of a page and a half each
        "refused",
    ),
    MENDED + "the copying thread counts a version of the hidden states": (
        versions_of_hidden_states,
        setting(OFF_DISK, {"around": slow_disk}),
        "refused",
    ),
    MENDED + "a batch is read before its copy has come": (
        batch_read_before_it_has_come,
        setting(run=carry),
        "numbers",
    ),
}
QUICK = {
    "put does not wait before it lets go",
    "item() in the step",
    MENDED + "gradients are read early",
    MENDED + "the copying thread counts a version of the hidden states",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in MUTANTS]
)
def test_a_mutant_is_found(name: str) -> None:
    _, setting, kind = MUTANTS[name]
    record, waits = unchanged(setting)
    wrong = what_is_wrong(setting(name), record, within=1e-10, waits=waits)
    print(f"FOUND {name}: {wrong}")
    if any(text.startswith("context") for text in wrong):
        close_pools()  # it stays as long as the process
    assert kind in {text.split(":")[0] for text in wrong}, wrong
