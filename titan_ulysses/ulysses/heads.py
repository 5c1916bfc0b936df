"""HeadPlan: which query heads and which key-value heads each sequence-parallel rank computes.

DTensor can say `Shard(heads)` only where P divides the heads (it would split 14 heads over 4 ranks
as 4, 4, 4, 2, and knows no partial replication of KV heads). The plan says it for any Hq, Hkv and
P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from math import inf


@dataclass(frozen=True)
class HeadPlan:
    """Contiguous head ranges a rank, for Hq query heads, Hkv key-value heads and P ranks.

    Query heads are partitioned, balanced within one head. A rank receives exactly the KV heads that
    its query heads read, so a KV head travels to more than one rank only where its query heads do;
    of all balanced partitions this is one with the fewest KV heads received, sum of
    len(key_value[p]).

    With more ranks than query heads, ranks from Hq on have no heads: they join the exchange and
    compute no attention. A head's queries are not split among ranks instead: causal attention makes
    equal parts unequal work, and every core, a user's own too, would have to take queries that are
    not the whole sequence.
    """

    query: tuple[range, ...]
    """`query[p]`: the query heads of rank p."""
    key_value: tuple[range, ...]
    """`key_value[p]`: the KV heads that those read."""
    group_size: int
    """Query heads that read one KV head: Hq / Hkv."""
    rank_groups: tuple[range, ...]
    """Ranks in a row to whom one strided copy can bring queries, and one their KV heads; idle ranks
    are in none.

    Their ranges are equally long, those of queries following one another and those of KV heads
    either doing the same or all being one. An even plan has one stretch, and so has MQA with P
    query heads.
    """
    query_rank_groups: tuple[range, ...]
    """The same for queries alone."""

    @property
    def degree(self) -> int:
        return len(self.query)

    @property
    def is_even(self) -> bool:
        """Every rank has the same number of query heads and its own KV heads: what `Shard(heads)`
        can say.
        """
        return (
            len({len(r) for r in self.query}) == 1
            and sum(map(len, self.key_value)) == self.key_value[-1].stop
        )

    def runs(self, rank: int) -> list[tuple[slice, slice]]:
        """Slices (query, KV) of rank's local heads, each with one group size, so that one attention
        call does each.

        A rank whose range begins or ends inside a group has at most three: the rest of a group,
        whole groups, the beginning of a group. Where P divides the KV heads there is one. An idle
        rank has none.
        """
        mine = self.query[rank]
        sizes = [  # how many of this rank's queries read each of its KV heads
            min(mine.stop, (head + 1) * self.group_size) - max(mine.start, head * self.group_size)
            for head in self.key_value[rank]
        ]
        runs, query, key = [], 0, 0
        for size, equal in groupby(sizes):
            heads = len(list(equal))
            runs.append((slice(query, query + size * heads), slice(key, key + heads)))
            query, key = query + size * heads, key + heads
        return runs


@lru_cache
def plan_heads(num_query_heads: int, num_kv_heads: int, degree: int) -> HeadPlan:
    """The plan for Hq query heads, Hkv KV heads and P = degree ranks. ValueError where Hkv does not
    divide Hq.
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
    """Query heads a rank: as equal as can be, the larger ranges placed so that the ranks receive
    the fewest KV heads.

    A rank receives one KV head, and one more for each group border inside its range. So the fewest
    are received where the most borders between ranks are group borders, and those are found rank by
    rank, from the last: after r ranks of which j have a larger range, the border is at r * smaller
    + j. Of equals, larger ranges come first.
    """
    smaller, num_larger = divmod(num_query_heads, degree)
    if not num_larger or not smaller:
        return [smaller + 1] * num_larger + [smaller] * (degree - num_larger)
    # hits[j]: the most group borders at and behind this border; one dynamic programme over (rank,
    # j), from behind.
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
        if rank_groups and heads and _continues(rank_groups[-1], query, key_value):
            rank_groups[-1] = range(rank_groups[-1].start, rank + 1)
        elif heads:
            rank_groups.append(range(rank, rank + 1))
    return tuple(rank_groups)


def _continues(ranks: range, query: Sequence[range], key_value: Sequence[range]) -> bool:
    """Whether the rank behind stretch belongs to it."""
    first, rank = key_value[ranks.start], key_value[ranks.stop]
    if len(query[ranks.stop]) != len(query[ranks.start]) or len(rank) != len(first):
        return False
    if rank == key_value[ranks.stop - 1]:
        return rank == first
    # Several KV ranges in one stretch share no head with a rank before it: their gradients then are
    # plain copies.
    fresh = ranks.start == 0 or first.start == key_value[ranks.start - 1].stop
    return fresh and rank.start == first.start + len(first) * len(ranks)


def idle_ranks(heads: int, degree: int) -> str | None:
    """What is to be said where there are more sequence-parallel ranks than query heads."""
    return (
        f"{degree - heads} of {degree} sequence-parallel ranks have no attention head"
        if degree > heads
        else None
    )
