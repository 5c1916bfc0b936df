"""torch.cuda in a torch that was built for the CPU: the functions of torch._C beneath it, and the
few classes that it took stand-ins for when it was imported. All else is torch's own code.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

NAME = "Fake H100 80GB HBM3"
_CUDA = 1  # c10::DeviceType::CUDA


def put_in(library: ctypes.CDLL) -> None:
    library.fakecuda_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.fakecuda_unregister.argtypes = [ctypes.c_void_p]
    library.fakecuda_set_stream.argtypes = [ctypes.c_int, ctypes.c_long]
    library.fakecuda_stream.restype = ctypes.c_long
    library.fakecuda_start()
    for name, function in _functions(library).items():
        setattr(torch._C, name, function)
    torch._C._has_cuda = True
    torch.version.cuda = "12.8"
    cuda = torch.cuda
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "_initialized": True,
        "_cudart": _Cudart(library),
        # torch._dynamo has a handler for each of them, so they are two.
        "_exchange_device": _exchange(library),
        "_maybe_exchange_device": _exchange(library),
        "_get_device_properties": _properties,
        "default_generators": tuple(torch.ops.fakecuda.generator(i) for i in range(16)),
        "is_current_stream_capturing": lambda: False,
    }.items():
        setattr(cuda, name, value)
    cuda.streams.Stream, cuda.streams.Event = Stream, Event
    cuda.graphs.is_current_stream_capturing = cuda.is_current_stream_capturing
    _resize_storages()


class Stream(torch.Stream):
    """torch.cuda.Stream."""

    def __new__(cls, device: Any = None, priority: int = 0, **known: int) -> Stream:
        if "stream_id" in known:
            return super().__new__(
                cls,
                stream_id=known["stream_id"],
                device_index=known["device_index"],
                device_type=_CUDA,
            )
        index = torch.cuda._utils._get_device_index(device, optional=True)
        return super().__new__(cls, device=torch.device("cuda", index), priority=priority)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Event(torch.Event):
    """torch.cuda.Event."""

    def __new__(
        cls,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> Event:
        device = torch.device("cuda", torch.cuda.current_device())
        return super().__new__(
            cls,
            device=device,
            enable_timing=enable_timing,
            blocking=blocking,
            interprocess=interprocess,
        )

    def record(self, stream: Stream | None = None) -> None:
        super().record(torch.cuda.current_stream() if stream is None else stream)

    def wait(self, stream: Stream | None = None) -> None:
        super().wait(torch.cuda.current_stream() if stream is None else stream)


class _Cudart:
    """What torch.cuda.cudart() returns."""

    cudaError = SimpleNamespace(success=0)  # noqa: N815  # as in torch

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        return self._library.fakecuda_register(address, size)

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        return self._library.fakecuda_unregister(address)

    def cudaMemGetInfo(self, device: int) -> tuple[int, int]:  # noqa: N802
        usage = _usage(device)
        return usage.memory - usage.reserved, usage.memory

    def cudaProfilerStart(self) -> int:  # noqa: N802
        return 0

    def cudaProfilerStop(self) -> int:  # noqa: N802
        return 0


def _properties(device: int) -> SimpleNamespace:
    """Of an H100 (data sheet and CUDA C Programming Guide, compute capability 9.0)."""
    return SimpleNamespace(
        name=NAME,
        total_memory=_usage(device).memory,
        major=9,
        minor=0,
        multi_processor_count=132,
        L2_cache_size=50 * 2**20,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName="",
        uuid="fake",
        pci_bus_id=0,
        pci_device_id=0,
        pci_domain_id=0,
    )


def _exchange(library: ctypes.CDLL) -> Any:
    def exchange(device: int) -> int:
        before = library.fakecuda_device()
        if device >= 0:
            library.fakecuda_set_device(device)
        return before

    return exchange


def _functions(library: ctypes.CDLL) -> dict[str, Any]:
    """Those of torch._C that torch.cuda's own code calls."""

    def set_device(device: int) -> None:
        if library.fakecuda_set_device(device):
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")

    def set_stream(*, stream_id: int, device_index: int, device_type: int) -> None:
        set_device(device_index)
        library.fakecuda_set_stream(device_index, stream_id)

    # Each is a function of Python's: torch._dynamo wants to hash them, and ctypes' own cannot be.
    return {
        "_cuda_getDeviceCount": lambda: library.fakecuda_device_count(),
        "_cuda_init": lambda: None,
        "_cuda_isInBadFork": lambda: False,
        "_cuda_setDevice": set_device,
        "_cuda_getDevice": lambda: library.fakecuda_device(),
        "_cuda_synchronize": lambda: library.fakecuda_synchronize(library.fakecuda_device()),
        "_cuda_getCurrentStream": lambda device: (library.fakecuda_stream(device), device, _CUDA),
        "_cuda_getDefaultStream": lambda device: (0, device, _CUDA),
        "_cuda_getCurrentRawStream": lambda device: library.fakecuda_stream(device),
        "_cuda_setStream": set_stream,
        "_cuda_isCurrentStreamCapturing": lambda: False,
        "_cuda_memoryStats": _memory_stats,
        "_cuda_resetPeakMemoryStats": lambda device: library.fakecuda_reset_peak(device),
        "_cuda_resetAccumulatedMemoryStats": lambda device: None,
        "_cuda_emptyCache": lambda: library.fakecuda_empty_cache(),
        "_cuda_memorySnapshot": lambda *_: {"segments": [], "device_traces": []},
        "_cuda_record_memory_history": lambda *_, **__: None,
        "_cuda_isHistoryEnabled": lambda: False,
        "_cuda_getCompiledVersion": lambda: 12080,
        "_nccl_version": lambda: 22703,
        "_nccl_version_suffix": lambda: b"",
        # torch._dynamo.reset() wants to import it.
        "_cuda_CUDAAllocator_AllocatorState": object,
    }


