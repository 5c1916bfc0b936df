"""What FSDP2 keeps between calls. All uses of its private parts are here.

It has no public way to ask whether a backward was broken off, to clear what one has left behind
before torch 2.13, or to compute blocks again outside a forward of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState


def parameters(model: nn.Module) -> Iterator[FSDPParam]:
    """Yield FSDP's objects for the parameters of a model.

    They hold the sharded parameter even while the model's attribute is the gathered one.
    """
    for state in _states(model):
        for group in _groups(state):
            yield from group.fsdp_params


def is_idle(model: FSDPModule) -> bool:
    """Return whether no forward of a sharded model, nor a backward, is under way at its root."""
    return model._get_fsdp_state()._training_state == TrainingState.IDLE


def is_in_backward(model: FSDPModule) -> bool:
    """Return whether a backward of a sharded model has begun and not ended."""
    # FSDP sets this flag when backward begins, and a complete backward clears it at its end.
    return model._get_fsdp_state()._state_ctx.post_backward_final_callback_queued


def set_forward_root(module: FSDPModule, *, is_root: bool) -> None:
    """Tell FSDP that a module is the root of a forward that has begun, or that there is none."""
    state = module._get_fsdp_state()
    state._state_ctx.iter_forward_root = state if is_root else None


def reset(model: FSDPModule) -> None:
    """Shard all parameters and clear the state of an interrupted forward or backward.

    The gradients that it has computed but not reduced are dropped.
    """
    root = model._get_fsdp_state()
    if hasattr(model, "reset_iter_state"):  # torch 2.13
        # From torch 2.15 on it drops the reduced gradients too, also those of other backwards.
        reduced = [(p.sharded_param, p.sharded_param.grad) for p in parameters(model)]
        model.reset_iter_state()
        for parameter, gradient in reduced:
            parameter.grad = gradient
    else:
        root._state_ctx.iter_forward_root = None
        root._state_ctx.post_backward_final_callback_queued = False
        root._comm_ctx.all_gather_state = None
        root._comm_ctx.post_forward_order.clear()
        for state in _states(model):
            state._training_state = TrainingState.IDLE
            state._modules_to_run_forward.clear()
            for group in _groups(state):
                group._training_state = TrainingState.IDLE
                group.finalize_backward()  # waits for reductions under way
                group._partial_reduce_output = None
                group.reshard()
    for parameter in parameters(model):
        with suppress(AttributeError):  # since torch 2.15 it is the gradient below
            parameter.unsharded_accumulated_grad = None
        if hasattr(parameter, "_unsharded_param"):
            parameter._unsharded_param.grad = None


def _states(model: nn.Module) -> Iterator[FSDPState]:
    modules = (module for module in model.modules() if isinstance(module, FSDPModule))
    # Modules with tied parameters share one state.
    yield from dict.fromkeys(module._get_fsdp_state() for module in modules)


def _groups(state: FSDPState) -> list[FSDPParamGroup]:
    """Return the parameter groups of state; before torch 2.12 there is at most one."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [
        g for g in (groups if groups is not None else [state._fsdp_param_group]) if g is not None
    ]
