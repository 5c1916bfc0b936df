"""The state of a run (`TrainState`), one optimizer step (`train_step`), and its learning rate."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import reduce
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from titan_ulysses.config.schema import Config
from titan_ulysses.data.loader import Batch, Loader
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.tensors import local_shard
from titan_ulysses.memory.tiled import tiles
from titan_ulysses.setup.forward import Sharding
from titan_ulysses.train.evaluation import Best
from titan_ulysses.train.loss import CrossEntropy, TrainingLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from titan_ulysses.setup.resolve import RunSpec

_NORM_PART = 2**20
"""Elements of a gradient that are copied to fp64 at once (8 MiB).

Larger copies are slower on a CPU.
"""


@dataclass
class TrainState:
    """What a run is made of and how far it is. The parts of `Trainer` share it."""

    spec: RunSpec
    mesh: Mesh
    model: PreTrainedModel
    loss: TrainingLoss
    loader: Loader | None
    """the training data; None where the run only evaluates"""
    validation_loaders: dict[str, Loader]
    """the held-out data by name; "" where it is no named set"""
    best: Best
    float8_layers: int
    """linear layers that compute in float8"""
    attention_kernel: str | None
    """which FlashAttention is called, as a sentence; None where that is no question"""
    optimizer: torch.optim.Optimizer | None = None
    """None where the run only evaluates"""
    step: int = 0
    """steps that are done"""
    skipped: int = 0
    """those of them that changed nothing, because their numbers were not finite"""

    @property
    def config(self) -> Config:
        return self.spec.config

    @property
    def is_over(self) -> bool:
        """Whether the run ends here: at its last step, or because validations get no better."""
        return self.step >= self.config.training.steps or self.best.ends_run

    @property
    def step_to_export(self) -> int:
        """The step whose model is exported: the best one if it is kept, else the last one."""
        return self.step if self.best.kept_step is None else self.best.kept_step


class StepMetrics(NamedTuple):
    """Statistics of one optimizer step, on the device, so that the host does not wait for them."""

    loss: Tensor
    """of all ranks"""
    grad_norm: Tensor
    """of all ranks, before clipping"""
    router_loss: Tensor | None
    """The mean over the batches, without its coefficient; None for a model without router loss."""
    indexer_losses: Tensor | None
    """[indexers] fp64: the divergence of each trained indexer, a mean over the labels"""
    own_losses: Tensor
    """[batches] fp64: this rank's part of each micro-batch's loss"""
    own_norms: Tensor
    """[pieces] fp64: the norms of the pieces of this rank's gradients, see `gradient_norms`"""
    norm_owners: list[int]
    """for each piece, the index of its parameter among those with a gradient"""
    row_losses: list[Tensor] = []  # noqa: RUF012  a default that nobody changes
    """of each micro-batch, see `BatchLoss`; empty if the loss does not know them"""
    metrics: dict[str, Tensor] = {}  # noqa: RUF012
    """other metrics, of all ranks, by name"""

    @property
    def is_finite(self) -> Tensor:
        """Whether loss and gradient norm are, as a bool tensor on the loss's device."""
        return self.loss.isfinite() & self.grad_norm.isfinite().to(self.loss.device)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    mesh: Mesh,
    *,
    max_norm: float,
    skip_nonfinite: bool = False,
    loss: TrainingLoss | None = None,
) -> StepMetrics:
    """Run one optimizer step over the batches that make it up, without waiting for the device.

    loss: that of the run; None: cross-entropy.

    skip_nonfinite: leave parameters and optimizer state as they are if loss or gradient norm are
    not finite. That is decided on the device, and identically on all ranks, which have the same
    loss and norm. AdamW here and in torch takes it as `found_inf`, as from a gradient scaler.
    """
    loss = loss or CrossEntropy(model, mesh)
    # The labels (or pairs) of the whole step: each loss is divided by their number.
    count = loss.count(batches)
    total, router_loss = torch.zeros(2, dtype=torch.float64, device=count.device).unbind()
    own_losses, row_losses, metrics = [], [], Counter[str]()
    for batch in batches:
        found = loss.forward(batch, count)
        found.loss.backward()
        total += found.loss.detach()
        own_losses.append(found.own_loss)
        row_losses += [] if found.row_losses is None else [found.row_losses]
        metrics.update(found.metrics)
        if has_router_loss := found.router_loss is not None:
            router_loss += found.router_loss.detach() / len(batches)
        if batch is not batches[-1]:
            _upcast_grads_to_fp32(model)
    norms = _clip(list(model.parameters()), max_norm)
    step = StepMetrics(
        total,
        norms.total,
        router_loss if has_router_loss else None,
        _indexer_losses(model, mesh),
        torch.stack(own_losses),
        torch.cat(norms.own),
        norms.owners,
        row_losses,
        dict(metrics),
    )
    if skip_nonfinite:
        optimizer.found_inf = (~step.is_finite).float()
    optimizer.step()
    optimizer.zero_grad()
    return step


