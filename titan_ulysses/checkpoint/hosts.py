"""Checkpoints of a run whose hosts have separate folders (checkpoint.shared = false).

The ranks of a host save, as a DCP checkpoint of its own, every part of a tensor that one of them
holds. Nothing that a host needs to resume is on another one, so parts that several hosts hold are
saved by each. The checkpoint of one host is not one of the whole model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_ulysses.checkpoint.manifest import TABLE_FILE, HashingWriter, Pieces
from titan_ulysses.checkpoint.reader import CheckpointReader
from titan_ulysses.distributed.errors import UserError, first_failure
from titan_ulysses.distributed.mesh import timeout_of

Box = tuple[Sequence[int], Sequence[int]]
"""Sizes and offsets of a part of a tensor."""


class HostFolders:
    """Which ranks share a folder: those of one host. `hosts` holds the host of each rank.

    everyone: a process group of all ranks; None: the default one.
    """

    def __init__(self, hosts: Sequence[str], everyone: dist.ProcessGroup | None = None):
        self.ranks_of = {host: [] for host in dict.fromkeys(hosts)}
        for rank, host in enumerate(hosts):
            self.ranks_of[host].append(rank)
        self._hosts, self._everyone = list(hosts), everyone
        self._group: dist.ProcessGroup | None = None

    def with_group(self, everyone: dist.ProcessGroup) -> HostFolders:
        """Return the same for another thread, with process groups of its own. Collective."""
        other = HostFolders(self._hosts, everyone)
        other.ranks_of_this_host()
        return other

    @property
    def own(self) -> str:
        return self._hosts[dist.get_rank()]

    @property
    def leads(self) -> bool:
        """Whether this rank is the first one of its host, which renames and removes folders."""
        return self.ranks_of[self.own][0] == dist.get_rank()

    def write(self, tensors: dict[str, Any], folder: Path) -> Pieces:
        """Write to `folder` what the ranks of this host hold. Collective.

        Return the pieces that this rank has written.
        """
        writer = _Writer(folder, ranks=self.ranks_of[self.own])
        dcp.save(
            tensors,
            storage_writer=writer,
            planner=_PartPlanner(),
            process_group=self.ranks_of_this_host(),
        )
        return writer.pieces

    def manifest(self, pieces: Pieces) -> dict[str, Any]:
        """Return the entries of run.json that say which host holds what. Collective.

        pieces: on the first rank of a host, those of all of its ranks.
        """
        files: list[list[str]] = [[] for _ in self._hosts]
        names = sorted([TABLE_FILE, *pieces])
        dist.all_gather_object(files, names, group=self._everyone)
        return {
            "host": self.own,
            "hosts": {
                host: {"ranks": ranks, "files": files[ranks[0]]}
                for host, ranks in self.ranks_of.items()
            },
        }

    def expect_same(self, state: dict[str, Any], where: str) -> None:
        """Raise UserError if the checkpoint with this run.json is of other hosts than these."""
        hosts = state.get("hosts", {})
        if len(hosts) <= 1:
            return  # one folder with the whole model
        saved = {host: part["ranks"] for host, part in hosts.items()}
        if saved != self.ranks_of or state["host"] != self.own:
            raise UserError(
                f"{where} was saved with checkpoint.shared = false by {_named(saved)}. This run is "
                f"{_named(self.ranks_of)}, and {self.own} has the shards of {state['host']}. Start "
                "on the same hosts, in the same order."
            )

    def another_save(self, state: dict[str, Any]) -> str | None:
        """Return which hosts have parts of different saves, in words, or None. Collective."""
        ids: list[str | None] = [None] * len(self._hosts)
        dist.all_gather_object(ids, state.get("save_id"))
        others = {h for h, one in zip(self._hosts, ids, strict=True) if one != ids[0]}
        if not others:
            return None
        return (
            f"run.json: save_id on {' and '.join(sorted(others))} is that of another save than on "
            f"{self._hosts[0]}"
        )

    def read(self, tensors: dict[str, Any], reader: CheckpointReader, where: str) -> None:
        """Fill the tensors from the part that this host has saved. Collective.

        Raise UserError, on every rank and before anything changes, if a rank needs what its host
        does not have.
        """
        if missing := first_failure(_not_covered(tensors, reader.read_metadata())):
            raise UserError(
                f"{where} was saved with checkpoint.shared = false on another mesh: the part of "
                f"{missing} is on another host. Set the degrees in [parallelism] as they were."
            )
        dcp.load(tensors, storage_reader=reader, process_group=self.ranks_of_this_host())

    def ranks_of_this_host(self) -> dist.ProcessGroup:
        """Return the group of this host's ranks. The first call is collective over all ranks."""
        if self._group is None:
            assert dist.group.WORLD is not None
            timeout = timedelta(seconds=timeout_of(dist.group.WORLD))
            for host, ranks in self.ranks_of.items():
                group = dist.new_group(ranks, backend="gloo", timeout=timeout)
                if host == self.own:
                    self._group = group
        return self._group


def expect_all_hosts(state: dict[str, Any], where: str) -> None:
    """Raise UserError if the checkpoint with this run.json is only the part of one of its hosts."""
    hosts = state.get("hosts", {})
    if len(hosts) > 1:
        saved = {host: part["ranks"] for host, part in hosts.items()}
        raise UserError(
            f"{where} was saved with checkpoint.shared = false by {_named(saved)}, and has only "
            f"the shards of {state['host']}. Resume that run with checkpoint.shared = false on the "
            "same hosts; its export/ has the whole model."
        )


class _Writer(HashingWriter):
    """DCP's writer, whose files are named by the rank in the run, not by that on the host."""

    def __init__(self, folder: Path, *, ranks: list[int]):
        super().__init__(folder)
        self._ranks = ranks

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{rank}_"))
            for rank, plan in zip(self._ranks, plans, strict=True)
        ]


class _PartPlanner(DefaultSavePlanner):
    """DCP's planner without its check that the ranks hold every tensor completely."""

    def _create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        paths: dict[str, Any] = {}
        for plan in plans:
            paths |= plan.planner_data
        return plans, dataclasses.replace(metadata, planner_data=paths)


def _not_covered(tensors: dict[str, dict[str, Any]], saved: Metadata) -> str | None:
    """Return the name of a tensor of which this rank holds a part that is not saved here."""

    def walk(name: str, value: Any) -> str | None:
        if isinstance(value, dict):
            found = (walk(f"{name}.{key}", inner) for key, inner in value.items())
            return next(filter(None, found), None)
        if not isinstance(value, torch.Tensor):
            return None
        entry = saved.state_dict_metadata.get(name)
        chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else []
        wanted = _box(value)
        there = sum(_common(wanted, (chunk.sizes, chunk.offsets)) for chunk in chunks)
        return name if there < math.prod(wanted[0]) else None

    found = (walk(name, value) for name, value in tensors.items())
    return next(filter(None, found), None)


def _box(tensor: torch.Tensor) -> Box:
    if isinstance(tensor, DTensor):
        return compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    return tensor.shape, (0,) * tensor.dim()


def _common(one: Box, other: Box) -> int:
    """Return how many numbers two parts of a tensor have in common."""
    sides = (min(a + m, b + n) - max(a, b) for m, a, n, b in zip(*one, *other, strict=True))
    return math.prod(max(0, side) for side in sides)


def _named(ranks_of: dict[str, list[int]]) -> str:
    return " and ".join(
        f"{host} (ranks {', '.join(map(str, ranks))})" for host, ranks in ranks_of.items()
    )
