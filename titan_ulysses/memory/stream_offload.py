"""Tensors of the whole sequence that wait off the device while blocks stream (see streaming.py).

Between its blocks a decoder only hands the hidden states on. So they may be in host memory or in
files, if all that reads or writes them does so part by part: the blocks, chunk by chunk; embedding
and rotary embedding, chunk by chunk; the last norm and the loss head, tile by tile. Nothing of the
size [B, T, h] is on the device then. The keys and values of one layer are in the same place (see
`ulysses/key_blocks.py`).

On a GPU the copies run on a stream of their own, through a store of `offload.py`: a part is on its
way while the part before it is computed, and results leave while the next part is computed. The
compute stream waits for events. The host waits only where the decoder itself computes with what is
in the store: with what embeddings have made (granite scales it), and with the gradient of that.

Memory is used again as soon as nothing refers to it. A step holds one tensor for each input of a
segment, and a few more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan_ulysses.distributed.device import module_of
from titan_ulysses.distributed.parts import visited, visited_with_next
from titan_ulysses.distributed.sequence import Chunk, current_chunks, running
from titan_ulysses.memory.offload import CudaStore, DiskStore, buffer_maker
from titan_ulysses.memory.replay import add_gradients, stand_ins

StreamOffload = Literal["none", "host", "disk"]


def open_sequence_store(
    offload: Literal["host", "disk"], folder: str | Path | None, device: torch.device
) -> SequenceStore:
    """Return the store for the hidden states of a run on this device.

    folder is used only by "disk"; None means the system's temporary folder.
    """
    make_buffer = buffer_maker(offload, folder)
    if device.type == "cpu":
        return SequenceStore(make_buffer, device)
    kind = CudaStore if offload == "host" else DiskStore
    return SequenceStore(make_buffer, device, kind(make_buffer, module_of(device)))


class SequenceStore:
    """Makes tensors off the device, and moves parts of them.

    Functions of such tensors add to the gradients of parameters themselves (see `replay.py`).
    """

    def __init__(
        self,
        make_buffer: Callable[[int, torch.device], Tensor],
        device: torch.device,
        copies: CudaStore | None = None,
    ):
        """device: that of the run. copies: copies between it and the buffers; None on a CPU, which
        reads and writes the buffers themselves.
        """
        self._make_buffer, self.device, self._copies = make_buffer, device, copies
        self._buffers: dict[int, list[tuple[Tensor, int]]] = {}
        """Buffers by their size in bytes, each with the number of references to it when unused."""
        self._coming: dict[int, _Part] = {}
        """Parts that are on their way to the device, one of each tensor."""

    @property
    def is_direct(self) -> bool:
        """Whether the tensors can be used as they are, without copies to the device."""
        return self._copies is None

    def read(self, part: Tensor, ahead: Tensor | None = None) -> Tensor:
        """Return part [B, n, ...] or [n, ...], a slice of a tensor of this store, on the device.

        Without copies, the result is the part itself. ahead: a part, of this tensor or another,
        that is read next. Its copy begins now, so it must not change until then.
        """
        if self._copies is None or part.device.type != "cpu":
            return part
        if not part.is_contiguous():  # a part of several sequences, which does not come ahead
            return torch.stack([self.read(row) for row in part])
        key = part.untyped_storage()._cdata
        wanted = self._coming.pop(key, None)
        if wanted is not None and not wanted.is_part(part):
            self._copies.get(wanted)  # its memory is free again once the copy has ended
            wanted = None
        wanted = wanted or _Part(part, self.device)
        if ahead is not None:
            coming = _Part(ahead, self.device)
            self._coming[ahead.untyped_storage()._cdata] = coming
            wanted.before = lambda: coming
        return self._copies.get(wanted)

    def write(self, part: Tensor, values: Tensor) -> None:
        """Write values to a part of a tensor of this store. They must not change afterwards."""
        if self._copies is None or part.device.type != "cpu":
            part.copy_(values)
        elif not part.is_contiguous():
            for row, value in zip(part, values, strict=True):
                self.write(row, value)
        else:
            self._copies.put(values.detach().to(part.dtype), _Part(part, self.device))

    def finish(self) -> None:
        """Let the host wait until it can read what was written: others than this store may do."""
        if self._copies is not None:
            self._copies.finish()

    def has(self, x: Tensor) -> bool:
        """Return whether the memory of a tensor is of this store."""
        storage = x.untyped_storage()
        buffers = self._buffers.get(storage.nbytes(), [])
        return any(buffer.untyped_storage()._cdata == storage._cdata for buffer, _ in buffers)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a tensor with undefined values. It is no view, so FSDP may hook it."""
        size = prod(shape) * dtype.itemsize
        buffers = self._buffers.setdefault(size, [])
        buffer = next((x for x, unused in buffers if _references(x) == unused), None)
        if buffer is None:
            buffer = self._make_buffer(size, self.device)
            buffers.append((buffer, _references(buffer)))
        return torch.empty(0, dtype=dtype).set_(buffer.untyped_storage(), 0, shape)


