"""Deals the sequences of a step to data-parallel ranks and micro-batches by what their attention
costs.

All sequences have S tokens, but attention's time goes with the sum of squares of the lengths of
their documents: a sequence of one document costs n times as much as one of n documents. Ranks that
read different sequences wait for each other in every micro-batch, because FSDP gathers the
parameters of each layer. So a step takes the sum over its micro-batches of the dearest rank's cost.

Which sequences a step has does not depend on the mesh, and how they are dealt depends on their
lengths alone. Every rank computes it for itself.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    return [
        [[*range(first, first + batch_size)] for first in range(start, start + a_batch, batch_size)]
        for a_batch in [ranks * batch_size]
        for start in range(0, count, a_batch)
    ]


def deal(costs: Sequence[int], *, ranks: int, batch_size: int) -> Dealt:
    """Deal sequences of these costs, so that the ranks of each micro-batch have equal shares.

    The dearest sequences go into the first micro-batch, and so on. So those of a micro-batch cost
    about the same, which for a batch size of 1 gives the least sum of maxima that there is. Inside
    a micro-batch, the dearest sequence that is left goes to the rank with the least so far that has
    room. Of equals the first is taken, so that equal costs leave the order as it is for a batch
    size of 1.
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
    """Return the cost that a step waits for: of the dearest rank, summed over micro-batches."""
    return sum(max(sum(costs[place] for place in rows) for rows in batch) for batch in dealt)


def balance(costs: Sequence[int], dealt: Dealt) -> float:
    """Return what a step waits for, divided by the mean of the ranks; 1: all have the same."""
    return slowest(costs, dealt) * len(dealt[0]) / max(1, sum(costs))
