"""Access to tensors of the whole sequence, part by part, wherever they are.

Between its blocks a decoder only hands the hidden states on. So they may be in host memory or in
files, if all that reads or writes them does so part by part: the blocks, chunk by chunk; embedding
and rotary embedding, chunk by chunk; the last norm and the loss head, tile by tile. Nothing of the
size [B, T, h] is on the device then. `Sequences` is for tensors on the device, `SequenceStore` for
tensors off it; who computes with parts need not know which of them it has.

On a GPU the copies run on a stream of their own, through a store of `offload.py`: a part is on its
way while the part before it is computed, and results leave while the next part is computed. The
compute stream waits for events, and so does what is enqueued after it; the host waits only in
`SequenceStore.finish`, for decoders that compute with these tensors on the host.

Memory is used again as soon as nothing refers to it. A step holds one tensor for each input of a
segment, and a few more.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from titan_ulysses.distributed.sequence import current_chunks
from titan_ulysses.memory.offload import CudaStore, OffDevice, Store
from titan_ulysses.memory.replay import add_gradients, stand_ins


class Sequences:
    """Makes tensors of the whole sequence on the device, and reads and writes parts of them."""

    is_direct = True
    """Whether the tensors can be computed with where they are, without copies to the device."""

    def read(
        self, whole: Tensor, tokens: slice, then: slice | None = None, *, dim: int = 1
    ) -> Tensor:
        """Return some tokens of a tensor on the device. then: the tokens that are read next.

        dim: the dimension of tokens, 0 or 1.
        """
        ahead = None if then is None else _tokens_of(whole, then, dim)
        return self.fetch(_tokens_of(whole, tokens, dim), ahead)

    def write(self, whole: Tensor, tokens: slice, values: Tensor, *, dim: int = 1) -> None:
        """Write values to some tokens of a tensor. They must not change afterwards."""
        self.put(_tokens_of(whole, tokens, dim), values)

    def fetch(self, part: Tensor, ahead: Tensor | None = None) -> Tensor:
        """Return a part of a tensor on the device; `ahead` is the part that is read next."""
        return part

    def put(self, part: Tensor, values: Tensor) -> None:
        """Write values to a part of a tensor."""
        part.copy_(values)

    def finish(self) -> None:
        """Let the host wait until it can itself read what was written."""

    def empty(
        self, like: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return a tensor of undefined values, like another but for the shape and dtype given."""
        return like.new_empty(like.shape if shape is None else shape, dtype=dtype)

    def device_of(self, whole: Tensor) -> torch.device:
        """Return the device on which a tensor is computed with."""
        return whole.device

    def inputs_for(self, parameters: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return the inputs by which an autograd function of such tensors has these parameters."""
        return parameters

    def add_gradients(
        self, parameters: Sequence[Tensor | None], gradients: list[Tensor | None]
    ) -> None:
        """Add to the gradients of parameters where autograd would do so too late (`replay.py`)."""

    def in_use(self) -> Sequences:
        """Return what the running forward of the model uses: chunks leave the device, and a
        sequence that is computed at once does not.
        """
        return self if len(current_chunks.get()) > 1 else ON_DEVICE


ON_DEVICE = Sequences()


class SequenceStore(Sequences):
    """Makes tensors off the device, and moves parts of them.

    Functions of such tensors add to the gradients of parameters themselves (see `replay.py`).
    """

    def __init__(self, store: Store, device: torch.device):
        """device: that of the run. store: makes the buffers, and copies between them and a GPU; on
        a CPU they are read and written where they are.
        """
        self._store, self.device = store, device
        self.host_reads = True
        """Whether the decoder computes with embeddings or rotary embeddings itself, for which the
        host has to wait (see `families.computes_with_embeddings`).
        """
        self._copies = store if isinstance(store, CudaStore) else None
        self.is_direct = self._copies is None
        self._buffers: dict[int, list[tuple[Tensor, int]]] = {}
        """Buffers by their size in bytes, each with the number of references to it when unused."""
        self._coming: dict[int, OffDevice] = {}
        """Parts that are on their way to the device, one of each tensor."""

    def fetch(self, part: Tensor, ahead: Tensor | None = None) -> Tensor:
        """Return part [B, n, ...] or [n, ...], a slice of a tensor of this store, on the device.

        Without copies, the result is the part itself. The copy of `ahead` begins now, so it must
        not change until it is read.
        """
        if self._copies is None or part.device.type != "cpu":
            return part
        if not part.is_contiguous():  # a part of several sequences, which does not come ahead
            return torch.stack([self.fetch(row) for row in part])
        key = part.untyped_storage()._cdata
        wanted = self._coming.pop(key, None)
        if wanted is not None and not _are_same(wanted.tensor, part):
            self._copies.get(wanted)  # its memory is free again once the copy has ended
            wanted = None
        wanted = wanted or OffDevice(part, self.device)
        if ahead is not None:
            coming = self._coming[key] = OffDevice(ahead, self.device)
            wanted.before = lambda: coming
        return self._copies.get(wanted)

    def put(self, part: Tensor, values: Tensor) -> None:
        if self._copies is None or part.device.type != "cpu":
            part.copy_(values)
        elif not part.is_contiguous():
            for row, value in zip(part, values, strict=True):
                self.put(row, value)
        else:
            self._copies.put(values.detach().to(part.dtype), OffDevice(part, self.device))

    def finish(self) -> None:
        if self._copies is not None:
            self._copies.finish()

    def has(self, x: Tensor) -> bool:
        """Return whether the memory of a tensor is of this store."""
        storage = x.untyped_storage()
        buffers = self._buffers.get(storage.nbytes(), [])
        return any(buffer.untyped_storage()._cdata == storage._cdata for buffer, _ in buffers)

    def empty(
        self, like: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return a tensor with undefined values. It is no view, so FSDP may hook it."""
        shape = torch.Size(like.shape if shape is None else shape)
        dtype = dtype or like.dtype
        size = prod(shape) * dtype.itemsize
        buffers = self._buffers.setdefault(size, [])
        buffer = next((x for x, unused in buffers if _references(x) == unused), None)
        if buffer is None:
            buffer = self._store.make_buffer(size, self.device)
            buffers.append((buffer, _references(buffer)))
        return torch.empty(0, dtype=dtype).set_(buffer.untyped_storage(), 0, shape)

    def device_of(self, whole: Tensor) -> torch.device:
        return self.device

    def inputs_for(self, parameters: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return stand_ins(parameters)

    def add_gradients(
        self, parameters: Sequence[Tensor | None], gradients: list[Tensor | None]
    ) -> None:
        add_gradients(parameters, gradients)


def _tokens_of(whole: Tensor, tokens: slice, dim: int) -> Tensor:
    return whole[:, tokens] if dim else whole[tokens]


def _references(x: Tensor) -> int:
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of the same storage are the same part of it."""
    places = ((x.storage_offset(), x.shape, x.dtype) for x in (one, other))
    return next(places) == next(places)
