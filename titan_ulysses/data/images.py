"""The images and videos of a micro-batch: where they stand, what they cost, and who encodes them.

A vision-language model has a tower that turns the pixels of an image into feature rows, and its
text has a placeholder token for each row. The P ranks that share a sequence know the same
`Visuals`, of all rows, and deal them among themselves (`Visuals.owners`): each rank decodes and
encodes only its own, and `model/vision.py` takes each feature row to the rank that has its
placeholder. A batch for `model(**batch)` has these keys besides those of a text:

    visuals         the `Visuals` of all B rows, the same on every rank of a sequence
    pixels          for each of `visuals.own(rank, degree)`, in that order, what the family's
                    processor makes of this image or video alone, without the token ids:
                    {"pixel_values": [...], "image_grid_thw": [1, 3]}, of a video
                    {"pixel_values_videos": [...], "video_grid_thw": [1, 3]}
    position_ids    [A, B, T] if the family counts positions along A axes, else [B, T]

`Batch` has the same fields. A loader makes them for whole rows, `Batch.local` cuts positions, and
then either all pixels are there and it keeps this rank's, or they are None and are added after it:

    whole = Batch(..., position_ids=[A, B, S], visuals=Visuals(items))
    local = whole.local(rank=rank, degree=degree, stream_chunk_tokens=...)
    own = visuals.own(rank, degree)
    local = replace(local, pixels=tuple(decode(items[i]) for i in own))

Positions are those of each document alone: a function of its ids [n] and its `Visual`s, whose spans
count from its first token, to [A, n] int64 (`model.vision.positions_of(model)` returns it; None
where positions are counted from 0 along one axis). `Visual.at` moves one to its place in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from titan_ulysses.distributed.sequence import Documents

Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")

Pixels = dict[str, Tensor]
"""What a family's processor makes of one image or video, by name: the arguments of the model's
`get_image_features` or `get_video_features` for a batch of one."""


@dataclass(frozen=True)
class Visual:
    """An image or a video of a sequence."""

    kind: Kind
    spans: tuple[tuple[int, int], ...]
    """[begin, end) of its placeholders in the whole sequence, in order.

    They are several where other tokens are between them: the end of a row of patches, the time of
    a frame. Together they are as many as the tower's feature rows of it.
    """
    grid: tuple[int, ...] = ()
    """(t, h, w) in patches, as in `image_grid_thw`; () if the family has no such input"""
    cost: int = 1
    """what the tower computes for it, in any unit: see `cost_of`"""
    row: int = 0
    """its row of the batch"""
    seconds: float | None = None
    """of a video, the seconds between two steps of its grid, if positions depend on them
    (`second_per_grid_ts`)"""

    @property
    def features(self) -> int:
        """The number of its feature rows."""
        return sum(end - begin for begin, end in self.spans)

    def at(self, offset: int, *, row: int = 0) -> Visual:
        """Return it with its document `offset` tokens further on, in this row of a batch."""
        spans = tuple((begin + offset, end + offset) for begin, end in self.spans)
        return replace(self, spans=spans, row=row)


DocumentPositions = Callable[[Tensor, Sequence[Visual]], Tensor]
"""The positions [A, n] of a document: a function of its ids [n], and what is in it."""


def positions_of_rows(
    positions: DocumentPositions, ids: Tensor, documents: Documents, visuals: Sequence[Visual]
) -> Tensor:
    """Return the positions [A, B, S] of rows of packed documents, given their ids [B, S]."""
    rows = []
    for row, lengths in enumerate(documents):
        items = [x for x in visuals if x.row == row]
        parts, begin = [], 0
        for length in lengths:
            inside = [x.at(-begin) for x in items if begin <= x.spans[0][0] < begin + length]
            parts.append(positions(ids[row, begin : begin + length], inside))
            begin += length
        rows.append(torch.cat(parts, dim=-1))
    return torch.stack(rows, dim=1)


@dataclass(frozen=True)
class Visuals:
    """All images and videos of the B rows of a micro-batch, known to every rank of a sequence."""

    items: tuple[Visual, ...] = ()
    """By row, and in a row by their first placeholders."""
    kinds: tuple[Kind, ...] | None = None
    """The kinds that any rank of the mesh has in this micro-batch; None: not known. FSDP needs the
    same calls of the tower on every rank, so a rank encodes the smallest input of a kind of which
    it has none; where it is not known, and there are several data-parallel ranks, of every kind.
    """

    def owners(self, degree: int) -> tuple[int, ...]:
        """Return for each item which of the P = degree ranks of the sequence encodes it."""
        return deal(tuple(item.cost for item in self.items), degree)

    def own(self, rank: int, degree: int) -> list[int]:
        """Return the indices of the items that this rank encodes, in order."""
        return [i for i, owner in enumerate(self.owners(degree)) if owner == rank]


def cost_of(patches: Sequence[int], hidden_size: int) -> int:
    """Return what a tower of this hidden size h computes for an image or video.

    patches: of each part that attends to itself alone, as a frame of a video does. A patch takes
    12 h^2 multiplications in the matrix products of a layer and 2 n h in its attention to n
    patches, so n patches cost n (6 h + n) in units of 2 h.
    """
    return sum(n * (6 * hidden_size + n) for n in patches)


@lru_cache(maxsize=64)
def deal(costs: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """Return for each item which of the ranks it goes to, so that the largest share is small.

    The costliest item that is left goes to the rank with the least so far (LPT, Graham 1969), and
    then the costliest rank hands an item to another rank, or exchanges two, as long as that lowers
    the larger share of the two. Of equals the first is taken, so all ranks find the same.
    """
    shares, owners = [0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(ranks), key=shares.__getitem__)
        shares[owners[i]] += costs[i]
    fair = max([-(-sum(costs) // ranks), *costs])
    while max(shares) > _CLOSE * fair and (better := _exchange(costs, owners, shares)):
        for i, rank in better:
            shares[owners[i]] -= costs[i]
            shares[rank] += costs[i]
            owners[i] = rank
    return tuple(owners)


_CLOSE = 1.02
"""A largest share within this of the least that is possible is not improved further: with many
items LPT is there at once, and the search for a pair to exchange goes with their square."""


def _exchange(
    costs: Sequence[int], owners: list[int], shares: list[int]
) -> list[tuple[int, int]] | None:
    """Return the (item, new rank) of the hand-over or exchange that lowers the larger share of the
    costliest rank and another one most, or None if none lowers it.
    """
    top = max(range(len(shares)), key=shares.__getitem__)
    mine = [i for i, owner in enumerate(owners) if owner == top]
    best, found = shares[top], None
    for rank in range(len(shares)):
        if rank == top:
            continue
        others = [i for i, owner in enumerate(owners) if owner == rank]
        for i in mine:
            for j in [None, *others]:
                moved = costs[i] - (0 if j is None else costs[j])
                larger = max(shares[top] - moved, shares[rank] + moved)
                if larger < best:
                    best, found = larger, [(i, rank)] + ([] if j is None else [(j, top)])
    return found
