"""One optimizer step over its micro-batches, and its learning rate.

A step runs forward and backward for each micro-batch, clips the gradients, and runs the optimizer.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
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
from titan_ulysses.distributed.device import module_of
from titan_ulysses.distributed.errors import first_failure
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.tensors import plain_pieces
from titan_ulysses.memory.tiling import tiles
from titan_ulysses.model.hf import named_parameters
from titan_ulysses.train.loss import CrossEntropy

_NORM_PART = 2**20
"""Elements of a gradient that are copied to fp64 at once (8 MiB).

Larger copies are slower on a CPU.
"""


class StepMetrics(NamedTuple):
    """The metrics of one optimizer step, the same on every rank."""

    loss: Tensor
    grad_norm: Tensor
    """The norm before clipping."""
    router_loss: Tensor | None
    """The mean over the batches, without its coefficient; None for a model without router loss."""
    parts: Parts
    """This rank's own, to find out where a number came from that is not finite."""
    rows: list[Tensor] = []  # noqa: RUF012  a default that nobody changes
    """for each micro-batch [2, B] fp64: this rank's part of the losses of its rows, summed, and of
    their number; empty if the loss does not know them
    """
    metrics: dict[str, Tensor] = {}  # noqa: RUF012
    """other metrics, of all ranks, by name"""

    @property
    def is_finite(self) -> Tensor:
        """Whether loss and gradient norm are, as a bool tensor on the loss's device."""
        return self.loss.isfinite() & self.grad_norm.isfinite().to(self.loss.device)


class Parts(NamedTuple):
    """What this rank has added to the loss and the gradient norm of a step."""

    losses: Tensor
    """[batches] fp64: this rank's part of each micro-batch's loss"""
    norms: Tensor
    """[pieces] fp64: the norms of the pieces of its gradients, see `gradient_norm`"""
    owners: list[int]
    """for each piece, the index of its parameter among those with a gradient"""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    mesh: Mesh,
    *,
    max_norm: float,
    skip_nonfinite: bool = False,
    loss: CrossEntropy | None = None,
) -> StepMetrics:
    """Run one optimizer step over the batches that make it up, without waiting for the device.

    loss: that of the run; None: cross-entropy.

    skip_nonfinite: leave parameters and optimizer state as they are if loss or gradient norm are
    not finite. That is decided on the device, and alike on all ranks, which have the same loss and
    norm. AdamW here and in torch takes it as `found_inf`, as from a gradient scaler.
    """
    loss = loss or CrossEntropy(model, mesh)
    # The labels (or pairs) of the whole step: each loss is divided by their number.
    count = loss.count(batches)
    total, router_loss = torch.zeros(2, dtype=torch.float64, device=count.device).unbind()
    own_losses, metrics = [], Counter[str]()
    rows: list[Tensor] = []
    for batch in batches:
        part = loss(batch, count)
        part.loss.backward()
        total += part.loss.detach()
        own_losses.append(model.sharding.own_loss)
        rows += [] if part.rows is None else [part.rows]
        metrics.update(part.metrics)
        if has_router_loss := part.router_loss is not None:
            router_loss += part.router_loss.detach() / len(batches)
        if batch is not batches[-1]:
            _upcast_grads_to_fp32(model)
    pieces: list[tuple[list[int], Tensor]] = []
    grad_norm = clip_gradients(list(model.parameters()), max_norm, pieces=pieces)
    parts = Parts(
        torch.stack(own_losses),
        torch.cat([norms for _, norms in pieces]),
        [owner for owners, _ in pieces for owner in owners],
    )
    aux_loss = router_loss if has_router_loss else None
    shown = StepMetrics(total, grad_norm, aux_loss, parts, rows, dict(metrics))
    if skip_nonfinite:
        optimizer.found_inf = (~shown.is_finite).float()
    optimizer.step()
    optimizer.zero_grad()
    return shown


