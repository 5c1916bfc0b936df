"""The keys and values of a layer that chunks read, and in backward the sums of their gradients.

`KeysAndValues` has them where they are computed with. With `memory.stream_offload` on a GPU,
`KeyBlocks` has them in the store of the hidden states (`memory/sequences.py`). The queries of a
chunk then attend to one block of keys after the other, while the next block is on its way. The
results merge by their log-sum-exps, and backward adds to one block of gradients at a time. So what
a layer needs on the device does not grow with the sequence.

The copies hide behind the kernels where a chunk has enough queries: a block of n keys is 2 n D
numbers of each KV head, and the queries of a chunk compute 4 n D FLOPs each with them, in backward
10 n D for 6 n D numbers, of which 4 n D are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from titan_ulysses.distributed.parts import visited_with_next
from titan_ulysses.distributed.sequence import Documents, chunks_of
from titan_ulysses.memory.sequences import Sequences
from titan_ulysses.ulysses.scores import first_key

BLOCK_TOKENS = 2**16
"""Tokens of a block, in whole chunks: fewer results to merge, and longer copies."""


@dataclass(frozen=True)
class AttentionSpan:
    """Which keys the queries of a chunk read: those of their documents so far, in a window."""

    documents: Documents
    window: int | None
    size: int
    """Tokens of a chunk; the last one may have fewer."""

    def of(self, chunk: slice) -> slice:
        """Return what a chunk of these tokens reads, its own included, in whole chunks."""
        first = min(first_key(row, chunk.start, self.window) for row in self.documents)
        return slice(first - first % self.size, chunk.stop)

    @property
    def longest(self) -> int:
        """The most tokens that a chunk reads."""
        return _longest(self)

    @property
    def seq_len(self) -> int:
        return sum(self.documents[0])


@lru_cache(maxsize=64)  # each layer asks, and each time all documents are gone through
def _longest(span: AttentionSpan) -> int:
    reads = (span.of(chunk.whole) for chunk in chunks_of(span.seq_len, 1, span.size))
    return max(tokens.stop - tokens.start for tokens in reads)


class KeysAndValues:
    """The keys and values of a layer that are still read, and in backward their gradients.

    They are of this rank's KV heads, and of one range of tokens, which moves through the sequence.
    """

    def __init__(self, span: AttentionSpan, sequences: Sequences):
        """sequences makes their memory."""
        self.span, self._sequences, self._tokens = span, sequences, slice(0, 0)
        self._tensors: list[Tensor] = []
        """k and v [B, n, Hkv, D]."""
        self._gradients: list[Tensor] = []
        """The sums of their gradients, in fp32 or wider."""

    def hold(self, tokens: slice) -> None:
        """Hold these tokens from now on, at most `span.longest` of them, and forget others."""
        before, self._tokens = self._tokens, tokens
        if before.start == tokens.start:
            return
        for x in self._tensors + self._gradients:
            _move(x, before, tokens, self.span.size)
        kept = slice(max(before.start, tokens.start), min(before.stop, tokens.stop))
        for x in self._gradients:
            x[:, : kept.start - tokens.start] = 0
            x[:, max(0, kept.stop - tokens.start) :] = 0

    def put(self, tokens: slice, *tensors: Tensor) -> None:
        """Keep k and v [B, n, Hkv, D] of the tokens of a chunk."""
        if not self._tensors:
            self._tensors = [self._empty(x, self.span.longest, x.dtype) for x in tensors]
        for whole, x in zip(self.of(tokens), tensors, strict=True):
            whole.copy_(x.detach())

    def of(self, tokens: slice) -> Sequence[Tensor]:
        """Return k and v [B, n, Hkv, D] of the tokens of a chunk."""
        return self._places(self._tensors, tokens)

    def read(self, tokens: slice) -> Iterator[tuple[slice, Sequence[Tensor]]]:
        """Yield blocks of tokens that are held, each with its k and v on the device. The last one
        ends with the chunk itself. Here there is a single block.
        """
        yield tokens, self.of(tokens)

    def gradients_of(self, block: slice) -> list[Tensor]:
        """Return the sums of the gradients of a block's k and v on the device, to be added to."""
        if not self._gradients:
            self._gradients = [x.zero_() for x in self._empty_sums()]
        return self._places(self._gradients, block)

    def put_gradients(self, block: slice, gradients: Sequence[Tensor]) -> None:
        """Keep what `gradients_of` returned: here they were added to in place."""

    def complete_gradients(self, tokens: slice) -> list[Tensor]:
        """Return the gradients [B, n, Hkv, D] of a chunk's k and v, once they are complete."""
        pairs = zip(self.gradients_of(tokens), self._tensors, strict=True)
        return [gradient.to(x.dtype) for gradient, x in pairs]

    def _empty(self, like: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        return self._sequences.empty(like, (len(like), tokens, *like.shape[2:]), dtype)

    def _empty_sums(self) -> list[Tensor]:
        wide = torch.promote_types(self._tensors[0].dtype, torch.float32)
        return [self._empty(x, x.shape[1], wide) for x in self._tensors]

    def _places(self, tensors: Sequence[Tensor], tokens: slice) -> list[Tensor]:
        """Return the memory of some tokens."""
        start = self._tokens.start
        return [x[:, tokens.start - start : tokens.stop - start] for x in tensors]


def _move(x: Tensor, before: slice, now: slice, size: int) -> None:
    """Move the tokens of x [B, n, ...] that both ranges have from their places in `before` to those
    in `now`. The ranges begin at multiples of `size`, so parts of that size do not overlap.
    """
    starts = range(max(before.start, now.start), min(before.stop, now.stop), size)
    for start in starts if before.start < now.start else reversed(starts):
        stop = min(start + size, before.stop, now.stop)
        x[:, start - now.start : stop - now.start] = x[
            :, start - before.start : stop - before.start
        ]


class KeyBlocks(KeysAndValues):
    """The same off the device.

    A block has the tokens of one or several chunks, for this rank's KV heads. There is memory for
    as many blocks as a chunk reads. A later block takes the place of one that is not read any more.
    """

    def __init__(self, span: AttentionSpan, sequences: Sequences):
        super().__init__(span, sequences)
        together, most = max(1, BLOCK_TOKENS // span.size), -(-span.longest // span.size)
        self._step = together * span.size
        """Tokens of a block."""
        # What a chunk reads may begin and end inside of a block.
        self._chunks_count = -(-(most + together - 1) // together) * together
        """Chunks that there is memory for."""
        self._summed: set[int] = set()
        """The first tokens of the blocks whose sums are in memory. All others are 0."""
        self._starts = range(0)
        """The first tokens of the blocks that `read` yields."""
        self._next: slice | None = None
        """The block that it yields next."""

    def hold(self, tokens: slice) -> None:
        self._summed = {
            x for x in self._summed if x < tokens.stop and x + self._step > tokens.start
        }

    def put(self, tokens: slice, *tensors: Tensor) -> None:
        if not self._tensors:
            count = self._chunks_count * self.span.size
            self._tensors = [self._empty(x, count, x.dtype) for x in tensors]
        for place, x in zip(self._places(self._tensors, tokens), tensors, strict=True):
            self._sequences.put(place, x.detach())

    def of(self, tokens: slice) -> Sequence[Tensor]:
        return self._fetch(self._tensors, tokens, None)

    def read(self, tokens: slice) -> Iterator[tuple[slice, Sequence[Tensor]]]:
        size, step = self.span.size, self._step
        end = min(-(-tokens.stop // size) * size, self.span.seq_len)
        self._starts = range(tokens.start - tokens.start % step, tokens.stop, step)
        blocks = [slice(start, min(start + step, end)) for start in self._starts]
        for block, self._next in visited_with_next(blocks):
            yield block, self._fetch(self._tensors, block, self._next)

    def gradients_of(self, block: slice) -> list[Tensor]:
        if block.start - block.start % self._step in self._summed:
            then = self._next if self._next and self._next.start in self._summed else None
            return self._fetch(self._gradients, block, then)
        self._gradients = self._gradients or self._empty_sums()
        return [
            torch.zeros(x.shape, dtype=x.dtype, device=self._sequences.device_of(x))
            for x in self._places(self._gradients, block)
        ]

    def put_gradients(self, block: slice, gradients: Sequence[Tensor]) -> None:
        for place, x in zip(self._places(self._gradients, block), gradients, strict=True):
            self._sequences.put(place, x)
        if self._next is None:  # now each of the blocks has been added to
            self._summed.update(self._starts)

    def _places(self, tensors: Sequence[Tensor], tokens: slice) -> list[Tensor]:
        size = self.span.size
        start = tokens.start // size % self._chunks_count * size
        return [x.narrow(1, start, tokens.stop - tokens.start) for x in tensors]

    def _fetch(self, tensors: Sequence[Tensor], block: slice, then: slice | None) -> list[Tensor]:
        ahead = [None] * len(tensors) if then is None else self._places(tensors, then)
        pairs = zip(self._places(tensors, block), ahead, strict=True)
        return [self._sequences.fetch(*pair) for pair in pairs]
