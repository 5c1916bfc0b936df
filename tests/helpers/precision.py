"""Keeps in fp64 what transformers computes in fp32, to compare at 1e-12."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from helpers.training import Record

_WITH_ONE_ARGUMENT = {Tensor.backward, Tensor.float, torch.zeros}
_STAYS_IN_FP64 = {"starcoder2"}
"""What needs no such help: models without a step in fp32."""


class KeepFp64(TorchFunctionMode):
    """Under it what transformers would compute in fp32 out of fp64 tensors stays in fp64.

    Norms, routers, their loss and eager softmax name fp32, so that fp64 parity ends where a last
    bit of fp64 becomes one of fp32. What backward computes again is kept too.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if len(args) == 1 and not kwargs and func not in _WITH_ONE_ARGUMENT:
            return func(*args)  # nothing names a dtype: most calls, as those for a shape
        if func is Tensor.backward:
            loss = args[0]
            # No mode is in force in here, nor would one be where backward computes a checkpoint
            # again. Past the public functions, which would come here once more.
            with self:
                run = torch.autograd.graph._engine_run_backward
                run(
                    (loss,),
                    (torch.ones_like(loss),),
                    False,
                    False,
                    (),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
            return None
        if func is torch.autograd.grad:  # in a backward that differentiates what it computed again
            outputs, inputs = (x if isinstance(x, tuple | list) else (x,) for x in args)
            upstream = kwargs["grad_outputs"]
            with self:
                return torch.autograd.graph._engine_run_backward(
                    tuple(outputs),
                    tuple(upstream) if isinstance(upstream, tuple | list) else (upstream,),
                    False,
                    False,
                    tuple(inputs),
                    kwargs["allow_unused"],
                    accumulate_grad=False,
                )
        if (
            func is torch.zeros
            or args
            and isinstance(args[0], Tensor)
            and args[0].dtype == torch.float64
        ):
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in kwargs.items()}
        return func(*args, **kwargs)


def kept_in_fp64(train: Callable[..., Record], *args, **kwargs) -> Record:
    """train(*args, **kwargs) under `KeepFp64`; but that takes time, so not where the model, a table
    among args, stays in fp64 by itself.
    """
    model = next((x for x in args if isinstance(x, dict) and "model_type" in x), {})
    with nullcontext() if model.get("model_type") in _STAYS_IN_FP64 else KeepFp64():
        return train(*args, **kwargs)
