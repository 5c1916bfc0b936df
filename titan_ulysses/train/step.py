"""One optimizer step: forward and backward over its batches, clipping, the optimizer; and the
learning rate it has.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from titan_ulysses.config.schema import Config
from titan_ulysses.data.loader import Batch
from titan_ulysses.distributed.failure import first_failure
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX
from titan_ulysses.distributed.tensors import plain_pieces
from titan_ulysses.memory.tiling import tiles
from titan_ulysses.model.hf import named_parameters

_NORM_PART = 2**20
"""Numbers of a gradient copied to fp64 at once, 8 MiB: on a CPU larger copies are slower."""


class StepMetrics(NamedTuple):
    """What one optimizer step showed, the same on every rank."""

    loss: Tensor
    grad_norm: Tensor
    """before clipping"""
    router_loss: Tensor | None
    """mean over the batches, without its coefficient; None for a model without one"""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    mesh: Mesh,
    *,
    max_norm: float,
) -> StepMetrics:
    """One optimizer step over the batches that make it up; nothing here waits for the device."""
    num_items = torch.stack([(batch.labels != IGNORE_INDEX).sum() for batch in batches]).sum()
    dist.all_reduce(num_items, group=mesh.loss.get_group())
    total, router_loss = torch.zeros(2, dtype=torch.float64, device=num_items.device).unbind()
    for batch in batches:
        output = model(**vars(batch), num_items_in_batch=num_items)
        output.loss.backward()
        total += output.loss.detach()
        if has_router_loss := "aux_loss" in output:
            router_loss += output.aux_loss.detach() / len(batches)
        if batch is not batches[-1]:
            _upcast_grads_to_fp32(model)
    grad_norm = clip_gradients(list(model.parameters()), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return StepMetrics(total, grad_norm, router_loss if has_router_loss else None)


def _upcast_grads_to_fp32(model: nn.Module) -> None:
    """Let what follows be added in fp32: gradients are stored in the dtype of parameters, which may
    be bf16.
    """
    for p in model.parameters():
        if p.grad is not None and p.grad.dtype != _wide(p.grad):
            p.grad_dtype = None  # any
            p.grad = p.grad.to(_wide(p.grad))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a norm of at most max_norm (0: leave them).

    Returns the norm before, see `gradient_norm`.
    """
    norm = gradient_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


@torch.no_grad()
def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients as one vector, with the shards of all ranks.

    A scalar, the same on every rank, in the widest dtype of the gradients, fp32 at least. Squares
    are added up in fp64: in fp32 the sum of 135M of them comes out too small, by 1e-4 or more, and
    by another amount on every mesh. Collective: one all-reduce.
    """
    norms: dict[tuple[DeviceMesh | None, tuple[Placement, ...]], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            norms[gradient.device_mesh, gradient.placements] += _norms(gradient.to_local())
        else:
            norms[None, ()] += _norms(gradient)
    squares = []
    for (mesh, placements), parts in norms.items():
        squares.append(torch.stack(parts).square().sum())
        for dim, placement in enumerate(placements):
            if not placement.is_replicate():  # replicas have the same gradient: it counts once
                dist.all_reduce(squares[-1], group=mesh.get_group(dim))
    total = sum(squares, start=torch.zeros((), dtype=torch.float64))
    return total.sqrt().to(reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32))


def _norms(gradient: Tensor) -> list[Tensor]:
    """Norms in fp64 of its parts, each short enough for a copy in fp64."""
    flat = gradient.flatten()
    parts = tiles(max(1, flat.numel()), _NORM_PART)  # one at least, also of a shard without numbers
    return [torch.linalg.vector_norm(flat[part].double()) for part in parts]


def parameter_not_finite(model: nn.Module) -> str | None:
    """Collective. The name of a trained parameter with a NaN or an infinity, the same on every
    rank; None: all are finite.

    Waits for the device, and reads every shard once. The optimizer's moments need no look of their
    own: what is NaN in them is NaN in their parameter after the same step.
    """
    trained = [(name, p) for name, p in named_parameters(model) if p.requires_grad]
    pieces = [(name, x) for name, p in trained for x in plain_pieces(p) if x.numel()]
    finite = [torch.linalg.vector_norm(x, math.inf).isfinite() for _, x in pieces]
    found = torch.stack(finite).tolist() if finite else []
    bad = (name for (name, _), is_finite in zip(pieces, found, strict=True) if not is_finite)
    return first_failure(next(bad, None))


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of the step-th step, counted from 0: linear warmup, then decay to
    min_lr_ratio at the last.
    """
    schedule, peak = config.lr_scheduler, config.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / max(
        1, config.training.steps - 1 - schedule.warmup_steps
    )
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
        schedule.decay_type
    ]
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * shape)