class _Usage(NamedTuple):
    """Of a device, in bytes."""

    allocated: int
    allocated_peak: int
    reserved: int
    reserved_peak: int
    allocations: int
    retries: int
    ooms: int
    memory: int


def _usage(device: int) -> _Usage:
    return _Usage(*torch.ops.fakecuda.usage(device))


def _memory_stats(device: int) -> dict[str, Any]:
    usage = _usage(device)

    def bytes_of(current: int, peak: int) -> dict[str, dict[str, int]]:
        return {"all": {"current": current, "peak": peak}}

    return {
        "allocated_bytes": bytes_of(usage.allocated, usage.allocated_peak),
        "active_bytes": bytes_of(usage.allocated, usage.allocated_peak),
        "requested_bytes": bytes_of(usage.allocated, usage.allocated_peak),
        "reserved_bytes": bytes_of(usage.reserved, usage.reserved_peak),
        "inactive_split_bytes": bytes_of(0, 0),
        "allocation": {"all": {"allocated": usage.allocations}},
        "num_alloc_retries": usage.retries,
        "num_ooms": usage.ooms,
    }


def _resize_storages() -> None:
    """UntypedStorage.resize_ asks the storage's allocator for a kernel that is CUDA's alone."""
    resize = torch.UntypedStorage.resize_

    def resize_untyped(self: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if self.device.type != "cuda":
            return resize(self, size)
        whole = torch.empty(0, dtype=torch.uint8, device=self.device).set_(self)
        torch.ops.fakecuda.resize(whole, size)
        return self

    def resize_typed(self: torch.TypedStorage, size: int) -> torch.TypedStorage:
        resize_untyped(self.untyped(), size * self._element_size())
        return self

    torch.UntypedStorage.resize_ = resize_untyped
    torch.storage.TypedStorage.resize_ = resize_typed
