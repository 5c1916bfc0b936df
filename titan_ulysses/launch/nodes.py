"""Which ranks of a sequence-parallel group share a node.

Ranks are counted node by node, and the ranks of a group are neighbours: see `mesh.py`.
"""

from __future__ import annotations

import os
from collections import Counter


def ranks_per_node(world_size: int) -> int:
    """Return how many ranks torchrun has started on this node; all of them without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def neighbours_on_node(*, sequence: int, world_size: int, per_node: int) -> int:
    """Return how many ranks of its own group a rank has on its node, itself included.

    Of all ranks, the one with the fewest counts, since the others wait for it. The result is
    `sequence` where every group is inside a node.
    """
    return min(
        min(Counter(rank // per_node for rank in range(first, first + sequence)).values())
        for first in range(0, world_size, sequence)
    )


def spans_nodes(*, sequence: int, world_size: int, per_node: int) -> str | None:
    """Return a warning if a sequence-parallel group has ranks on several nodes, else None."""
    inside = neighbours_on_node(sequence=sequence, world_size=world_size, per_node=per_node)
    if inside == sequence:
        return None
    best = max(n for n in range(1, sequence) if per_node % n == 0)
    return (
        f"parallelism.sequence_parallel_degree = {sequence} spans nodes of {per_node} rank(s): the "
        f"exchanges of every layer wait for the network between nodes. With {best} they stay "
        f"inside a node, data parallelism spans the nodes, and a rank has {sequence / best:g} "
        "times the tokens."
    )
