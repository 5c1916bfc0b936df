"""HeadPlan: which query heads and which key-value heads each sequence-parallel rank computes.

DTensor's `Shard` on the head dimension describes this only if P divides the heads: it would split
14 heads over 4 ranks as 4, 4, 4, 2, and it cannot express partial replication of KV heads. A
HeadPlan describes it for any Hq, Hkv and P.

There are two ways to make one. They give the same plan if P divides Hq.

 - `plan_heads` gives whole heads, for attention over the whole sequence at once. With 9 heads on 4
   ranks one rank has 3 of them, 1.33 times its share, and ranks beyond Hq have none.
 - `deal_heads` gives each rank the same number of queries, for attention of one chunk of the
   sequence (`streaming/`): all queries of a chunk see almost the same keys, so a part of a head's
   queries is a fair share of its work, which it is not in a whole sequence. No rank is idle.
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

_LONGEST_PERIOD = 64
"""Ranks of the longest cycle of a `RankGroup` that is looked for."""


class Part(NamedTuple):
    """Queries of a rank: the tokens that some ranks hold, for some heads."""

    sources: range
    """The ranks that hold the tokens."""
    heads: range
    """The query heads; there may be none."""


class RankGroup(NamedTuple):
    """Consecutive ranks, in cycles of `period` ranks.

    The ranks at the same place of all cycles are equivalent: they have equally many heads of each
    tensor. The heads of all ranks of a cycle are a window, and those of the next cycle are the same
    window, or the next one, equally far on each time.
    """

    ranks: range
    period: int

    def windows(self, ranges: Sequence[range]) -> tuple[range, int]:
        """Return the heads of the group's first window, and the number of windows.

        ranges: the heads of a tensor on each rank. The windows follow one another.
        """
        starts = [ranges[rank].start for rank in self.ranks[:: self.period]]
        last = self.ranks[self.period - 1]
        if starts[-1] == starts[0]:
            return range(starts[0], ranges[last].stop), 1
        repeats = starts.count(starts[0])
        return range(starts[0], starts[repeats]), len(starts) // repeats


@dataclass(frozen=True)
class HeadPlan:
    """What each rank computes, given Hq query heads, Hkv KV heads and P ranks.

    A rank receives the keys and values of all tokens, of exactly the KV heads that its query heads
    read. So a KV head is sent to several ranks only if its query heads are on several ranks.
    """

    parts: tuple[tuple[Part, ...], ...]
    """`parts[p]`: the queries of rank p. The sources of its parts follow one another, from the
    first rank to the last. A rank that has whole heads has one part.
    """
    key_value: tuple[range, ...]
    """`key_value[p]`: the KV heads that the query heads of rank p read."""
    group_size: int
    """Query heads that read one KV head: Hq / Hkv."""

    @property
    def degree(self) -> int:
        return len(self.parts)

    @property
    def query_heads(self) -> int:
        """Hq"""
        return max(part.heads.stop for parts in self.parts for part in parts)

    @property
    def query(self) -> tuple[range, ...]:
        """`query[p]`: the query heads of which rank p computes all queries or some."""
        return tuple(
            range(min(x.heads.start for x in parts), max(x.heads.stop for x in parts))
            for parts in ([x for x in of_rank if x.heads] or of_rank for of_rank in self.parts)
        )

    def queries_of(self, source: int) -> tuple[range, ...]:
        """Return the query heads that each rank computes for the tokens of one rank."""
        every = [part for parts in self.parts for part in parts]  # one of each rank has the source
        return tuple([part.heads for part in every if source in part.sources])

    def heads_of(self, tensors: str, source: int) -> list[tuple[range, ...]]:
        """Return, for each tensor ("q", "k" or "v"), the heads that each rank gets of source's."""
        queries = self.queries_of(source)
        return [queries if tensor == "q" else self.key_value for tensor in tensors]

    def rank_groups(self, tensors: str, source: int) -> tuple[RankGroup, ...]:
        """Return all ranks, in groups to whose equivalent ranks source's heads of these tensors can
        be copied with one strided copy per tensor (see `RankGroup`).

        An even plan has one group of one cycle after the other, each of one rank. So have P query
        heads whose KV heads divide P, as in MQA. If a head of queries is on several ranks, each has
        the heads of a part of the sources, and a cycle is those ranks.
        """
        queries, keys = self.queries_of(source), self.key_value
        if "q" not in tensors:
            queries = keys
        return _rank_groups(queries, queries if set(tensors) == {"q"} else keys)

    def runs(self, rank: int, part: int = 0) -> list[tuple[slice, slice]]:
        """Return slices (query, KV) of a part's heads that one attention call each can compute.

        Queries count from the part's first head, and KV heads from the rank's first one. Inside a
        run every KV head is read by equally many query heads. There are at most three runs, if the
        heads start or end inside a group: the rest of a group, whole groups, and the start of a
        group. If P divides the KV heads there is one. Where there are no heads there is none.
        """
        mine = self.parts[rank][part].heads
        # How many of the query heads read each of the rank's KV heads.
        sizes = [
            min(mine.stop, (head + 1) * self.group_size) - max(mine.start, head * self.group_size)
            for head in self.key_value[rank]
        ]
        runs, query, key = [], 0, 0
        for size, equal in groupby(max(0, size) for size in sizes):
            heads = len(list(equal))
            if size:
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
    """Return the plan of whole heads for Hq query heads, Hkv KV heads and P = degree ranks.

    The numbers of query heads per rank differ by at most one. Of all such partitions, this one
    minimizes the number of KV heads received, the sum of len(key_value[p]). With more ranks than
    query heads, the ranks from Hq on have no heads: they take part in the exchange but compute no
    attention. ValueError if Hkv does not divide Hq.
    """
    group_size = _group_size(num_query_heads, num_kv_heads)
    cuts = [0, *accumulate(_sizes(num_query_heads, group_size, degree))]
    query = tuple(range(start, stop) for start, stop in pairwise(cuts))
    key_value = tuple(
        range(
            heads.start // group_size,
            -(-heads.stop // group_size) if heads else heads.start // group_size,
        )
        for heads in query
    )
    whole = range(degree)
    return HeadPlan(tuple((Part(whole, heads),) for heads in query), key_value, group_size)


@lru_cache
def deal_heads(num_query_heads: int, num_kv_heads: int, degree: int) -> HeadPlan:
    """Return the plan of equally many queries on each rank: Hq and Hkv heads, P = degree ranks.

    The n tokens of a chunk are on P ranks, so there are Hq P cells of one head and the n / P tokens
    of one rank. Ordered by head, then by rank, rank p gets the cells [p Hq, (p + 1) Hq): the end of
    a head, whole heads, the beginning of a head. Every rank computes Hq n / P queries.

    Balance: of C equal chunks the last queries of a chunk see less than one chunk of keys more than
    the first ones. A rank's work, summed over the chunks, is less than (C + 1) / C of a fair share:
    1.0625 with 16.

    Cost: rank p has the KV heads [floor(p Hkv / P), ceil((p + 1) Hkv / P)), whose sum over the
    ranks is P + Hkv - gcd(P, Hkv): Hkv if P divides it, P if Hkv divides P, and otherwise less than
    one KV head per rank more than Hkv / P on average. ValueError if Hkv does not divide Hq.
    """
    group_size = _group_size(num_query_heads, num_kv_heads)
    parts = tuple(_dealt(num_query_heads, degree, rank) for rank in range(degree))
    key_value = tuple(
        range(rank * num_kv_heads // degree, -(-(rank + 1) * num_kv_heads // degree))
        for rank in range(degree)
    )
    return HeadPlan(parts, key_value, group_size)


def _dealt(num_query_heads: int, degree: int, rank: int) -> tuple[Part, ...]:
    """Return the parts of the cells [rank Hq, (rank + 1) Hq)."""
    first, source = divmod(rank * num_query_heads, degree)
    stop, end = divmod((rank + 1) * num_query_heads, degree)
    # Of a rank before `source` the first head is not dealt to this rank; of one before `end` the
    # head `stop` still is.
    return tuple(
        Part(range(a, b), range(first + (a < source), stop + (a < end)))
        for a, b in pairwise(sorted({0, source, end, degree}))
    )


def _group_size(num_query_heads: int, num_kv_heads: int) -> int:
    if num_query_heads % num_kv_heads:
        raise ValueError(
            f"{num_kv_heads} key-value heads do not divide {num_query_heads} query heads"
        )
    return num_query_heads // num_kv_heads


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


@lru_cache
def _rank_groups(query: Sequence[range], key_value: Sequence[range]) -> tuple[RankGroup, ...]:
    groups, start = [], 0
    while start < len(query):
        period, cycles = 1, 0
        for longer in range(1, _LONGEST_PERIOD + 1):
            if (len(query) - start) // longer <= cycles:
                break  # a copy would not serve more ranks
            found = _cycles((query, key_value), start, longer)
            if found > cycles:
                period, cycles = longer, found
        groups.append(RankGroup(range(start, start + period * cycles), period))
        start += period * cycles
    return tuple(groups)


def _cycles(of_tensors: Sequence[Sequence[range]], start: int, period: int) -> int:
    """Return the largest number of cycles of `period` ranks each, from rank `start` on, that are a
    group for tensors with these heads.
    """
    windows = [_regular_cycles(ranges, start, period) for ranges in of_tensors]
    cycles = min(most for most, _ in windows)
    while any(cycles > repeats and cycles % repeats for _, repeats in windows):
        cycles -= 1
    return cycles


def _regular_cycles(ranges: Sequence[range], start: int, period: int) -> tuple[int, int]:
    """Return how many cycles have the heads of one tensor in windows at equal distances, and how
    many cycles share a window.
    """
    base, end = ranges[start].start, ranges[start + period - 1].stop
    before = ranges[start - 1].stop if start else 0
    cycles, repeats, step = 1, 1, 0
    for begin in range(start + period, len(ranges) - period + 1, period):
        shift = ranges[begin].start - base
        if shift and not step:
            step, repeats = shift, cycles
            # Several windows share no head with one another, nor with the rank before: the
            # gradients of the heads of all windows are then added to the same of their heads.
            if end > base + step or before > base:
                break
        if shift != cycles // repeats * step:
            break
        pairs = ((ranges[start + i], ranges[begin + i]) for i in range(period))
        if any(x != range(first.start + shift, first.stop + shift) for first, x in pairs):
            break
        cycles += 1
    return cycles, repeats if step else cycles


def idle_ranks(heads: int, degree: int) -> str | None:
    """Return a warning if there are more sequence-parallel ranks than query heads, else None.

    It is about whole heads: where layers are streamed, no rank is idle (see `deal_heads`).
    """
    return (
        f"{degree - heads} of {degree} sequence-parallel ranks have no attention head"
        if degree > heads
        else None
    )
