"""The device of this process: its streams, generators, page-locked memory and figures.

torch has a module for each type of device, with the same names in all of them: torch.cuda, which is
ROCm's too, torch.xpu, and torch.cpu, whose streams do nothing. What is written for `module_of` has
one path for all of them. torch.accelerator serves less: it stands for the GPU that torch was built
for, be it there or not, refuses a CPU, and on a Mac is a device that FSDP cannot use.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from titan_ulysses.distributed.tensors import plain_pieces


def device_type() -> str:
    """Return the type of the device that this process computes on: "cpu" or "cuda"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def module_of(device: torch.device | str | None = None) -> ModuleType:
    """Return torch's module of a device: streams, events, the current device, memory in use.

    Without a device, of what this process computes on.
    """
    return torch.get_device_module(device or device_type())


def generator_of(device: torch.device) -> torch.Generator:
    """Return the generator of the random numbers that are drawn on a device in use."""
    if device.type == "cpu":
        return torch.default_generator
    return module_of(device).default_generators[device.index]


def forked_rng(devices: Iterable[torch.device]) -> AbstractContextManager[None]:
    """Return a context that leaves the generators of the host and of devices as they were."""
    gpus = {device for device in devices if device.type != "cpu"}
    return torch.random.fork_rng(gpus, device_type=device_type())


def copied_to(x: Tensor, device: torch.device | str) -> Tensor:
    """Return x on device; the host does not wait for its copy to a GPU."""
    # A copy from pageable memory would make the host wait in spite of `non_blocking`. A copy to the
    # host must make it wait: nothing would tell a reader that it has come.
    to_gpu = torch.device(device).type not in ("cpu", "meta")
    pins = to_gpu and x.device.type == "cpu"
    return (x.pin_memory() if pins else x).to(device, non_blocking=to_gpu)


def pin(x: Tensor) -> None:
    """Move a tensor in host memory to page-locked memory, in place."""
    for piece in plain_pieces(x):
        piece.set_(piece.pin_memory())


def page_locked(size: int) -> Tensor:
    """Return a buffer of size bytes in page-locked host memory; OSError if it cannot be had.

    torch's pin_memory is not used, because it rounds sizes up to a power of two. Pages are locked
    as a whole, and none may be locked twice, so the buffer has pages of its own.
    """
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)[:size]
    locked = -(-len(memory) // mmap.PAGESIZE) * mmap.PAGESIZE
    cudart = torch.cuda.cudart()  # ROCm's too, under the names of CUDA
    result = cudart.cudaHostRegister(buffer.data_ptr(), locked, 0)
    if int(result) != 0:
        raise OSError(str(result))
    # Unregister before the memory is freed: CUDA would otherwise treat whatever is allocated at
    # this address next as page-locked.
    address, unregister = buffer.data_ptr(), cudart.cudaHostUnregister
    weakref.finalize(buffer.untyped_storage(), unregister, address).atexit = False
    return buffer
