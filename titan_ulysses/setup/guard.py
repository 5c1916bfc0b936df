"""Guard a sharded model against forwards, backwards and steps interrupted or out of order.

A user's own training loop may call forward, backward and step in any order, leave one out, and go
on after an exception. FSDP2 keeps state between these calls: which parameters are gathered, and
whether a backward has begun. This module clears the part of that state that would be wrong later.
Wrong gradients cannot be repaired, so using them is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.optim.optimizer import register_optimizer_step_pre_hook

from titan_ulysses.distributed.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
    from transformers import PreTrainedModel

_guards: WeakSet[Guard] = WeakSet()
"""The guards of all sharded models.

torch's step hook is global and runs for every optimizer. `_before_step` ignores optimizers that
hold no parameter of a guarded model.
"""


def guard(model: PreTrainedModel) -> None:
    """Watch the forwards and backwards of a model sharded by FSDP, and the steps of its optimizers.

    After this call an exception in forward leaves no parameter gathered, so the caller may go on.
    A forward or an optimizer step raises UserError while the parameters have gradients of an
    interrupted backward. A backward raises UserError if an optimizer has stepped since its forward.
    The error is raised only on the rank that makes the call.
    """
    _watch_optimizers()
    _guards.add(Guard(model))  # the model's hook keeps it as long as the model


class Guard:
    """The guard of one sharded model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.steps = 0
        """Number of steps of optimizers that hold parameters of the model."""
        self.incomplete = False
        """Whether the gradients may come from a backward that was interrupted."""
        # Runs before FSDP's own hook, which would take leftover state for a part of this forward.
        model.register_forward_pre_hook(self._before_forward, prepend=True)
        model.forward = partial(self._forward, model.forward)

    def refuse_incomplete_gradients(self) -> None:
        """Raise UserError if a backward was interrupted and its gradients are still there."""
        if _in_backward():
            return  # an optimizer that steps inside backward, as soon as a gradient is complete
        root = self.model._get_fsdp_state()
        # FSDP sets this flag when backward begins, and a complete backward clears it at its end.
        if root._state_ctx.post_backward_final_callback_queued:
            self.reset()
            self.incomplete = True
        if self.incomplete and any(p.sharded_param.grad is not None for p in self.parameters()):
            raise UserError(
                "model: the last backward was broken off by an exception, and the gradients that "
                "are there are only a part. Call optimizer.zero_grad() on every rank before the "
                "next forward or optimizer.step()."
            )
        self.incomplete = False

    def reset(self) -> None:
        """Shard all parameters and clear the state of an interrupted forward or backward.

        The gradients that it has computed but not reduced are dropped.
        """
        root = self.model._get_fsdp_state()
        if hasattr(self.model, "reset_iter_state"):  # torch 2.13
            # From torch 2.15 on it drops the reduced gradients too, also those of other backwards.
            reduced = [(p.sharded_param, p.sharded_param.grad) for p in self.parameters()]
            self.model.reset_iter_state()
            for parameter, gradient in reduced:
                parameter.grad = gradient
        else:
            # Older versions lack that method.
            root._state_ctx.iter_forward_root = None
            root._state_ctx.post_backward_final_callback_queued = False
            root._comm_ctx.all_gather_state = None
            root._comm_ctx.post_forward_order.clear()
            for state in self.states():
                state._training_state = TrainingState.IDLE
                state._modules_to_run_forward.clear()
                for group in _groups(state):
                    group._training_state = TrainingState.IDLE
                    group.finalize_backward()  # waits for reductions under way
                    group._partial_reduce_output = None
                    group.reshard()
        for parameter in self.parameters():
            with suppress(AttributeError):  # since torch 2.15 it is the gradient below
                parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None

    def states(self) -> Iterator[FSDPState]:
        modules = (module for module in self.model.modules() if isinstance(module, FSDPModule))
        # Modules with tied parameters share one state.
        yield from dict.fromkeys(module._get_fsdp_state() for module in modules)

    def parameters(self) -> Iterator[FSDPParam]:
        """Yield FSDP's parameter objects.

        They hold the sharded parameter even while the model's attribute is the gathered one.
        """
        for state in self.states():
            for group in _groups(state):
                yield from group.fsdp_params

    def _before_forward(self, *_) -> None:
        if _in_backward():
            return
        self.refuse_incomplete_gradients()
        if self.model._get_fsdp_state()._training_state != TrainingState.IDLE:
            self.reset()  # the last forward was interrupted in a hook, before `_forward` ran

    def _forward(self, forward: Callable[..., Any], *args, **inputs) -> Any:
        try:
            output = forward(*args, **inputs)
        except BaseException:  # also Ctrl-C, after which the caller may go on
            self.reset()
            raise
        for result in output.values():
            if result.requires_grad:
                result.register_hook(partial(self._before_backward, self.steps))
        return output

    def _before_backward(self, steps_at_forward: int, gradient: Tensor) -> None:
        if self.steps != steps_at_forward:
            raise UserError(
                "model: an optimizer has stepped between this forward and its backward, whose "
                "gradients would be of neither the old parameters nor the new. Call backward "
                "before optimizer.step(), or forward again."
            )


@cache
def _watch_optimizers() -> None:
    """Register the step hook, once per process."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, *_) -> None:
    stepping = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for its_guard in _guards:
        if any(id(parameter.sharded_param) in stepping for parameter in its_guard.parameters()):
            its_guard.refuse_incomplete_gradients()
            its_guard.steps += 1


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _groups(state: FSDPState) -> list[FSDPParamGroup]:
    """Return the parameter groups of state; before torch 2.12 there is at most one."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [
        g for g in (groups if groups is not None else [state._fsdp_param_group]) if g is not None
    ]
