"""Collectives of CUDA tensors: gloo's, on the same memory. The backend "nccl" is gloo."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

_OPERATORS = (
    "allreduce_",
    "allreduce_coalesced_",
    "allgather_",
    "_allgather_base_",
    "allgather_into_tensor_coalesced_",
    "allgather_coalesced_",
    "reduce_scatter_",
    "_reduce_scatter_base_",
    "reduce_scatter_tensor_coalesced_",
    "alltoall_base_",
    "alltoall_",
    "broadcast_",
    "reduce_",
    "gather_",
    "scatter_",
    "send",
    "recv_",
    "barrier",
)
_library: torch.library.Library | None = None


def put_in() -> None:
    global _library
    if not dist.is_available():
        return
    _library = torch.library.Library("c10d", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it replaces kernels that hand CUDA tensors to the backend
        for name in _OPERATORS:
            _library.impl(name, _collective(name), "CUDA", allow_override=True)
    dist.init_process_group = dist.distributed_c10d.init_process_group = _with_gloo(
        dist.init_process_group, at=0
    )
    dist.new_group = dist.distributed_c10d.new_group = _with_gloo(dist.new_group, at=2)


def _collective(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.c10d, name).default

    def run(*arguments: Any) -> Any:
        originals: dict[int, torch.Tensor] = {}

        def lower(t: torch.Tensor) -> torch.Tensor:
            if not t.is_cuda:
                return t
            alias = torch.ops.fakecuda.alias(t.detach(), True, name)
            originals[alias.data_ptr()] = t
            return alias

        returned = operator(*tree_map_only(torch.Tensor, lower, arguments))
        return tree_map_only(
            torch.Tensor, lambda alias: originals.get(alias.data_ptr(), alias), returned
        )

    return run


def _with_gloo(function: Callable[..., Any], *, at: int) -> Callable[..., Any]:
    """The function, whose argument `backend` is at this place, with gloo where it asks for NCCL."""

    def gloo(backend: Any) -> Any:
        if at == 0 and backend is None or "nccl" in str(backend):
            return "cpu:gloo,cuda:gloo"
        return backend

    def run(*arguments: Any, device_id: Any = None, **keywords: Any) -> Any:
        if len(arguments) > at:
            arguments = (*arguments[:at], gloo(arguments[at]), *arguments[at + 1 :])
        else:
            keywords["backend"] = gloo(keywords.get("backend"))
        return function(*arguments, **keywords)

    return run
