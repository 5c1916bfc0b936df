"""Offloaded activation checkpoints: segment inputs in host memory or in files until backward.

Inputs are copied to buffers that are allocated once and reused. On CUDA the copies of each
direction run on a stream of their own: to the buffer while the next segment computes, and back one
segment before backward needs the input. The compute stream waits for events, never for the host.
CUDA copies during the computation only from and to page-locked memory. So buffers in host memory
are page-locked, and inputs on their way to or from a file pass through one of two page-locked
buffers, which a thread empties and fills. On a CPU, buffers are plain memory or memory-mapped
files, and the copies are synchronous.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from titan_ulysses.distributed.device import module_of, page_locked
from titan_ulysses.distributed.errors import UserError

Offload = Literal["none", "host", "disk"]

MakeBuffer = Callable[[int, torch.device], Tensor]
"""Makes a buffer of so many bytes off the device of the run."""

_RESERVE = 16
"""Tensors of each process that must still fit after one that is kept only if there is room."""


def open_store(
    offload: Literal["host", "disk"],
    folder: str | Path | None,
    device: torch.device,
    *,
    setting: str = "activation_checkpoint.offload",
) -> Store:
    """Return the store for tensors of a run on this device.

    folder is used only by "disk"; None means the system's temporary folder. setting: the key that
    asks for the store, for messages.
    """
    locked: MakeBuffer = partial(host_buffer, setting=f'{setting} = "{offload}"')
    place = Path(folder or tempfile.gettempdir())
    make_buffer = locked if offload == "host" else _FileBuffers(place)
    room = available_host_memory if offload == "host" else lambda: shutil.disk_usage(place).free
    if device.type == "cpu":
        return Store(make_buffer, room)
    if offload == "host":
        return CudaStore(make_buffer, module_of(device), room)
    return DiskStore(make_buffer, module_of(device), room, make_staging=locked)


class OffDevice:
    """A tensor off the device, or a part of one, as a store copies it."""

    def __init__(self, tensor: Tensor, device: torch.device, kind: str | None = None):
        """device: that of the copies back. kind: that of `Store.keep`; None: part of a tensor."""
        self.tensor, self.device, self.kind = tensor, device, kind
        self.before: Callable[[], OffDevice | None] = lambda: None
        """Returns what is fetched after this one, or None."""
        self.fetched: tuple[Tensor, torch.Event | Future[torch.Event]] | None = None
        """The copy on the device, and the event of its end."""

    @property
    def buffer(self) -> Tensor:
        """Its bytes."""
        # `data`, because a thread writes to them: autograd would take that for a change of the
        # hidden states, which are saved for backward meanwhile.
        return self.tensor.data.view(-1).view(torch.uint8)

    @property
    def place(self) -> tuple[int, int, int]:
        """The storage, and the first byte in it and the one after the last."""
        x = self.tensor
        start = x.storage_offset() * x.element_size()
        return x.untyped_storage()._cdata, start, start + x.numel() * x.element_size()


class OffloadedTensor(OffDevice):
    """A tensor in a buffer of its own.

    The buffer becomes free when the last reference to this object is gone, which is after backward.
    """

    def __init__(
        self, store: Store, x: Tensor, kind: str, buffer: Tensor, before: OffloadedTensor | None
    ):
        super().__init__(buffer.view(x.dtype).view(x.shape), x.device, kind)
        if before is not None:  # what was offloaded just before is needed just after in backward
            self.before = weakref.ref(before)
        free = store.free.setdefault(buffer.numel(), [])
        weakref.finalize(self, free.append, buffer).atexit = False


class Store:
    """Keeps tensors in buffers of host memory."""

    def __init__(self, make_buffer: MakeBuffer, room: Callable[[], float] = lambda: inf):
        self.make_buffer, self._room = make_buffer, room
        self.buffers: list[Tensor] = []
        """All buffers ever made, in use or free."""
        self.free: dict[int, list[Tensor]] = {}
        """Buffers not in use, by their size in bytes."""
        self._latest: dict[str, weakref.ref[OffloadedTensor]] = {}

    @contextmanager
    def offload_saved_tensors(self) -> Iterator[None]:
        """Keep the input of a checkpoint that begins inside this context in this store."""
        # torch's checkpoint saves its inputs, all but one of them empty, before it installs its own
        # hooks. These hooks therefore see only those.
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, x: Tensor) -> Tensor | OffloadedTensor:
        return x if x.numel() == 0 else self.keep(x)

    def has_room(self, size: int) -> bool:
        """Return whether a tensor of size bytes can be kept, with room for others after it."""
        if self.free.get(size):
            return True
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return self._room() > _RESERVE * processes * size

    def keep(self, x: Tensor, kind: str = "inputs") -> OffloadedTensor:
        """Keep x in this store.

        Tensors of a kind are needed in backward in the reverse of the order of these calls.
        """
        size = x.numel() * x.element_size()
        if self.free.get(size):
            buffer = self.free[size].pop()
        else:
            buffer = self.make_buffer(size, x.device)
            self.buffers.append(buffer)
        before = self._latest[kind]() if kind in self._latest else None
        kept = OffloadedTensor(self, x, kind, buffer, before)
        self._latest[kind] = weakref.ref(kept)
        self.put(x.detach(), kept)
        return kept

    def _unpack(self, kept: Tensor | OffloadedTensor) -> Tensor:
        return self.get(kept) if isinstance(kept, OffloadedTensor) else kept

    def put(self, x: Tensor, kept: OffDevice) -> None:
        kept.tensor.copy_(x)

    def get(self, kept: OffDevice) -> Tensor:
        return kept.tensor.clone()


@dataclass(eq=False)
class _Sent:
    """A tensor on the device whose copy to its buffer may not have ended."""

    kept: weakref.ref[OffDevice]
    kind: Hashable
    x: Tensor
    place: tuple[int, int, int]
    """of the copy (see `OffDevice.place`)"""
    copied: torch.Event

    @property
    def size(self) -> int:
        return self.x.numel() * self.x.element_size()


class CudaStore(Store):
    """A store for a CUDA device: copies overlap computation and are fetched one segment ahead.

    module is torch's for the device (see `device.module_of`). The planner passes torch.cpu, whose
    streams do nothing, to find out which tensors are alive at the same time.
    """

    def __init__(
        self, make_buffer: MakeBuffer, module: ModuleType, room: Callable[[], float] = lambda: inf
    ):
        super().__init__(make_buffer, room)
        self.module, self.outward, self.inward = module, module.Stream(), module.Stream()
        self._sent: deque[_Sent] = deque()
        self._largest = 0
        """bytes of the largest tensor so far"""
        self._ahead: list[tuple[weakref.ref[OffDevice], Tensor, torch.Event | Future]] = []
        """What was fetched and not yet asked for, held here until its copy has ended."""

    def put(self, x: Tensor, kept: OffDevice) -> None:
        compute = self.module.current_stream()
        self._end_copies(lambda of: of is None)
        self.outward.wait_stream(compute)
        copied = self._send(x, kept)
        # Parts of one tensor are handed over one after the other, with computation in between.
        place = kept.place
        sent = _Sent(weakref.ref(kept), kept.kind or place[0], x, place, copied)
        self._sent.append(sent)
        self._largest = max(self._largest, sent.size)
        while self._holds_too_much():
            # Letting go of x lets the allocator reuse its memory in the order of the compute
            # stream, which therefore has to wait before that until x is copied.
            sent = self._sent.popleft()
            compute.wait_event(sent.copied)

    def _holds_too_much(self) -> bool:
        """Return whether the tensors whose copies are under way are too many.

        They may have the bytes of the largest one, which needs as much when it is alone. And the
        latest two may always be under way, if they are of different kinds: what attention hands
        over comes in pairs, its keys and values or its output and log-sum-exp, and with nothing to
        compute in between the device would wait for the whole copy of the first. Inputs of segments
        are all of one kind, and the next one comes when there was time to copy this one.
        """
        if len(self._sent) < 2 or sum(sent.size for sent in self._sent) <= self._largest:
            return False
        return len(self._sent) > 2 or self._sent[0].kind == self._sent[1].kind

    def get(self, kept: OffDevice) -> Tensor:
        self._bring(kept)
        assert kept.fetched is not None
        x, _ = kept.fetched
        kept.fetched = None
        # Those of a graph that was dropped, too: nobody will ask for them.
        self._end_copies(lambda of: of is None or of is kept)
        before = kept.before()
        if before is not None:
            self._bring(before)
        return x

    def _end_copies(self, ended: Callable[[OffDevice | None], bool]) -> None:
        """Let the compute stream wait for copies that were begun ahead, and let go of them."""
        ahead, self._ahead = self._ahead, []
        for of, x, arrived in ahead:
            if not ended(of()):
                self._ahead.append((of, x, arrived))
                continue
            self.module.current_stream().wait_event(
                arrived.result() if isinstance(arrived, Future) else arrived
            )

    def _bring(self, kept: OffDevice) -> None:
        """Have kept on the device, or on its way there."""
        if kept.fetched is not None:
            return
        for sent in self._sent:
            if sent.kept() is kept:  # it has not left the device, as the input of the last segment
                kept.fetched = sent.x, sent.copied
                self._sent.remove(sent)
                break
        else:
            self._fetch(kept)
        assert kept.fetched is not None
        self._ahead.append((weakref.ref(kept), *kept.fetched))

    def finish(self) -> None:
        """Let the host wait until all that was put is in its buffer."""
        self.module.synchronize()

    def _send(self, x: Tensor, kept: OffDevice) -> torch.Event:
        """Start the copy of x to its buffer; return the event of its end."""
        return self._copy(kept.tensor, x, self.outward)

    def _copy(self, target: Tensor, source: Tensor, stream: torch.Stream) -> torch.Event:
        with self.module.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def _fetch(self, kept: OffDevice) -> None:
        """Start the copy back to the device.

        x is allocated on the compute stream, where it will also be freed. The copy waits for that
        stream, which may still be using the same memory for an earlier tensor, and for the copies
        to the buffer that the compute stream has not waited for.
        """
        x = torch.empty_like(kept.tensor, device=kept.device)
        self.inward.wait_stream(self.module.current_stream())
        storage, start, stop = kept.place
        for sent in self._sent:
            if sent.place[0] == storage and sent.place[1] < stop and start < sent.place[2]:
                self.inward.wait_event(sent.copied)
        kept.fetched = x, self._copy(x, kept.tensor, self.inward)


class DiskStore(CudaStore):
    """A store for a CUDA device whose buffers are files.

    Memory of a file is pageable: a copy between it and the device makes the host wait. So a tensor
    passes through one of two page-locked staging buffers, and a thread copies between these and the
    files. The host waits only where that thread is two tensors behind.

    make_staging makes a staging buffer, page-locked on a GPU. background runs the thread's
    work in the order in which it is submitted; unset, it is a thread of this store. The planner
    passes one that runs it at once.
    """

    def __init__(
        self,
        make_buffer: MakeBuffer,
        module: ModuleType,
        room: Callable[[], float] = lambda: inf,
        *,
        make_staging: MakeBuffer,
        background: Executor | None = None,
    ):
        super().__init__(make_buffer, module, room)
        self.make_staging = make_staging
        # A new thread has device 0, where its first call would open a context of half a GiB.
        self.background = background or ThreadPoolExecutor(
            1, "offload", initializer=module.set_device, initargs=(module.current_device(),)
        )
        self._staging = deque([_Staging(), _Staging()])

    def finish(self) -> None:
        for staging in self._staging:
            if staging.work is not None:
                staging.work.result()

    def _send(self, x: Tensor, kept: OffDevice) -> torch.Event:
        staging = self._next_staging(kept)
        if staging.read is not None:
            self.outward.wait_event(staging.read)
        copied = self._copy(staging.view(kept), x, self.outward)
        staging.work = self.background.submit(_to_file, kept.buffer, staging.buffer, copied)
        return copied

    def _fetch(self, kept: OffDevice) -> None:
        x = torch.empty_like(kept.tensor, device=kept.device)
        # Until here the compute stream may use the memory of x for an earlier tensor.
        allocated = self.module.current_stream().record_event()
        staging = self._next_staging(kept)
        staging.work = self.background.submit(self._from_file, x, kept.buffer, staging, allocated)
        kept.fetched = x, staging.work

    def _from_file(
        self, x: Tensor, buffer: Tensor, staging: _Staging, allocated: torch.Event
    ) -> torch.Event:
        """Copy a file to staging, and start the copy to x; return the event of its end."""
        _wait(staging.read)
        staging.buffer[: buffer.numel()].copy_(buffer)
        self.inward.wait_event(allocated)
        source = staging.buffer[: buffer.numel()].view(x.dtype).view(x.shape)
        staging.read = self._copy(x, source, self.inward)
        return staging.read

    def _next_staging(self, kept: OffDevice) -> _Staging:
        """Return the staging buffer that was not used last, with room for kept.

        Waits until the thread is done with it, and raises what went wrong there.
        """
        staging, size = self._staging[0], kept.buffer.numel()
        self._staging.rotate()
        if staging.work is not None:
            staging.work.result()
        if staging.buffer is None or staging.buffer.numel() < size:
            _wait(staging.read)
            staging.buffer = self.make_staging(size, kept.device)
        return staging


class _Staging:
    """A page-locked buffer, and what uses it."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.work: Future | None = None
        """What the thread has to do with it, or has done last."""
        self.read: torch.Event | None = None
        """The end of the last copy from it to the device."""

    def view(self, kept: OffDevice) -> Tensor:
        """Return the part for kept, with its dtype and shape."""
        return self.buffer[: kept.buffer.numel()].view(kept.tensor.dtype).view(kept.tensor.shape)


