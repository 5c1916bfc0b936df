"""The device's library: where it is, whether it can be had, and its build.

One for each torch and each state of the sources, in build/fakecuda/ under the repository. Run as a
script, this file builds it, where it can be had.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "device"
BUILT = Path(__file__).resolve().parents[4] / "build" / "fakecuda"


def torch_folder() -> Path:
    """torch, which is not imported: the device must be there before it is."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("torch")
    return Path([*found.submodule_search_locations][0])


def why_not(torch: Path, *, devices: Path = Path("/dev"), compiler: str = "g++") -> str:
    """Why this device cannot be had; "" if it can."""
    if shutil.which(compiler) is None and not library_of(torch).exists():
        return f"{compiler} is missing: install a C++ compiler"
    return ""


def why_refused(torch: Path, *, devices: Path = Path("/dev")) -> str:
    """Why this device must not be used here: there is a real one. "" if it may."""
    real = [d.name for pattern in ("nvidia[0-9]*", "kfd") for d in sorted(devices.glob(pattern))]
    if real:
        return f"this machine has a GPU ({devices / real[0]}): run the tests with -m gpu on it"
    _, cuda = _version(torch)
    if cuda:
        return f"torch is built for {cuda}: the device needs a torch of the CPU alone"
    return ""


def library_of(torch: Path) -> Path:
    """The library for this torch and these sources, built or not."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return BUILT / f"torch-{_version(torch)[0]}-{digest.hexdigest()[:12]}" / "libfakecuda.so"


def built(torch: Path) -> Path:
    """The library, which is built first if it is not there. Several processes may ask at once."""
    library = library_of(torch)
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            print(f"building {library.parent.name} (once; half a minute)", file=sys.stderr)
            _compile(torch, library)
    return library


def _compile(torch: Path, library: Path) -> None:
    partial = library.with_suffix(f".{os.getpid()}")
    libraries = torch / "lib"
    command = ["g++", "-std=c++20", "-O1", "-w", "-fPIC", "-shared"]
    command += [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    command += [str(SOURCES / "fakecuda.cpp"), "-o", str(partial)]
    command += [f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{finished.stderr[-4000:]}")
    partial.rename(library)


def _version(torch: Path) -> tuple[str, str]:
    """torch's version, and the CUDA or ROCm it was built for, without importing it."""
    text = (torch / "version.py").read_text()
    version = re.search(r"^__version__ = '([^']*)'", text, re.M)
    built_for = re.findall(r"^(cuda|hip)\b[^=\n]*= '([^']*)'", text, re.M)
    return version[1] if version else "unknown", " ".join(" ".join(found) for found in built_for)


if __name__ == "__main__" and not (why_not(torch_folder()) or why_refused(torch_folder())):
    built(torch_folder())