def _upcast_grads_to_fp32(model: nn.Module) -> None:
    """Store gradients in fp32 (or wider), so that those of later batches are added in fp32.

    Gradients otherwise have the dtype of the parameters, which may be bf16.
    """
    for p in model.parameters():
        if p.grad is not None and p.grad.dtype != _wide(p.grad):
            p.grad_dtype = None  # any dtype is allowed
            p.grad = p.grad.to(_wide(p.grad))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def clip_gradients(
    parameters: list[nn.Parameter],
    max_norm: float,
    *,
    pieces: list[tuple[list[int], Tensor]] | None = None,
) -> Tensor:
    """Scale the gradients to a norm of at most max_norm (0: do not scale).

    Returns the norm before scaling, see `gradient_norm`.
    """
    norm = gradient_norm([p.grad for p in parameters if p.grad is not None], pieces=pieces)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


@torch.no_grad()
def gradient_norm(
    gradients: list[Tensor], *, pieces: list[tuple[list[int], Tensor]] | None = None
) -> Tensor:
    """Return the 2-norm of all gradients as one vector, over the shards of all ranks.

    The result is a scalar, the same on every rank, in the widest dtype of the gradients, and at
    least fp32. Squares are added up in fp64: in fp32 the sum of 135M of them is too small by 1e-4
    or more, and by another amount on every mesh. Collective: one all-reduce for gradients that are
    sharded alike. pieces: a list that gets, for each of these, the norms of the pieces of this
    rank's shards, and for each piece the index of its gradient.
    """
    norms: dict[tuple[DeviceMesh | None, tuple[Placement, ...]], list[Tensor]] = defaultdict(list)
    owners: dict[tuple[DeviceMesh | None, tuple[Placement, ...]], list[int]] = defaultdict(list)
    for index, gradient in enumerate(gradients):
        is_sharded = isinstance(gradient, DTensor)
        key = (gradient.device_mesh, gradient.placements) if is_sharded else (None, ())
        found = _norms(gradient.to_local() if is_sharded else gradient)
        norms[key] += found
        owners[key] += [index] * len(found)
    squares = []
    for (mesh, placements), parts in norms.items():
        stacked = torch.stack(parts)
        if pieces is not None:
            pieces.append((owners[mesh, placements], stacked))
        squares.append(stacked.square().sum())
        for dim, placement in enumerate(placements):
            if not placement.is_replicate():  # replicas have the same gradient: it counts once
                dist.all_reduce(squares[-1], group=mesh.get_group(dim))
    total = sum(squares, start=torch.zeros((), dtype=torch.float64))
    return total.sqrt().to(reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32))


def _norms(gradient: Tensor) -> list[Tensor]:
    """Return the fp64 norms of parts of a gradient, each short enough to be copied to fp64."""
    flat = gradient.flatten()
    parts = tiles(max(1, flat.numel()), _NORM_PART)  # at least one, also for an empty shard
    return [torch.linalg.vector_norm(flat[part].double()) for part in parts]


def trained_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Return what is trained, and the optimizer's state of it as "exp_avg of <name>", by name."""
    names = {p: name for name, p in named_parameters(model) if p.requires_grad}
    found: dict[str, Tensor] = {name: p for p, name in names.items()}
    for p, state in optimizer.state.items() if optimizer else ():
        found |= {f"{key} of {names[p]}": x for key, x in state.items() if isinstance(x, Tensor)}
    return found


def not_finite(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> str | None:
    """Return the name of what is trained and has a NaN or an infinity; None if all is finite.

    See `trained_state` for the names. The optimizer's state is looked at too: the square of a
    finite gradient may be infinite, and its parameter then stays where it is for ever. The result
    is the same on every rank. Waits for the device, and reads every shard once. Collective.
    """
    module_of().synchronize()  # offloaded state may still be on its way to the host
    named = trained_state(model, optimizer).items()
    pieces = [(name, x) for name, shard in named for x in plain_pieces(shard) if x.numel()]
    pieces = [(name, x) for name, x in pieces if x.is_floating_point()]  # the others are codes
    finite = [torch.linalg.vector_norm(x, math.inf).isfinite() for _, x in pieces]
    found = torch.stack([x.to(finite[0].device) for x in finite]).tolist() if finite else []
    bad = (name for (name, _), is_finite in zip(pieces, found, strict=True) if not is_finite)
    return first_failure(next(bad, None))


def learning_rate(step: int, config: Config) -> float:
    """Return the learning rate of step `step`, counted from 0.

    After a linear warmup it follows decay_type. A decay ends at the last step, at min_lr_ratio
    times the peak.
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
