"""Guard a sharded model against forwards, backwards and steps interrupted or out of order.

A user's own training loop may call forward, backward and step in any order, leave one out, and go
on after an exception. FSDP2 keeps state between these calls: which parameters are gathered, and
whether a backward has begun. This module clears the part of that state that would be wrong later.
Wrong gradients cannot be repaired, so using them is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel

from titan_ulysses.distributed import fsdp
from titan_ulysses.distributed.errors import UserError

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
        if fsdp.is_in_backward(self.model):
            fsdp.reset(self.model)
            self.incomplete = True
        parameters = fsdp.parameters(self.model)
        if self.incomplete and any(p.sharded_param.grad is not None for p in parameters):
            raise UserError(
                "model: the last backward was interrupted by an exception, so the gradients are "
                "incomplete. Call optimizer.zero_grad() on every rank before the next forward or "
                "optimizer.step()."
            )
        self.incomplete = False

    def _before_forward(self, *_) -> None:
        if _in_backward():
            return
        self.refuse_incomplete_gradients()
        # The last forward may have been interrupted in a hook, before `_forward` ran.
        if not fsdp.is_idle(self.model):
            fsdp.reset(self.model)

    def _forward(self, forward: Callable[..., Any], *args, **inputs) -> Any:
        try:
            output = forward(*args, **inputs)
        except BaseException:  # also Ctrl-C, after which the caller may go on
            fsdp.reset(self.model)
            raise
        for result in output.values():
            if result.requires_grad:
                result.register_hook(partial(self._before_backward, self.steps))
        return output

    def _before_backward(self, steps_at_forward: int, gradient: Tensor) -> None:
        if self.steps != steps_at_forward:
            raise UserError(
                "model: an optimizer stepped between this forward and its backward, so the "
                "gradients would belong to neither the old parameters nor the new ones. Call "
                "backward before optimizer.step(), or run forward again."
            )


@cache
def _watch_optimizers() -> None:
    """Register the step hook, once per process."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, *_) -> None:
    stepping = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for its_guard in _guards:
        if any(id(p.sharded_param) in stepping for p in fsdp.parameters(its_guard.model)):
            its_guard.refuse_incomplete_gradients()
            its_guard.steps += 1


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
