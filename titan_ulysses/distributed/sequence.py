"""How a sequence of S tokens is described and cut among the P ranks that share it.

Data, model, attention and loss all need these few definitions, so this module imports none of them.

A sequence is cut into chunks first, and each chunk into P equal slices. With S = 12, P = 2 and
chunks of 4:

    tokens     0 1 | 2 3 | 4 5 | 6 7 | 8 9 | 10 11
    chunk      0     0     1     1     2     2
    rank       0     1     0     1     0     1

A rank holds its slices in order: rank 1 has tokens 2, 3, 6, 7, 10, 11. The ranks can then exchange
one chunk after the other, and each exchange gives a whole contiguous chunk (`memory/streaming.py`).
With one chunk, rank p holds tokens [p * S/P, (p + 1) * S/P).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token whose next token is not predicted, as in transformers."""

Documents = tuple[tuple[int, ...], ...]
"""Document lengths of each row, in order; the lengths of a row sum to S."""

AUTOMATIC_CHUNK_TOKENS = 4096
"""Tokens of a rank in a chunk whose size is chosen automatically.

A block's matrix products then have enough rows for any device, and no shorter slice is streamed.
"""


def chunk_length(stream_chunk_tokens: int, seq_len: int, degree: int) -> int | None:
    """Return the tokens of a chunk of the whole sequence, or None if all of it is one chunk.

    stream_chunk_tokens is the setting: 0 chooses `AUTOMATIC_CHUNK_TOKENS` a rank, -1 takes the
    whole sequence. Any other number is rounded up to a multiple of `degree` = P.
    """
    if stream_chunk_tokens == -1:
        return None
    chunk = -(-stream_chunk_tokens // degree) * degree or AUTOMATIC_CHUNK_TOKENS * degree
    return chunk if chunk < seq_len else None


def first_key(documents: tuple[int, ...], token: int, window: int | None) -> int:
    """Return the first token of a row that this token or later ones read: the first one of its
    document that is in its window, which counts the token itself.
    """
    starts = list(accumulate(documents, initial=0))
    start = starts[bisect_right(starts, token) - 1]
    return start if window is None else max(start, token - window + 1)


@dataclass(frozen=True)
class Reach:
    """Which tokens the queries of a chunk read: those of their documents so far, in a window."""

    documents: Documents
    window: int | None
    size: int
    """Tokens of a chunk; the last one may have fewer."""

    def of(self, chunk: slice) -> slice:
        """Return what a chunk of these tokens reads, its own included, in whole chunks."""
        first = min(first_key(row, chunk.start, self.window) for row in self.documents)
        return slice(first - first % self.size, chunk.stop)

    def most(self) -> int:
        """Return the most tokens that a chunk reads."""
        return _most_read(self)


@lru_cache(maxsize=64)
def _most_read(reach: Reach) -> int:
    chunks = chunks_of(sum(reach.documents[0]), 1, reach.size)
    return max(x.stop - x.start for x in (reach.of(chunk.whole) for chunk in chunks))


@dataclass(frozen=True)
class Chunk:
    """A chunk of the sequence that a block computes, alone, after those before it."""

    index: int
    whole: slice
    """Its tokens in the whole sequence."""
    local: slice
    """Its tokens on this rank, among the T of the rank."""
    seq_len: int
    size: int
    """Tokens of a chunk of the whole sequence; the last one may have fewer."""
    goal: Literal["output", "keys", "gradient"] = "output"
    """What the block computes: its output; only the keys and values of its attention, which then
    raises `KeysKnown`; or its output as a graph for autograd, given the keys that it reads.
    """
    reader: slice | None = None
    """The tokens of the chunk whose queries read its keys next; None: of itself."""
    reach: Reach | None = None
    """What the block's attention reads, where that is known from its forward."""
    keys_known: bool = False
    """Whether its keys have been computed, and are remembered."""
    memory: dict[Any, Any] = field(default_factory=dict)
    """What the modules of the block remember from chunk to chunk, by module."""
    states: dict[Any, Sequence[Tensor]] = field(default_factory=dict)
    """The states of layers before each chunk [C, B, ...], kept until backward."""
    store: SequenceTensors | None = None
    """Where tensors of the whole sequence are; None: on the device."""
    kept: Kept | None = None
    """What they keep from the forward of this call of the block until its backward."""


class Remembered(Protocol):
    """What attention remembers of the chunks of a sequence."""

    @property
    def reach(self) -> Reach:
        """What it reads of them."""


class SequenceTensors(Protocol):
    """Makes tensors of the whole sequence, and reads and writes parts of them."""

    device: torch.device
    """that of the run"""

    @property
    def is_direct(self) -> bool:
        """Whether the tensors can be used as they are, without copies to the device."""

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a tensor of undefined values."""

    def read(self, part: Tensor, ahead: Tensor | None = None) -> Tensor:
        """Return a part on the device; `ahead` is the part that is read next."""

    def write(self, part: Tensor, values: Tensor) -> None:
        """Write values to a part. They must not change afterwards."""


class Kept(Protocol):
    """Keeps tensors from forward to backward."""

    def put(self, key: Any, tensors: Sequence[Tensor]) -> None:
        """Keep the tensors, if there is room."""

    def get(self, key: Any, *, last: bool) -> list[Tensor] | None:
        """Return what was put, or None; after the last use it is not kept any longer."""


class KeysKnown(Exception):
    """Ends the forward of a block where nothing more is needed of it."""


current_chunk: ContextVar[Chunk | None] = ContextVar("current_chunk", default=None)
"""The chunk that the running part of the model computes; None if it computes the whole sequence."""


@contextmanager
def running(chunk: Chunk) -> Iterator[None]:
    """Say that a part of the model computes this chunk in this context."""
    token = current_chunk.set(chunk)
    try:
        yield
    finally:
        current_chunk.reset(token)


current_chunks: ContextVar[Sequence[Chunk]] = ContextVar("current_chunks", default=())
"""The chunks of the sequence that the running forward of the model computes."""


def chunks_of(seq_len: int, degree: int, chunk_tokens: int | None) -> list[Chunk]:
    """Return the chunks of a sequence of S tokens on one of P = degree ranks, in order."""
    size = chunk_tokens or seq_len
    wholes = [slice(start, min(start + size, seq_len)) for start in range(0, seq_len, size)]
    return [
        Chunk(index, whole, slice(whole.start // degree, whole.stop // degree), seq_len, size)
        for index, whole in enumerate(wholes)
    ]


def local_slice(
    whole: Tensor, *, rank: int, degree: int, chunk_tokens: int | None = None, dim: int = 1
) -> Tensor:
    """Return the tokens of one sequence-parallel rank: [B, S, ...] -> [B, T, ...].

    T = S / P. P must divide S and chunk_tokens, the size of a chunk (the last one may be smaller);
    None means one chunk. `rank` is the rank's place among the `degree` = P ranks that share the
    sequence, and `dim` is the dimension of the tokens. The result is a view if there is one chunk
    or one rank. `join_slices` is the inverse.
    """
    if degree == 1:
        return whole
    slices = []
    for chunk in whole.split(chunk_tokens or max(1, whole.shape[dim]), dim):
        tokens, rest = divmod(chunk.shape[dim], degree)
        assert rest == 0, (whole.shape, chunk_tokens, degree)
        slices.append(chunk.narrow(dim, rank * tokens, tokens))
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim)


def padded(whole: Tensor, degree: int, dim: int = 1) -> Tensor:
    """Return the tensor with zeros behind its tokens, up to a multiple of degree = P."""
    missing = -whole.shape[dim] % degree
    shape = [missing if i == dim % whole.ndim else n for i, n in enumerate(whole.shape)]
    return torch.cat([whole, whole.new_zeros(shape)], dim) if missing else whole


def join_slices(
    slices: Sequence[Tensor], *, chunk_tokens: int | None = None, dim: int = 1
) -> Tensor:
    """Return the whole sequence [B, S, ...] from all ranks' slices [B, T, ...], in rank order."""
    if chunk_tokens is None or len(slices) == 1:
        return torch.cat(list(slices), dim=dim)
    of_chunks = zip(*(x.split(chunk_tokens // len(slices), dim) for x in slices), strict=True)
    return torch.cat([part for chunk in of_chunks for part in chunk], dim=dim)
