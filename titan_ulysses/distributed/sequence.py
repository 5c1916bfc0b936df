"""How a sequence of S tokens is described and cut among the P ranks that share it.

Data, model, attention and loss all need these few definitions, so this module imports none of them.

A sequence is cut into chunks first, and each chunk into P equal slices. With S = 12, P = 2 and
chunks of 4:

    tokens     0 1 | 2 3 | 4 5 | 6 7 | 8 9 | 10 11
    chunk      0     0     1     1     2     2
    rank       0     1     0     1     0     1

A rank holds its slices in order: rank 1 has tokens 2, 3, 6, 7, 10, 11. The ranks can then exchange
one chunk after the other, and each exchange gives a whole contiguous chunk (`streaming/`).
With one chunk, rank p holds tokens [p * S/P, (p + 1) * S/P).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Chunk:
    """A chunk of the sequence that a block computes, alone, after those before it."""

    index: int
    whole: slice
    """Its tokens in the whole sequence."""
    local: slice
    """Its tokens on this rank, among the T of the rank."""


current_chunks: ContextVar[Sequence[Chunk]] = ContextVar("current_chunks", default=())
"""The chunks that the running part of the model computes: those of the whole sequence, and inside a
streamed block one of them.

It is for what transformers calls without keywords: embeddings, the last norm, and routers. Layers
get it through their keyword `ulysses`.
"""


def current_chunk() -> Chunk | None:
    """Return the only chunk that is being computed; None: the whole sequence is."""
    chunks = current_chunks.get()
    return chunks[0] if len(chunks) == 1 else None


@contextmanager
def computing(chunks: Sequence[Chunk]) -> Iterator[None]:
    """Say that these chunks are computed in this context."""
    token = current_chunks.set(chunks)
    try:
        yield
    finally:
        current_chunks.reset(token)


def chunks_of(seq_len: int, degree: int, chunk_tokens: int | None) -> list[Chunk]:
    """Return the chunks of a sequence of S tokens on one of P = degree ranks, in order."""
    size = chunk_tokens or seq_len
    wholes = [slice(start, min(start + size, seq_len)) for start in range(0, seq_len, size)]
    return [
        Chunk(index, whole, slice(whole.start // degree, whole.stop // degree))
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


def padded(whole: Tensor, degree: int) -> Tensor:
    """Return [B, S, ...] with zeros behind its tokens, up to a multiple of degree = P."""
    rows, length, *others = whole.shape
    missing = -length % degree
    return torch.cat([whole, whole.new_zeros(rows, missing, *others)], 1) if missing else whole


def join_slices(
    slices: Sequence[Tensor], *, chunk_tokens: int | None = None, dim: int = 1
) -> Tensor:
    """Return the whole sequence [B, S, ...] from all ranks' slices [B, T, ...], in rank order."""
    if chunk_tokens is None or len(slices) == 1:
        return torch.cat(list(slices), dim=dim)
    of_chunks = zip(*(x.split(chunk_tokens // len(slices), dim) for x in slices), strict=True)
    return torch.cat([part for chunk in of_chunks for part in chunk], dim=dim)
