"""Checkpoints of a run whose hosts have separate folders (checkpoint.shared = false).

The ranks of a host save, as a DCP checkpoint of its own, every part of a tensor that one of them
holds. Nothing that a host needs to resume is on another one, so parts that several hosts hold are
saved by each. The checkpoint of one host is not one of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from titan_ulysses.checkpoint.manifest import TABLE_FILE, Damage, PieceHashes
from titan_ulysses.distributed.errors import UserError, first_failure
from titan_ulysses.distributed.mesh import timeout_of
from titan_ulysses.distributed.tensors import local_box


class HostFolders:
    """Which ranks share a folder: those of one host. `hosts` holds the host of each rank.

    everyone: a process group of all ranks; None: the default one.
    """

    def __init__(self, hosts: Sequence[str], everyone: dist.ProcessGroup | None = None):
        self.ranks_of = {
            host: [rank for rank, other in enumerate(hosts) if other == host]
            for host in dict.fromkeys(hosts)
        }
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

    def manifest(self, pieces: PieceHashes) -> dict[str, Any]:
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
        saved = _ranks_by_host(state)
        # A checkpoint of one host has the whole model.
        if len(saved) > 1 and (saved != self.ranks_of or state["host"] != self.own):
            raise UserError(
                f"{where} was saved with checkpoint.shared = false by {_named(saved)}. This run is "
                f"{_named(self.ranks_of)}, and {self.own} has the shards of {state['host']}. Start "
                "on the same hosts, in the same order."
            )

    def expect_one_save(self, state: dict[str, Any]) -> None:
        """Raise `Damage`, on every rank, if the hosts have parts of different saves. Collective."""
        ids: list[str | None] = [None] * len(self._hosts)
        dist.all_gather_object(ids, state["save_id"])
        if others := {h for h, one in zip(self._hosts, ids, strict=True) if one != ids[0]}:
            raise Damage(
                f"run.json: save_id on {' and '.join(sorted(others))} belongs to a different save "
                f"than on {self._hosts[0]}"
            )

    def expect_complete(self, tensors: dict[str, Any], saved: Metadata, where: str) -> None:
        """Raise UserError, on every rank, if one needs what its host has not saved. Collective."""
        if missing := first_failure(_not_covered(tensors, saved)):
            raise UserError(
                f"{where} was saved with checkpoint.shared = false on another mesh: the part of "
                f"{missing} is on another host. Restore the degrees in [parallelism]."
            )

    def ranks_of_this_host(self) -> dist.ProcessGroup:
        """Return the group of this host's ranks. The first call is collective over all ranks."""
        if self._group is None:
            groups = {host: new_group(ranks) for host, ranks in self.ranks_of.items()}
            self._group = groups[self.own]
        return self._group


def new_group(ranks: list[int] | None = None) -> dist.ProcessGroup:
    """Return a process group of ranks (None: of all) that works in host memory. Collective."""
    assert dist.group.WORLD is not None
    timeout = timedelta(seconds=timeout_of(dist.group.WORLD))
    return dist.new_group(ranks, backend="gloo", timeout=timeout)


def expect_all_hosts(state: dict[str, Any], where: str) -> None:
    """Raise UserError if the checkpoint with this run.json is only the part of one of its hosts."""
    saved = _ranks_by_host(state)
    if len(saved) > 1:
        raise UserError(
            f"{where} was saved with checkpoint.shared = false by {_named(saved)}, and has only "
            f"the shards of {state['host']}. Resume that run with checkpoint.shared = false on the "
            "same hosts; its export/ has the whole model."
        )


def _ranks_by_host(state: dict[str, Any]) -> dict[str, list[int]]:
    return {host: part["ranks"] for host, part in state.get("hosts", {}).items()}


def _named(ranks_of: dict[str, list[int]]) -> str:
    return " and ".join(
        f"{host} (ranks {', '.join(map(str, ranks))})" for host, ranks in ranks_of.items()
    )


def _not_covered(tensors: dict[str, Any], saved: Metadata, path: str = "") -> str | None:
    """Return the name of a tensor of which this rank holds a part that is not saved here."""
    for key, value in tensors.items():
        name, missing = path + key, None
        if isinstance(value, dict):
            missing = _not_covered(value, saved, f"{name}.")
        elif isinstance(value, torch.Tensor):
            entry = saved.state_dict_metadata.get(name)
            chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else []
            sizes, offsets = local_box(value)
            there = 0
            for chunk in chunks:
                ends = zip(sizes, offsets, chunk.sizes, chunk.offsets, strict=True)
                there += math.prod(max(0, min(a + m, b + n) - max(a, b)) for m, a, n, b in ends)
            missing = name if there < math.prod(sizes) else None
        if missing:
            return missing
    return None
