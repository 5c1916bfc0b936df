"""A device of type `cuda` on a torch that was built for the CPU: see tests/cuda/README.md.

load()     before torch is imported: at::detail::getCUDAHooks() looks for CUDA once
start()    torch calls it at the end of `import torch`, by its entry point "torch.backends"
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SITE = Path(__file__).resolve().parents[1]
REPOSITORY = SITE.parents[2]
_library: ctypes.CDLL | None = None


def load() -> None:
    """Load the device, built first if need be, into a process that has not imported torch."""
    global _library
    if _library is not None:
        return
    from fakecuda.build import built, torch_folder, why_refused

    torch = torch_folder()
    if refused := why_refused(torch):
        raise RuntimeError(f"fakecuda: {refused}")
    if "torch" in sys.modules:
        raise RuntimeError("fakecuda: torch is imported already, and has looked for CUDA")
    library = built(torch)
    ctypes.CDLL(str(torch / "lib" / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    _library = ctypes.CDLL(str(library))


def start() -> None:
    """Put in what torch.cuda and torch.distributed lack in a build for the CPU."""
    if _library is None:
        return
    from fakecuda import collectives, flash, torch_cuda

    torch_cuda.put_in(_library)
    collectives.put_in()
    flash.put_in()


def environment() -> dict[str, str]:
    """What a process needs for this device; it may replace PYTHONPATH if it keeps this folder."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    path = [str(SITE), *(other for other in others if other != str(SITE))]
    return {"FAKECUDA": "1", "PYTHONPATH": os.pathsep.join(path)}


def read_settings() -> None:
    """Read the environment again: it has changed, or this is a fork with another one."""
    import torch

    if _library is None:
        return
    _library.fakecuda_read_settings()
    torch.cuda._cached_device_count = None


@contextmanager
def setting(**values: object) -> Iterator[None]:
    """With FAKECUDA_<NAME> = value, for a while: setting(copies="random", seed=3)."""
    names = {f"FAKECUDA_{name.upper()}": str(value) for name, value in values.items()}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    read_settings()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        read_settings()


def counts() -> dict[str, int]:
    """How many kernels, late copies, races and waits of the host this process has seen."""
    import torch

    names = ("kernels", "late_copies", "races", "host_waits")
    return dict(zip(names, torch.ops.fakecuda.counts(), strict=True))


def races() -> list[str]:
    """Uses of the same memory that no event orders, since the last call."""
    import torch

    return [*torch.ops.fakecuda.races()]


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """Where the host waits for the device, and how often: "file:line function (why)" of the
    package's own code.
    """
    found: Counter[str] = Counter()
    call_type = ctypes.CFUNCTYPE(None, ctypes.c_char_p)

    def note(why: bytes) -> None:
        found[f"{_caller()} ({why.decode()})"] += 1

    assert _library is not None
    call = call_type(note)
    _library.fakecuda_on_host_wait(call)
    try:
        yield found
    finally:
        _library.fakecuda_on_host_wait(ctypes.cast(None, call_type))


def _caller() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(REPOSITORY / "titan_ulysses"):
            return f"{path.relative_to(REPOSITORY)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of the package"
