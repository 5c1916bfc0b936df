"""The packages whose kernels run layers that carry a state, and what transformers makes of them.

transformers looks for a kernel when it is imported, whatever the version of its package. Where it
finds none it computes in PyTorch, in silence, and arguments that a kernel does not know are left
out. So a package that is there must have the kernel, and all that the layers here ask of it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple

from packaging.version import InvalidVersion, Version

from titan_ulysses.distributed.errors import UserError, one_line


class KernelPackage(NamedTuple):
    """A function of a package that transformers takes where it is installed."""

    package: str
    """its name for pip"""
    module: str
    name: str
    least: str | None
    """the oldest version of the package that transformers calls usable (utils/import_utils.py)"""
    arguments: frozenset[str]
    """those that the layers here give by name, which transformers would leave out in silence"""


KERNELS = {
    "causal_conv1d_fn": KernelPackage(
        "causal-conv1d", "causal_conv1d", "causal_conv1d_fn", None, frozenset({"activation"})
    ),
    "torch_chunk_gated_delta_rule": KernelPackage(
        "flash-linear-attention",
        "fla.ops.gated_delta_rule",
        "chunk_gated_delta_rule",
        "0.2.2",
        frozenset({"g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"}),
    ),
    "mamba2_chunk_scan": KernelPackage(
        "mamba-ssm",
        "mamba_ssm.ops.triton.ssd_combined",
        "mamba_chunk_scan_combined",
        "2.0.4",
        frozenset(
            {"chunk_size", "D", "dt_bias", "dt_softplus", "initial_states", "dt_limit"}
            | {"return_final_states"}
        ),
    ),
}
"""By the names of the functions of transformers that choose between them and PyTorch."""


def is_installed(kernel: KernelPackage) -> bool:
    """Return whether the package of a kernel can be found, whatever its version."""
    return find_spec(kernel.module.split(".")[0]) is not None


def check_kernels(functions: Iterable[str]) -> None:
    """Raise UserError for a package that is installed and cannot run one of these functions."""
    for name in functions:
        kernel = KERNELS[name]
        if is_installed(kernel) and (reason := _unusable(kernel)) is not None:
            raise UserError(
                f"model: its recurrent layers would use {kernel.package}, which is installed here "
                f"but {reason}. Update it (pip install -U {kernel.package}), or uninstall it to "
                "compute in PyTorch, which is slow."
            )


def _unusable(kernel: KernelPackage) -> str | None:
    """Return what is wrong with the installed package of a kernel, or None."""
    with suppress(metadata.PackageNotFoundError, InvalidVersion):  # a folder of sources has none
        version = Version(metadata.version(kernel.package))
        if kernel.least is not None and version < Version(kernel.least):
            return f"is too old: version {version}, where {kernel.least} is needed"
    try:
        function = getattr(importlib.import_module(kernel.module), kernel.name, None)
    except Exception as error:  # a package's own code raises whatever it likes
        return f"cannot be imported ({type(error).__name__}: {one_line(error)})"
    if function is None:
        return f"is too old or too new: {kernel.module} has no {kernel.name}"
    if missing := sorted(kernel.arguments - inspect.signature(function).parameters.keys()):
        return f"is too old or too new: its {kernel.name} does not take {', '.join(missing)}"
    return None


def describe_kernels(functions: Iterable[str], device_type: str) -> str:
    """Return by which code these functions run, and what to install where it is slow."""
    kernels = [KERNELS[name] for name in functions]
    found = [kernel.package for kernel in kernels if is_installed(kernel)]
    missing = [kernel.package for kernel in kernels if not is_installed(kernel)]
    if device_type != "cuda":
        every = " and ".join(found + missing)
        return f"in PyTorch, which is slow (the kernels of {every} are for GPUs)"
    by = [f"by the kernels of {' and '.join(found)}"] if found else []
    if missing:
        packages, all_missing = " ".join(missing), " and ".join(missing)
        by.append(f"in PyTorch, which is slow, without {all_missing} (pip install {packages})")
    return ", and ".join(by)