def _to_file(buffer: Tensor, staging: Tensor, copied: torch.Event) -> None:
    _wait(copied)
    buffer.copy_(staging[: buffer.numel()])


def _wait(event: torch.Event | None) -> None:
    """Let this thread wait for event; the streams of torch.cpu have none."""
    if event is not None:
        event.synchronize()


def host_buffer(size: int, device: torch.device, *, setting: str) -> Tensor:
    """Return a buffer of size bytes in host memory, page-locked if device is a GPU."""
    if device.type == "cpu" or size == 0:  # of a rank without queries of a head: nothing to lock
        return torch.empty(size, dtype=torch.uint8)
    try:
        return page_locked(size)
    except OSError as error:
        raise UserError(
            f"{setting}: {size / 2**30:.2f} GiB of host "
            f"memory could not be page-locked ({error}). Raise the limit (ulimit -l "
            "unlimited), or use fewer checkpoints: raise activation_checkpoint.every."
        ) from None


class _FileBuffers:
    """Maker of buffers in memory-mapped files of a folder.

    The system writes their pages out when memory is short. Each file is unlinked as soon as it is
    mapped, so that nothing is left on the disk, however the process ends.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, size: int, device: torch.device) -> Tensor:
        if size == 0:  # of a rank without queries of a head; a file of no bytes cannot be mapped
            return torch.empty(0, dtype=torch.uint8)
        try:
            handle, name = tempfile.mkstemp(prefix="checkpoint-", dir=self.folder)
            try:
                # Reserve the space now: a full disk is an error here, but a crash (SIGBUS) later.
                os.posix_fallocate(handle, 0, size)
                return torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
            finally:
                os.close(handle)
                os.unlink(name)
        except OSError as error:
            raise UserError(
                f"activation_checkpoint.offload_folder = {self.folder}: no room for "
                f"{size / 2**30:.2f} GiB ({error.strerror}). Choose another folder, or raise "
                "activation_checkpoint.every."
            ) from error


def check_room(
    offload: Offload,
    folder: str | Path | None,
    *,
    shape: tuple[int, ...],
    itemsize: int,
    segments: int,
    processes: int,
    attention: int = 0,
) -> None:
    """Raise UserError if this node has no room for the segment inputs of all its processes.

    shape is [B, T, h], the shape of one input, and itemsize its bytes per element. segments is the
    number of inputs per process, and attention the bytes of a process for outputs of attention.
    """
    if offload == "none":
        return
    needed = (prod(shape) * itemsize * segments + attention) * processes
    if offload == "disk":
        place = Path(folder or tempfile.gettempdir())
        setting = f"activation_checkpoint.offload_folder = {place}"
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise UserError(f"{setting}: not a writable folder. Create it, or name another one.")
        free = shutil.disk_usage(place).free
    else:
        setting, free = f'activation_checkpoint.offload = "{offload}"', available_host_memory()
    if needed > free:
        remedy = (
            'Set activation_checkpoint.keep_attention = "auto", raise' if attention else "Raise"
        )
        raise UserError(
            f"{setting}: checkpoints take {needed / 2**30:.1f} GiB on this node ({processes} ranks "
            f"x {segments} segments), and {free / 2**30:.1f} GiB are free. {remedy} "
            "activation_checkpoint.every, use more sequence-parallel ranks on more nodes, or "
            "shorten training.seq_len."
        )


def available_host_memory() -> int:
    """Return the bytes of host memory still available to this process.

    This is the kernel's MemAvailable, or the limit of the control group if that leaves less.
    """
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    fields = dict(line.split(":") for line in lines)
    if "MemAvailable" in fields:
        available = int(fields["MemAvailable"].split()[0]) * 1024
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(available, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no control group, or "max"
        return available
