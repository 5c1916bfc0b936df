"""HeadPlan: which query heads and which key-value heads each sequence-parallel rank computes.

DTensor's `Shard` on the head dimension describes this only if P divides the heads: it would split
14 heads over 4 ranks as 4, 4, 4, 2, and it cannot express partial replication of KV heads. A
HeadPlan describes it for any Hq, Hkv and P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadPlan:
    """Contiguous ranges of heads for each rank, given Hq query heads, Hkv KV heads and P ranks.

    Query heads are partitioned among the ranks; the numbers per rank differ by at most one. A rank
    receives exactly the KV heads that its query heads read, so a KV head is sent to several ranks
    only if its query heads are on several ranks. Of all balanced partitions, this one minimizes the
    number of KV heads received, the sum of len(key_value[p]).

    With more ranks than query heads, the ranks from Hq on have no heads. They take part in the
    exchange but compute no attention. Splitting the queries of one head among ranks instead would
    not pay: under a causal mask equal parts are unequal work, and every core, including a user's
    own, would have to accept queries that are only a part of the sequence.
    """

    query: tuple[range, ...]
    """`query[p]`: the query heads of rank p."""
    key_value: tuple[range, ...]
    """`key_value[p]`: the KV heads that the query heads of rank p read."""
    group_size: int
    """Query heads that read one KV head: Hq / Hkv."""
    rank_groups: tuple[range, ...]
    """Groups of consecutive ranks whose heads can be copied with one strided copy per tensor.

    All ranks of a group have equally many query heads and equally many KV heads. Their ranges of
    query heads follow one another. Their ranges of KV heads either follow one another too or are
    all the same. An even plan has one group, and so does MQA with P query heads. Idle ranks belong
    to no group.
    """
    query_rank_groups: tuple[range, ...]
    """Rank groups for an exchange of queries alone, such as that of the output."""

    @property
    def degree(self) -> int:
        return len(self.query)

    @property
    def is_even(self) -> bool:
        """Whether all ranks have equally many query heads and no KV head is on several ranks.

        DTensor's `Shard` on the head dimension can then describe the plan.
        """
        return (
            len({len(r) for r in self.query}) == 1
            and sum(map(len, self.key_value)) == self.key_value[-1].stop
        )

    def runs(self, rank: int) -> list[tuple[slice, slice]]:
        """Return slices (query, KV) of rank's local heads that one attention call each can compute.

        Inside a run every KV head is read by equally many query heads. There are at most three
        runs, if the rank's range starts or ends inside a group: the rest of a group, whole groups,
        and the start of a group. If P divides the KV heads there is one. An idle rank has none.
        """
        mine = self.query[rank]
        # How many of this rank's query heads read each of its KV heads.
        sizes = [
            min(mine.stop, (head + 1) * self.group_size) - max(mine.start, head * self.group_size)
            for head in self.key_value[rank]
        ]
        runs, query, key = [], 0, 0
        for size, equal in groupby(sizes):
            heads = len(list(equal))
            runs.append((slice(query, query + size * heads), slice(key, key + heads)))
            query, key = query + size * heads, key + heads
        return runs

    def local(self, rank: int) -> LocalHeads:
        """Return the heads of a rank."""
        return LocalHeads(self.query[rank], self.key_value[rank], self.runs(rank))


class LocalHeads(NamedTuple):
    """The heads of one rank."""

    query: range
    key_value: range
    runs: list[tuple[slice, slice]]
    """See `HeadPlan.runs`."""

    def repeat(self, x: Tensor) -> Tensor:
        """Repeat the KV heads of x [B, n, h, D] so that there is one for each query head."""
        parts = []
        for query, key in self.runs:
            times = (query.stop - query.start) // (key.stop - key.start)
            parts.append(
                x[:, :, key].repeat_interleave(times, dim=2) if times > 1 else x[:, :, key]
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@lru_cache
def plan_heads(num_query_heads: int, num_kv_heads: int, degree: int) -> HeadPlan:
    """Return the plan for Hq query heads, Hkv KV heads and P = degree ranks.

    ValueError if Hkv does not divide Hq.
    """
    if num_query_heads % num_kv_heads:
        raise ValueError(
            f"{num_kv_heads} key-value heads do not divide {num_query_heads} query heads"
        )
    group_size = num_query_heads // num_kv_heads
    cuts = [0, *accumulate(_sizes(num_query_heads, group_size, degree))]
    query = tuple(range(start, stop) for start, stop in pairwise(cuts))
    key_value = tuple(
        range(
            heads.start // group_size,
            -(-heads.stop // group_size) if heads else heads.start // group_size,
        )
        for heads in query
    )
    rank_groups, query_rank_groups = _rank_groups(query, key_value), _rank_groups(query, query)
    return HeadPlan(query, key_value, group_size, rank_groups, query_rank_groups)


def _sizes(num_query_heads: int, group_size: int, degree: int) -> list[int]:
    """Return the number of query heads of each rank, so that the ranks receive the fewest KV heads.

    The numbers differ by at most one. A rank receives one KV head, plus one for each group border
    inside its range. The total is smallest if as many borders between ranks as possible are also
    group borders. A dynamic program over the ranks, from the last to the first, finds such a
    choice: after r ranks, of which j have the larger number, the border is at r * smaller + j.
    Among equally good choices, ranks with more heads come first.
    """
    smaller, num_larger = divmod(num_query_heads, degree)
    if not num_larger or not smaller:
        return [smaller + 1] * num_larger + [smaller] * (degree - num_larger)
    # rows: for each border between ranks, from the last, a list whose entry j is the largest
    # possible number of group borders at this border and the ones after it.
    rows = [[-inf] * num_larger + [0]]
    for rank in reversed(range(degree)):
        steps = zip(rows[-1], [*rows[-1][1:], -inf], strict=True)
        rows.append(
            [max(step) + ((rank * smaller + j) % group_size == 0) for j, step in enumerate(steps)]
        )
    sizes, j = [], 0
    for hits in rows[-2::-1]:
        larger = j < num_larger and hits[j + 1] >= hits[j]
        sizes.append(smaller + larger)
        j += larger
    return sizes


def _rank_groups(query: Sequence[range], key_value: Sequence[range]) -> tuple[range, ...]:
    rank_groups: list[range] = []
    for rank, heads in enumerate(query):
        if rank_groups and heads and _can_join_group(rank_groups[-1], query, key_value):
            rank_groups[-1] = range(rank_groups[-1].start, rank + 1)
        elif heads:
            rank_groups.append(range(rank, rank + 1))
    return tuple(rank_groups)


def _can_join_group(ranks: range, query: Sequence[range], key_value: Sequence[range]) -> bool:
    """Return whether the rank after the group `ranks` can join it."""
    first, rank = key_value[ranks.start], key_value[ranks.stop]
    if len(query[ranks.stop]) != len(query[ranks.start]) or len(rank) != len(first):
        return False
    if rank == key_value[ranks.stop - 1]:
        return rank == first
    # A group with several KV ranges must share no KV head with the rank before it: the gradients of
    # its KV heads are then copied, never added.
    fresh = ranks.start == 0 or first.start == key_value[ranks.start - 1].stop
    return fresh and rank.start == first.start + len(first) * len(ranks)


def idle_ranks(heads: int, degree: int) -> str | None:
    """Return a warning if there are more sequence-parallel ranks than query heads, else None."""
    return (
        f"{degree - heads} of {degree} sequence-parallel ranks have no attention head"
        if degree > heads
        else None
    )
