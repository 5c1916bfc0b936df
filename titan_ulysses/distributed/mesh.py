"""The device mesh, dp_replicate x dp_shard x sp, and the views of it that parts of training need.

SP is the innermost dimension, so that the all-to-alls of a layer stay between neighbouring ranks
(one node's NVLink). dp_shard is next, because FSDP shards parameters over dp_shard x sp.
dp_replicate is outermost.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_ulysses.distributed.device import device_type, module_of
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import local_slice


@dataclass(frozen=True)
class Mesh:
    """One DeviceMesh and its flattened views. Built by `build_mesh`."""

    world: DeviceMesh
    """All three dimensions: dp_replicate, dp_shard, sp."""
    fsdp: DeviceMesh
    """For `fully_shard`: parameters are sharded over dp_shard x sp.

    Where this mesh is 2-D, they are replicated over its first dimension, dp_replicate.
    """
    batch: DeviceMesh
    """dp_replicate x dp_shard: the ranks along it read different samples."""
    loss: DeviceMesh
    """All ranks: the loss and its gradients are sums over all of them."""
    cuts: dict[int, set[int | None]] = field(default_factory=dict, compare=False, repr=False)
    """By the S of batches that `shard` has cut: the tokens of their chunks; None: one chunk."""

    @cached_property
    def sp(self) -> DeviceMesh:
        """The ranks that share a sample; each holds S/P of its tokens."""
        return self.world["sp"]

    @cached_property
    def whole(self) -> Mesh:
        """The same ranks with P = 1, each with sequences of its own.

        The first use builds this mesh, which is collective.
        """
        return (
            self if self.sp.size() == 1 else build_mesh(timeout=timeout_of(self.loss.get_group()))
        )

    def local_slice(self, whole: Tensor, *, chunk_tokens: int | None) -> Tensor:
        """Return this rank's tokens of a whole sequence, [B, S, ...] -> [B, T, ...].

        See `sequence.local_slice`.
        """
        place = {"rank": self.sp.get_local_rank(), "degree": self.sp.size()}
        return local_slice(whole, **place, chunk_tokens=chunk_tokens)

    @property
    def device(self) -> torch.device:
        kind = self.world.device_type
        index = None if kind == "cpu" else module_of(kind).current_device()
        return torch.device(kind, index)


def init_distributed(*, timeout: float | None = None) -> None:
    """Join the default process group: torchrun's if its variables are set, else a group of one.

    timeout: seconds after which a collective gives up; unset, torch's default. NCCL moves CUDA
    tensors and gloo moves CPU tensors. Which of them exist is decided by the machine, not by a
    setting. A process group that the caller has already made is kept.
    """
    if dist.is_initialized():
        return
    kind, backend = device_type(), "gloo"
    if kind != "cpu":
        module_of(kind).set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    if "RANK" in os.environ:
        limit = None if timeout is None else timedelta(seconds=timeout)
        dist.init_process_group(backend, timeout=limit)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def set_timeout(seconds: float) -> None:
    """Let collectives of all existing groups give up after so many seconds, sub-groups too."""
    c10d = dist.distributed_c10d
    set_of_group = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout  # before torch 2.15
    for group in c10d._world.pg_map:
        set_of_group(timedelta(seconds=seconds), group)


def timeout_of(group: dist.ProcessGroup) -> float:
    """Return the seconds after which collectives of a group on the host give up."""
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def build_mesh(
    *, replicate: int = 1, shard: int = -1, sequence: int = 1, timeout: float | None = None
) -> Mesh:
    """Build the mesh over all ranks of the default process group, which is joined first if needed.

    replicate * shard * sequence must be the number of ranks; shard = -1 takes all ranks that
    remain. timeout: seconds after which a collective gives up whose other ranks do not answer, in
    every process group; unset, those of torch: half an hour. UserError if the degrees do not fit.
    See `init_distributed`.
    """
    init_distributed(timeout=timeout)
    world_size = dist.get_world_size()
    if shard == -1:
        shard = max(1, world_size // (replicate * sequence))
    if replicate * shard * sequence != world_size:
        raise UserError(
            f"build_mesh: replicate({replicate}) * shard({shard}) * sequence({sequence}) is not "
            f"the number of ranks, {world_size}: start {replicate * shard * sequence} ranks, or "
            "change the degrees."
        )
    names = ("dp_replicate", "dp_shard", "sp")
    world = init_device_mesh(device_type(), (replicate, shard, sequence), mesh_dim_names=names)
    fsdp = world["dp_shard", "sp"]._flatten("fsdp")
    if replicate > 1:
        fsdp = DeviceMesh._concatenate([world["dp_replicate"], fsdp])
    mesh = Mesh(
        world=world,
        fsdp=fsdp,
        batch=world["dp_replicate", "dp_shard"]._flatten("batch"),
        loss=world._flatten("loss"),
    )
    if timeout is not None:
        # `init_process_group` gives its timeout only to the group of all ranks.
        set_timeout(timeout)
    return mesh
