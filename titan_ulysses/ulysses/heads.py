"""HeadPlan: which query heads and which key-value heads each sequence-parallel rank computes.

DTensor can say `Shard(heads)` only where P divides the heads (it would split 14 heads over 4 ranks as 4, 4, 4, 2, and
knows no partial replication of KV heads). The plan says it for any Hq, Hkv and P <= Hq.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby


@dataclass(frozen=True)
class HeadPlan:
    """Contiguous head ranges a rank, for Hq query heads, Hkv key-value heads and P ranks.

    Query heads are partitioned, balanced within one head. A rank receives exactly the KV heads that its query heads
    read, so a KV head travels to more than one rank only where its query heads do.
    """

    query: tuple[range, ...]
    """`query[p]`: the query heads of rank p."""
    key_value: tuple[range, ...]
    """`key_value[p]`: the KV heads that those read."""
    group_size: int
    """Query heads that read one KV head: Hq / Hkv."""

    @property
    def degree(self) -> int:
        return len(self.query)

    @property
    def is_even(self) -> bool:
        """Every rank has the same number of query heads and its own KV heads: what `Shard(heads)` can say."""
        return len({len(r) for r in self.query}) == 1 and sum(map(len, self.key_value)) == self.key_value[-1].stop

    def runs(self, rank: int) -> list[tuple[slice, slice]]:
        """Slices (query, KV) of rank's local heads, each with one group size, so that one attention call does each.

        A rank whose range begins or ends inside a group has at most three: the rest of a group, whole groups, the
        beginning of a group. Where P divides the KV heads there is one.
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
    """The plan for Hq query heads, Hkv KV heads and P = degree ranks. ValueError where Hkv does not divide Hq."""
    if num_query_heads % num_kv_heads:
        raise ValueError(f"{num_kv_heads} key-value heads do not divide {num_query_heads} query heads")
    group_size = num_query_heads // num_kv_heads
    cuts = [rank * num_query_heads // degree for rank in range(degree + 1)]
    query = tuple(range(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False))
    key_value = tuple(
        range(heads.start // group_size, -(-heads.stop // group_size) if heads else heads.start // group_size)
        for heads in query
    )
    return HeadPlan(query=query, key_value=key_value, group_size=group_size)
