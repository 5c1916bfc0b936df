"""What a sharded model does after a forward, backward or step that was broken off, left out or out
of order.

A loop of one's own may call them in any order, and go on after an exception. FSDP2 keeps state
between them: which parameters are gathered, and whether a backward has begun. What of it would be
wrong later is cleared here; gradients that are not what they should be are refused, because nothing
can make them right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
"""Of all sharded models: torch can only tell of every optimizer's steps. Those of other models are
nobody's here.
"""


def guard(model: PreTrainedModel) -> None:
    """Watch the forwards of a model that FSDP has sharded, the backwards of their results, and its
    optimizer's steps.

    From then on an exception in forward leaves no parameter gathered, so that the caller may go on.
    UserError, on the rank that does it: from a forward or an optimizer's step while gradients are
    there of a backward that was broken off; from a backward whose forward was before the last step.
    """
    _watch_optimizers()
    model.fsdp_guard = Guard(model)
    _guards.add(model.fsdp_guard)


class Guard:
    """Follows one sharded model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.steps = 0
        """of optimizers that have parameters of the model"""
        self.incomplete = False
        """Whether the gradients that are there may be of a backward that was broken off."""
        # Ahead of FSDP's own hook, which would take what is left for a part of this forward.
        model.register_forward_pre_hook(self._before_forward, prepend=True)
        model.forward = partial(self._forward, model.forward)

    def expect_whole_gradients(self) -> None:
        """UserError where a backward was broken off, until its gradients are gone."""
        if _in_backward():
            return  # an optimizer that steps as soon as a gradient is there
        root = self.model._get_fsdp_state()
        # Its last act would have been to take this back.
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
        """Shard all parameters and forget the forward or backward that was broken off, with what it
        has computed.
        """
        root = self.model._get_fsdp_state()
        if hasattr(self.model, "reset_iter_state"):  # torch 2.13
            self.model.reset_iter_state()
        else:
            root._state_ctx.iter_forward_root = None
            root._state_ctx.post_backward_final_callback_queued = False
            root._comm_ctx.all_gather_state = None
            root._comm_ctx.post_forward_order.clear()
            for state in self.states():
                state._training_state = TrainingState.IDLE
                state._modules_to_run_forward.clear()
                for group in _groups(state):
                    group._training_state = TrainingState.IDLE
                    group.finalize_backward()  # waits for what is under way
                    group._partial_reduce_output = None
                    group.reshard()
        for parameter in self.parameters():
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None

    def states(self) -> Iterator[FSDPState]:
        modules = (module for module in self.model.modules() if isinstance(module, FSDPModule))
        # Two tied modules share one.
        yield from dict.fromkeys(module._get_fsdp_state() for module in modules)

    def parameters(self) -> Iterator[FSDPParam]:
        """FSDP's, which know the sharded parameter also while the model shows the gathered one."""
        for state in self.states():
            for group in _groups(state):
                yield from group.fsdp_params

    def _before_forward(self, *_) -> None:
        if _in_backward():
            return
        self.expect_whole_gradients()
        if self.model._get_fsdp_state()._training_state != TrainingState.IDLE:
            self.reset()  # broken off before it came to `_forward`

    def _forward(self, forward: Callable[..., Any], *args, **inputs) -> Any:
        try:
            output = forward(*args, **inputs)
        except BaseException:  # Ctrl-C too: the caller may go on
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
    """Once a process."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, *_) -> None:
    stepping = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for its_guard in _guards:
        if any(id(parameter.sharded_param) in stepping for parameter in its_guard.parameters()):
            its_guard.expect_whole_gradients()
            its_guard.steps += 1


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _groups(state: FSDPState) -> list[FSDPParamGroup]:
    """One of each state in torch before 2.12."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [
        g for g in (groups if groups is not None else [state._fsdp_param_group]) if g is not None
    ]