class _Part:
    """A part of a tensor off the device, for the copies of a `CudaStore`."""

    def __init__(self, part: Tensor, device: torch.device):
        self.part, self.device = part, device
        self.shape, self.dtype = part.shape, part.dtype
        self.before: Callable[[], _Part | None] = lambda: None
        """The part that is fetched after this one."""
        self.fetched: tuple[Tensor, torch.Event | Future[torch.Event]] | None = None

    @property
    def buffer(self) -> Tensor:
        """Its bytes."""
        # `data`, because a thread writes to them: autograd would take that for a change of the
        # hidden states, which are saved for backward meanwhile.
        return self.part.data.view(-1).view(torch.uint8)

    def view(self) -> Tensor:
        return self.part

    def is_part(self, other: Tensor) -> bool:
        """Return whether other, of the same storage, is this part."""
        return (self.part.storage_offset(), self.shape, self.dtype) == (
            other.storage_offset(),
            other.shape,
            other.dtype,
        )


def _references(x: Tensor) -> int:
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def offload_embeddings(
    embedding: nn.Module, rotaries: list[nn.Module], store: SequenceStore
) -> None:
    """Let these modules write what they make of a sequence of several chunks to store, in place."""
    embedding.forward = _Embedding(embedding, store)
    for rotary in rotaries:
        rotary.forward = _Rotary(rotary, store)


class _Rotary:
    """The forward of a rotary embedding, chunk by chunk."""

    def __init__(self, rotary: nn.Module, store: SequenceStore):
        self.forward, self.store = rotary.forward, store

    def __call__(self, x: Tensor, position_ids: Tensor, *args, **kwargs) -> Any:
        chunks, store = current_chunks.get(), self.store
        here = x.new_empty(0, device=position_ids.device)  # only its dtype and device are read
        if len(chunks) < 2 or position_ids.ndim != 2:
            return self.forward(here, position_ids, *args, **kwargs)
        whole: tuple[Tensor, ...] = ()
        for chunk in visited(list(chunks)):
            with running(chunk):
                made = self.forward(here, position_ids[:, chunk.local], *args, **kwargs)
            parts = made if isinstance(made, tuple) else (made,)
            if not whole:
                shapes = [(len(x), position_ids.shape[1], *x.shape[2:]) for x in parts]
                pairs = zip(parts, shapes, strict=True)
                whole = tuple(store.empty(torch.Size(shape), x.dtype) for x, shape in pairs)
            for x, part in zip(whole, parts, strict=True):
                store.write(x[:, chunk.local], part)
        store.finish()
        return whole if isinstance(made, tuple) else whole[0]


class _Embedding:
    """The forward of an embedding, chunk by chunk."""

    def __init__(self, embedding: nn.Module, store: SequenceStore):
        self.embedding, self.forward, self.store = embedding, embedding.forward, store

    def __call__(self, ids: Tensor) -> Tensor:
        chunks = current_chunks.get()
        if len(chunks) < 2:
            return self.forward(ids)
        return _EmbeddingFunction.apply(self, chunks, ids, *stand_ins([self.embedding.weight]))


class _EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, look_up: _Embedding, chunks: Sequence[Chunk], ids: Tensor, weight: Tensor):
        ctx.look_up, ctx.chunks, ctx.weight = look_up, chunks, look_up.embedding.weight
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        shape = torch.Size((*ids.shape, weight.shape[1]))
        output = look_up.store.empty(shape, weight.dtype)
        for chunk in visited(list(chunks)):
            look_up.store.write(output[:, chunk.local], look_up.forward(ids[:, chunk.local]))
        look_up.store.finish()
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (ids,), embedding = ctx.saved_tensors, ctx.look_up.embedding
        wide = torch.promote_types(ctx.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=ids.device)
        # gemma's embeddings multiply what they look up.
        scale = torch.as_tensor(
            getattr(embedding, "embed_scale", 1.0), dtype=ctx.dtype, device=ids.device
        )
        for chunk, then in visited_with_next(list(ctx.chunks)):
            rows = ids[:, chunk.local].flatten()
            part = ctx.look_up.store.read(
                upstream[:, chunk.local], None if then is None else upstream[:, then.local]
            )
            gradient = part.flatten(0, 1) * scale
            if embedding.padding_idx is not None:  # its row has no gradient
                padding = (rows == embedding.padding_idx)[:, None]
                gradient = gradient.masked_fill(padding, 0)
            total.index_add_(0, rows, gradient.to(wide))
        add_gradients([ctx.weight], [total])
        return None, None, None, None
