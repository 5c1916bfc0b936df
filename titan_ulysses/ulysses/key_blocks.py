"""Keys and values of a layer that wait off the device, and attention to them block by block.

With `memory.stream_offload` on a GPU, the keys and values of the chunks before are in the store of
the hidden states (`memory/stream_offload.py`), and so are the sums of their gradients. The queries
of a chunk attend to one block of keys after the other, while the next block is on its way. The
results merge by their log-sum-exps, and backward adds to one block of gradients at a time. So what
a layer needs on the device does not grow with the sequence.

The copies hide behind the kernels where a chunk has enough queries: a block of n keys is 2 n D
numbers of each KV head, and the queries of a chunk compute 4 n D FLOPs each with them, in backward
10 n D for 6 n D numbers, of which 4 n D are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titan_ulysses.distributed.parts import visited_with_next
from titan_ulysses.distributed.sequence import Reach, SequenceTensors
from titan_ulysses.ulysses.scores import Scores
from titan_ulysses.ulysses.tiles import Merged

BLOCK_TOKENS = 2**16
"""Tokens of a block, in whole chunks: fewer results to merge, and longer copies."""
RESIDENT_CHUNKS = 4
"""The keys of so many chunks stay on the device, where no chunk reads more: because of a window, or
because documents are short.
"""


class KeyBlocks:
    """What `streamed.KeysAndValues` does, off the device.

    A block has the tokens of one or several chunks, for this rank's KV heads. There is memory for
    as many blocks as a chunk reads. A later block takes the place of one that is not read any more.
    """

    def __init__(self, reach: Reach, store: SequenceTensors):
        self.reach, self._store = reach, store
        self._seq_len = sum(reach.documents[0])
        together, most = max(1, BLOCK_TOKENS // reach.size), -(-reach.most() // reach.size)
        self._step = together * reach.size
        """Tokens of a block."""
        # What a chunk reads may begin and end inside of a block.
        self._places_count = -(-(most + together - 1) // together) * together
        self._tensors: list[Tensor] = []
        """k and v [B, n, Hkv, D] of all places."""
        self._gradients: list[Tensor] = []
        """Their sums, in fp32 or wider."""
        self._summed: set[int] = set()
        """The first tokens of the blocks whose sums are in memory. All others are 0."""
        self._starts = range(0)
        """The first tokens of the blocks that `read` yields."""
        self._next: slice | None = None
        """The block that it yields next."""

    def hold(self, tokens: slice) -> None:
        """Forget what does not belong to these tokens."""
        self._summed = {
            x for x in self._summed if x < tokens.stop and x + self._step > tokens.start
        }

    def put(self, tokens: slice, *tensors: Tensor) -> None:
        """Keep k and v [B, n, Hkv, D] of the tokens of a chunk."""
        if not self._tensors:
            self._tensors = [self._empty(x, x.dtype) for x in tensors]
        for place, x in zip(self._places(self._tensors, tokens), tensors, strict=True):
            self._store.write(place, x.detach())

    def of(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """Return k and v [B, n, Hkv, D] of the tokens of a chunk."""
        k, v = self._read(self._tensors, tokens, None)
        return k, v

    def read(self, tokens: slice) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield the tokens of each block that has some of `tokens`, with its k and v on the device.

        The last one ends with the chunk itself.
        """
        size, step = self.reach.size, self._step
        end = min(-(-tokens.stop // size) * size, self._seq_len)
        self._starts = range(tokens.start - tokens.start % step, tokens.stop, step)
        blocks = [slice(start, min(start + step, end)) for start in self._starts]
        for block, self._next in visited_with_next(blocks):
            yield block, self._read(self._tensors, block, self._next)

    def gradients_of(self, block: slice) -> list[Tensor]:
        """Return the sums of the gradients of a block's k and v on the device, to be added to."""
        if block.start - block.start % self._step in self._summed:
            then = self._next if self._next and self._next.start in self._summed else None
            return self._read(self._gradients, block, then)
        if not self._gradients:
            wide = torch.promote_types(self._tensors[0].dtype, torch.float32)
            self._gradients = [self._empty(x, wide) for x in self._tensors]
        return [
            torch.zeros(x.shape, dtype=x.dtype, device=self._store.device)
            for x in self._places(self._gradients, block)
        ]

    def put_gradients(self, block: slice, gradients: Sequence[Tensor]) -> None:
        """Keep what `gradients_of` returned and others added to."""
        for place, x in zip(self._places(self._gradients, block), gradients, strict=True):
            self._store.write(place, x)
        if self._next is None:  # now each of the blocks has been added to
            self._summed.update(self._starts)

    def complete_gradients(self, tokens: slice) -> list[Tensor]:
        """Return the gradients [B, n, Hkv, D] of a chunk's k and v, once they are complete."""
        pairs = zip(self.gradients_of(tokens), self._tensors, strict=True)
        return [gradient.to(x.dtype) for gradient, x in pairs]

    def _empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        tokens = self._places_count * self.reach.size
        shape = torch.Size((len(like), tokens, *like.shape[2:]))
        return self._store.empty(shape, dtype)

    def _places(self, tensors: Sequence[Tensor], block: slice) -> list[Tensor]:
        """Return the memory of a block, or of a chunk."""
        size = self.reach.size
        start = block.start // size % self._places_count * size
        return [x[:, start : start + block.stop - block.start] for x in tensors]

    def _read(self, tensors: Sequence[Tensor], block: slice, then: slice | None) -> list[Tensor]:
        ahead = [None, None] if then is None else self._places(tensors, then)
        pairs = zip(self._places(tensors, block), ahead, strict=True)
        return [self._store.read(*pair) for pair in pairs]


class Part(NamedTuple):
    """The part of a call that a block of keys has to do with."""

    queries: slice
    """of those of the call"""
    keys: slice
    """of those of the block"""
    scores: Scores


class MergedParts:
    """The results of queries with several blocks of keys."""

    def __init__(self, queries: int):
        self._queries = queries
        self._result: tuple[Tensor, Tensor] | None = None
        self._merged: Merged | None = None

    def add(self, queries: slice, output: Tensor, lse: Tensor) -> None:
        """Add the output [n, h, Dv] and log-sum-exp [h, n] of some of the queries."""
        if self._result is None and queries == slice(0, self._queries):
            self._result = output, lse
            return
        if self._merged is None:
            before, count = self._result, self._queries
            self._result = (
                output.new_empty(count, *output.shape[1:]),
                lse.new_empty(len(lse), count),
            )
            self._merged = Merged(self._result[0].transpose(0, 1), self._result[1])
            if before is not None:
                self.add(slice(0, count), *before)
        self._merged.add(queries, output.transpose(0, 1), lse)

    def end(self) -> tuple[Tensor, Tensor]:
        """Return the output [N, h, Dv] and log-sum-exp [h, N] of all queries."""
        assert self._result is not None
        if self._merged is not None:
            self._merged.end()
        return self._result


def part_of(scores: Scores, tokens: slice, block: slice, chunk: slice) -> Part | None:
    """Return what queries compute with a block of keys, or None if they see none of them.

    scores and tokens: what they compute in all, and the keys that they see in all. chunk: the
    tokens of the queries' own chunk.
    """
    begin, stop = max(tokens.start, block.start), min(tokens.stop, block.stop)
    count = sum(scores.query_lengths)
    if begin >= stop:
        return None
    keys = slice(begin - block.start, stop - block.start)
    if block.stop > chunk.start:
        first = scores.key_lengths[0] - (begin - tokens.start)
        own = scores.of(scores.query_lengths, (first, *scores.key_lengths[1:]))
        return Part(slice(0, count), keys, own)
    # Only the first document has keys before the chunk. Its queries are right of all of these.
    start, rows = tokens.stop - count, scores.query_lengths[0]
    if scores.window is not None:
        rows = min(rows, stop - 1 + scores.window - start)
        if rows <= 0:
            return None
    ahead = start + rows - stop
    return Part(slice(0, rows), keys, scores.of((rows,), (stop - begin,), ahead=ahead))
