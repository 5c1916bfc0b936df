"""Ranks that drift apart: what must be the same on several ranks is compared before it is saved.

Replicas compute the same update from the same sum of gradients, and the ranks of a sequence read
the same sample. Where a memory chip or a library errs on one of them, nothing fails: the loss is
only a little wrong. So each rank makes a fingerprint, and all compare them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from titan_ulysses.checkpoint.manifest import digest
from titan_ulysses.data.loader import Loader
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.tensors import plain_pieces
from titan_ulysses.model.freezing import bits
from titan_ulysses.train.nonfinite import trained_state


class Run(Protocol):
    """The attributes of a `Trainer` that are used here."""

    mesh: Mesh
    model: Any
    optimizer: torch.optim.Optimizer | None
    loader: Loader | None
    step: int


class Claim(NamedTuple):
    """What one rank has of something that others have too."""

    what: str
    among: tuple[int, ...]
    """which copy of it: ranks with the same numbers must have the same"""
    found: dict[str, str]
    """fingerprints by name"""


def expect_no_drift(run: Run, hosts: list[str], latest: Callable[[], int | None]) -> None:
    """Raise UserError, on every rank, if ranks differ in what they must share. Collective.

    hosts: the host of each rank; latest: returns the step of the last checkpoint. Both are for the
    message. Waits for the device, and reads replicated state once.
    """
    claims = _claims(run)
    mine = [claim._replace(found=_short(claim.found)) for claim in claims]
    of_ranks: list[list[Claim]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    for number, claim in enumerate(mine):
        if odd := _odd_ranks([one[number] for one in of_ranks]):
            raise _drifted(run, claim.what, odd, claims[number].found, hosts, latest)


def _odd_ranks(claims: list[Claim]) -> dict[int, int]:
    """Return the ranks that differ from most of those they share a copy with, and one of these."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, claim in enumerate(claims):
        groups[claim.among].append(rank)
    odd = {}
    for ranks in groups.values():
        values = {rank: json.dumps(claims[rank].found) for rank in ranks}
        usual = Counter(values.values()).most_common(1)[0][0]
        first = next(rank for rank in ranks if values[rank] == usual)
        odd |= {rank: first for rank in ranks if values[rank] != usual}
    return odd


def _drifted(
    run: Run,
    what: str,
    odd: dict[int, int],
    found: dict[str, str],
    hosts: list[str],
    latest: Callable[[], int | None],
) -> UserError:
    of_ranks: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, found)
    told = []
    for rank, usual in odd.items():
        names = of_ranks[rank].keys() | of_ranks[usual].keys()
        differ = [n for n in found if of_ranks[rank].get(n) != of_ranks[usual].get(n)]
        first = (differ or sorted(names))[0]
        told.append(
            f"rank {rank} on {hosts[rank]} differs from rank {usual} on {hosts[usual]} in {what} "
            f"({first}{f' and {len(differ) - 1} more' if len(differ) > 1 else ''})"
        )
    last = latest()
    kept = "" if last is None else f"; the last checkpoint is of step {last}"
    return UserError(
        f"the ranks have drifted apart at step {run.step}: {'; '.join(told)}. Nothing of it is "
        f"saved{kept}. Test the memory and the device of that host, and run the same command again "
        "to go on."
    )


def _claims(run: Run) -> list[Claim]:
    mesh, claims = run.mesh, []
    coordinate = mesh.world.get_coordinate()
    assert coordinate is not None and run.loader is not None
    replica, shard, sequence = coordinate
    if mesh.world.size(0) > 1:
        sums = _sums(trained_state(run.model, run.optimizer))
        what = "the replicated parameters and their optimizer"
        claims.append(Claim(what, (shard, sequence), sums))
    saved = run.model.state_dict().keys()
    buffers = {name: x for name, x in run.model.named_buffers() if name in saved}
    claims.append(Claim("the buffers of the model", (), _sums(buffers)))
    position = {"position in the data": json.dumps(run.loader.state_dict(), sort_keys=True)}
    position["step"] = str(run.step)
    claims.append(Claim("what was done", (), position))
    batch = {"the last batch": run.loader.fingerprint()}
    claims.append(Claim("the data", (replica, shard), batch))
    return claims


@torch.no_grad()
def _sums(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return a checksum of the bits of each tensor. Waits for the device."""
    pieces = [(name, x) for name, tensor in tensors.items() for x in plain_pieces(tensor)]
    sums = [bits(x.contiguous()).sum(dtype=torch.int64) for _, x in pieces]
    found: dict[str, str] = {}
    for (name, _), value in zip(pieces, sums, strict=True):
        found[name] = f"{found.get(name, '')} {value.item()}".strip()
    return found


def _short(found: dict[str, str]) -> dict[str, str]:
    return {"all": digest(json.dumps(found, sort_keys=True).encode())}
