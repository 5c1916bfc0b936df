"""HeadPlan: which query heads and which key-value heads each sequence-parallel rank computes.

DTensor can say `Shard(heads)` only where P divides the heads (it would split 14 heads over 4 ranks as 4, 4, 4, 2, and
knows no partial replication of KV heads). The plan says it for any Hq, Hkv and P <= Hq.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


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
        queries, runs = self.query[rank], []
        for head in self.key_value[rank]:
            start = max(queries.start, head * self.group_size) - queries.start
            stop = min(queries.stop, (head + 1) * self.group_size) - queries.start
            local = head - self.key_value[rank].start
            if runs and (runs[-1][0].stop - runs[-1][0].start) == (stop - start) * (runs[-1][1].stop - runs[-1][1].start):
                runs[-1] = (slice(runs[-1][0].start, stop), slice(runs[-1][1].start, local + 1))
            else:
                runs.append((slice(start, stop), slice(local, local + 1)))
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