def _indexer_losses(model: nn.Module, mesh: Mesh) -> Tensor | None:
    """Return the loss of each indexer over all ranks; None if none has been trained. Collective."""
    sharding = getattr(model, "sharding", None)
    losses = sharding.take_indexer_losses() if isinstance(sharding, Sharding) else None
    if losses is not None:
        dist.all_reduce(losses, group=mesh.loss.get_group())
    return losses


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


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a norm of at most max_norm (0: do not scale).

    Returns the norm before scaling, see `gradient_norms`. Collective.
    """
    return _clip(parameters, max_norm).total


class GradientNorms(NamedTuple):
    """The norm of all gradients, and what this rank adds to it."""

    total: Tensor
    """the 2-norm of all gradients of all ranks as one vector: a scalar, the same on every rank"""
    own: list[Tensor]
    """[pieces] fp64: the norms of pieces of this rank's shards; a tensor for each sharding"""
    owners: list[int]
    """for each piece, the index of its gradient"""


def _clip(parameters: list[nn.Parameter], max_norm: float) -> GradientNorms:
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = gradient_norms(gradients)
    if max_norm > 0:
        # All that it reads are gradients. Of DTensors the first call would work out how each result
        # is sharded, which takes 5 ms a gradient.
        shards: Any = [SimpleNamespace(grad=local_shard(g)) for g in gradients]
        nn.utils.clip_grads_with_norm_(shards, max_norm, norms.total, foreach=True)
    return norms


@torch.no_grad()
def gradient_norms(gradients: list[Tensor]) -> GradientNorms:
    """Return the norm of all gradients in their widest dtype, which is at least fp32.

    Squares are added up in fp64: in fp32 the sum of 135M of them is too small by 1e-4 or more, and
    by another amount on every mesh. Collective: one all-reduce for gradients that are sharded
    alike.
    """
    norms: dict[tuple[DeviceMesh | None, tuple[Placement, ...]], list[Tensor]] = defaultdict(list)
    owners: dict[tuple[DeviceMesh | None, tuple[Placement, ...]], list[int]] = defaultdict(list)
    for index, gradient in enumerate(gradients):
        is_sharded = isinstance(gradient, DTensor)
        key = (gradient.device_mesh, gradient.placements) if is_sharded else (None, ())
        flat = (gradient.to_local() if is_sharded else gradient).flatten()
        parts = tiles(max(1, flat.numel()), _NORM_PART)  # at least one, also for an empty shard
        pieces = [torch.linalg.vector_norm(flat[part].double()) for part in parts]
        norms[key] += pieces
        owners[key] += [index] * len(pieces)
    own = [torch.stack(pieces) for pieces in norms.values()]
    squares = [pieces.square().sum() for pieces in own]
    for (mesh, placements), square in zip(norms, squares, strict=True):
        for dim, placement in enumerate(placements):
            if not placement.is_replicate():  # replicas have the same gradient: it counts once
                dist.all_reduce(square, group=mesh.get_group(dim))
    total = sum(squares, start=torch.zeros((), dtype=torch.float64)).sqrt()
    widest = reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32)
    return GradientNorms(total.to(widest), own, [i for each in owners.values() for i in each])


def learning_rate(step: int, config: Config) -> float:
    """Return the learning rate of step `step`, counted from 0.

    After a linear warmup, and what is constant before the decay, it follows decay_type. A decay
    ends at the last step, at min_lr_ratio times the peak. `config` is `counted`.
    """
    scheduler, peak, steps = config.lr_scheduler, config.optimizer.lr, config.training.steps
    warmup, least = scheduler.warmup_steps, scheduler.min_lr_ratio
    if step < warmup:
        return peak * (step + 1) / warmup
    if scheduler.decay_type == "inverse_sqrt":
        unit = warmup or 10_000
        return peak * max(least, math.sqrt(unit / (step - warmup + unit)))
    begins = warmup
    if scheduler.decay_ratio < 1:
        begins = max(warmup, steps - round(scheduler.decay_ratio * steps))
    done = max(0, step - begins) / max(1, steps - 1 - begins)
    in_cycle = 1.0 if done == 1 else scheduler.cycles * done % 1
    shape = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * in_cycle)) / 2,
        "sqrt": 1 - math.sqrt(done),
    }[scheduler.decay_type]
    return peak * (least + (1 - least) * shape)
