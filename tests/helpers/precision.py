"""Keeps in fp64 what transformers computes in fp32, to compare at 1e-12."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.training import Record
from titan_ulysses.model import nf4

_NAME_A_DTYPE: list[tuple[Any, tuple[str, ...]]] = [
    (Tensor, ("to", "type", "softmax", "log_softmax", "sum", "mean", "cumsum")),
    (torch, ("zeros", "zeros_like", "ones_like", "empty_like", "softmax", "sum", "cumsum")),
    (F, ("softmax", "log_softmax")),
]


@contextmanager
def keep_fp64() -> Iterator[None]:
    """In it what transformers would compute in fp32 out of fp64 tensors stays in fp64.

    Norms, routers, their loss and eager softmax name fp32, so that fp64 parity ends where a last
    bit of fp64 becomes one of fp32. A mode of torch functions would do it for all of them, but
    takes a third of a test's time.
    """
    with torch.device("meta"):
        torch.empty(())  # torch notes its constructors, once: those that are not patched
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in _NAME_A_DTYPE:
            for name in names:
                patch.setattr(owner, name, _kept(getattr(owner, name)))
        to_float = Tensor.float
        patch.setattr(Tensor, "float", lambda x: x if x.dtype is torch.float64 else to_float(x))
        patch.setattr(nf4, "_quantize_rows", partial(_with_float, to_float, nf4._quantize_rows))
        yield


def _with_float(to_float: Any, quantize: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """What is stored in bytes is made of fp32 numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", to_float)
        return quantize(rows)


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def kept(*args: Any, **kwargs: Any) -> Any:
        if not (args and isinstance(args[0], Tensor)) or args[0].dtype is torch.float64:
            args = tuple([torch.float64 if x is torch.float32 else x for x in args])
            for key, value in kwargs.items():
                if value is torch.float32:
                    kwargs[key] = torch.float64
        return function(*args, **kwargs)

    return kept


def kept_in_fp64(train: Callable[..., Record], *args, **kwargs) -> Record:
    """train(*args, **kwargs) under `keep_fp64`."""
    with keep_fp64():
        return train(*args, **kwargs)
