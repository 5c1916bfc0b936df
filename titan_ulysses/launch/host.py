"""This host: its cores, and its GPUs as torch sees them, with what is wrong where it sees none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import torch

from titan_ulysses.distributed.errors import UserError, one_line


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> int:
    """Return how many GPUs a process of this host can use; 0 means that it runs on the CPU.

    CUDA itself counts them, so CUDA_VISIBLE_DEVICES is obeyed, and of MIG slices a process has one,
    however many nvidia-smi lists. UserError if the host has GPUs that torch cannot use, unless
    CUDA_VISIBLE_DEVICES hides them: training on the CPU would not be what its user wants.
    """
    if torch.cuda.is_available():
        # torch.cuda.device_count asks NVML as long as CUDA is not in use, which counts whole GPUs.
        return torch._C._cuda_getDeviceCount()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = chosen is not None and not re.match(r"\d|GPU-|MIG-", chosen)
    gpus = 0 if hidden else len(re.findall(r"^GPU \d", _nvidia_smi("--list-gpus"), re.M))
    if gpus:
        raise UserError(
            f"nvidia-smi sees {gpus} GPU{'s' * (gpus > 1)}, but torch {torch.__version__} can use "
            f"none: {_why_not(chosen)}"
        )
    return 0


def _why_not(chosen: str | None) -> str:
    """Return why torch sees no GPU, and what helps."""
    anyway = "To train on the CPU all the same, set CUDA_VISIBLE_DEVICES to nothing."
    # Of the table at the top: "Driver Version: 535.104.05   CUDA Version: 12.2".
    driver = re.search(r"CUDA\D*Version: *((\d+)\.\d+)", _nvidia_smi())
    newest, major = driver.groups() if driver else ("of its driver", "of its driver")
    wheel = (
        f"Install a torch wheel for CUDA {major}, whose version ends in +cu{major} and a digit"
        if driver
        else "Install a torch wheel for the CUDA version of the driver"
    )
    if torch.version.cuda is None:
        return f"it was built without CUDA. {wheel}. {anyway}"
    if driver and int(torch.version.cuda.split(".")[0]) > int(major):
        return (
            f"it was built for CUDA {torch.version.cuda}, and the driver knows CUDA up to {newest}."
            f" {wheel}, or update the driver. {anyway}"
        )
    if chosen is not None:
        return f"CUDA_VISIBLE_DEVICES = {chosen} names none of them. Change it, or unset it."
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{one_line(error)}. Repair the driver, or reboot. {anyway}"
    return f"CUDA counts none. {anyway}"


def _nvidia_smi(*arguments: str) -> str:
    """Return what nvidia-smi prints, or nothing if it is not there or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
