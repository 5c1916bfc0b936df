"""Deals the sequences of a step to data-parallel ranks and micro-batches by what their attention
costs.

All sequences have S tokens, but attention's time goes with the sum of squares of the lengths of
their documents: a sequence of one document costs n times as much as one of n documents. Ranks that
read different sequences wait for each other in every micro-batch, because FSDP gathers the
parameters of each layer. So a step takes the sum over its micro-batches of the costliest rank's
cost.

Which sequences a step has does not depend on the mesh, and how they are dealt depends on their
lengths alone. Every rank computes it for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

Dealt = list[list[list[int]]]
"""[micro-batch][data-parallel rank] -> the places, in the step, of the sequences of its batch"""


def attention_cost(document_lengths: Sequence[int]) -> int:
    """Return what attention to a sequence costs: the sum of squares of its documents' lengths.

    Padding is a document too, because attention computes it.
    """
    return sum(length * length for length in document_lengths)


def in_order(count: int, *, ranks: int, batch_size: int) -> Dealt:
    """Deal the places 0 to count - 1 in their order."""
    assert count % (ranks * batch_size) == 0, (count, ranks, batch_size)
    places = iter(range(count))
    return [
        [[*islice(places, batch_size)] for _ in range(ranks)]
        for _ in range(count // (ranks * batch_size))
    ]


def deal(costs: Sequence[int], *, ranks: int, batch_size: int) -> Dealt:
    """Deal sequences of these costs, so that the ranks of each micro-batch have equal shares.

    The costliest sequences go into the first micro-batch, and so on. So those of a micro-batch cost
    about the same, which for a batch size of 1 gives the least sum of maxima that there is. Inside
    a micro-batch, the costliest sequence that is left goes to the rank with the least so far that
    has room. Of equals the first is taken, so that equal costs leave the order as it is for a
    batch size of 1.
    """
    order = sorted(range(len(costs)), key=lambda place: -costs[place])
    dealt = []
    for start in range(0, len(costs), ranks * batch_size):
        rows: list[list[int]] = [[] for _ in range(ranks)]
        shares = [0] * ranks
        for place in order[start : start + ranks * batch_size]:
            rank = min(
                (r for r in range(ranks) if len(rows[r]) < batch_size), key=shares.__getitem__
            )
            rows[rank].append(place)
            shares[rank] += costs[place]
        dealt.append(rows)
    return dealt


def slowest(costs: Sequence[int], dealt: Dealt) -> int:
    """Return the cost that a step waits for: of the costliest rank, summed over micro-batches."""
    return sum(max(sum(costs[place] for place in rows) for rows in batch) for batch in dealt)


def balance(costs: Sequence[int], dealt: Dealt) -> float:
    """Return what a step waits for, divided by the mean of the ranks; 1: all have the same."""
    return slowest(costs, dealt) * len(dealt[0]) / max(1, sum(costs))


class Shares(NamedTuple):
    """How evenly the attention of a step is spread over the data-parallel ranks."""

    balance: float
    """see `balance`"""
    in_order: float
    """what it would be in the order of the data"""
    costliest: int
    """the sequence whose attention costs most"""
    document: int
    """the number, in that sequence, of its longest document"""
    part: float
    """what part of the attention of the whole step is inside that document"""


class DealtStep(NamedTuple):
    """The sequences of a step, as they are dealt to its micro-batches and data-parallel ranks."""

    sequences: Dealt
    """[micro-batch][data-parallel rank] -> sequences"""
    shares: Shares | None
    """None on one data-parallel rank, and for data without random access"""


def deal_step(
    first: int, lengths: Sequence[Sequence[int] | None], *, ranks: int, batch_size: int
) -> DealtStep:
    """Deal the sequences from number `first` on, given the lengths of the documents in each.

    Where a length is None, they are dealt in their order.
    """
    ordered = dealt = in_order(len(lengths), ranks=ranks, batch_size=batch_size)
    shares, known = None, [x for x in lengths if x is not None]
    if len(known) == len(lengths):
        costs = [attention_cost(x) for x in known]
        dealt = deal(costs, ranks=ranks, batch_size=batch_size)
        place = max(range(len(costs)), key=costs.__getitem__)
        shares = Shares(
            balance(costs, dealt),
            balance(costs, ordered),
            costliest=first + place,
            document=max(range(len(known[place])), key=known[place].__getitem__),
            part=max(known[place]) ** 2 / sum(costs),
        )
    return DealtStep([[[first + x for x in rows] for rows in batch] for batch in dealt], shares)
