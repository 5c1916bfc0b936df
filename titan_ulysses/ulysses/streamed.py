"""Attention of one chunk of the sequence, for the heads of this rank (see memory/streaming.py).

The chunk's keys and values are appended to those of the layer, and its queries attend to the keys
of their documents so far. In backward the chunks come from the last to the first. The gradients of
a chunk's keys and values are then complete as soon as its own queries have added to them, because
no earlier query can see these keys.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan_ulysses.distributed.sequence import Chunk, Documents
from titan_ulysses.ulysses.cores import Core
from titan_ulysses.ulysses.pieces import Pieces, pieces_of, sinks_gradient, with_sinks


def chunk_core(core: Core, module: nn.Module, chunk: Chunk, heads: slice) -> Core:
    """Return a core for the queries of a chunk, in the place of `core`, which must have pieces.

    It takes q [B, n, Hq, D], k [B, n, Hkv, D] and v [B, n, Hkv, Dv] of the chunk, for a range of
    this rank's KV heads of a layer, `module`. Earlier calls have kept the keys and values of the
    chunks before. Where only keys and values are wanted, it returns nothing of meaning.
    """
    pieces = pieces_of(core)
    assert pieces is not None, core
    known = chunk.memory.setdefault((module, heads.start), KeysAndValues(chunk))

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        documents: Documents,
        sinks: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        known.put(chunk.whole, k, v)
        if chunk.goal == "keys":
            return q
        seen = [
            _seen(row, chunk.whole.start, chunk.whole.stop, options.get("window"))
            for row in documents
        ]
        key = chunk.index, module, heads.start
        call = _Call(pieces, known, chunk, key, seen, options)
        return _Attention.apply(call, q, k, v, sinks)

    # Pieces index with 64 bits. The heads of a run must not be divided among calls, which would
    # all return the gradients of the keys that they share.
    attend.any_size = True  # type: ignore[attr-defined]
    return attend


class KeysAndValues:
    """The keys and values of a layer for this rank's KV heads, and in backward their gradients."""

    def __init__(self, chunk: Chunk):
        self._seq_len, self._make = chunk.seq_len, chunk.make
        self._tensors: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def put(self, tokens: slice, k: Tensor, v: Tensor) -> None:
        """Keep k and v [B, n, Hkv, D] of these tokens."""
        if not self._tensors:
            for x in (k, v):
                shape = torch.Size((len(x), self._seq_len, *x.shape[2:]))
                self._tensors.append(self._make(shape, x, x.dtype))
        for whole, x in zip(self._tensors, (k, v), strict=True):
            whole[:, tokens] = x.detach()

    def of(self, row: int, tokens: slice) -> list[Tensor]:
        """Return k and v [n, Hkv, D] of tokens of a row."""
        return [x[row, tokens] for x in self._tensors]

    def gradients_of(self, row: int, tokens: slice) -> list[Tensor]:
        """Return the sums of gradients that belong to `of`, to be added to; fp32 or wider."""
        if not self._gradients:
            wide = torch.promote_types(self._tensors[0].dtype, torch.float32)
            self._gradients = [self._make(x.shape, x, wide).zero_() for x in self._tensors]
        return [x[row, tokens] for x in self._gradients]

    def complete_gradients(self, tokens: slice) -> list[Tensor]:
        """Return the gradients [B, n, Hkv, D] of k and v, once they are complete."""
        pairs = zip(self._gradients, self._tensors, strict=True)
        return [gradient[:, tokens].to(x.dtype) for gradient, x in pairs]


class _Seen(NamedTuple):
    """The keys of a row that a chunk's queries see."""

    keys: slice
    """All of them, in the whole sequence; one document follows the other."""
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


@lru_cache(maxsize=1024)
def _seen(documents: tuple[int, ...], start: int, stop: int, window: int | None) -> _Seen:
    """Return which keys the queries of tokens [start, stop) of a row see.

    Only the first of their documents can have begun before them. Of its earlier keys, those that
    the window hides from all queries are left out.
    """
    starts = list(accumulate(documents, initial=0))
    first, last = bisect_right(starts, start) - 1, bisect_left(starts, stop)
    begin = starts[first] if window is None else max(starts[first], start - window + 1)
    lengths = tuple(b - a for a, b in pairwise([start, *starts[first + 1 : last], stop]))
    return _Seen(slice(begin, stop), lengths, (lengths[0] + start - begin, *lengths[1:]))


class _Call(NamedTuple):
    """What the attention of a chunk needs to know beside its tensors."""

    pieces: Pieces
    known: KeysAndValues
    chunk: Chunk
    key: tuple
    """The name of what is kept of this call."""
    seen: list[_Seen]
    """The keys that are seen in each row."""
    options: dict[str, Any]

    def lengths(self, row: int) -> dict[str, tuple[int, ...]]:
        return {
            "query_lengths": self.seen[row].query_lengths,
            "key_lengths": self.seen[row].key_lengths,
        }

    def attend(self, q: Tensor, sinks: Tensor | None) -> list[Tensor]:
        """Return the output [B, n, Hq, Dv] and its log-sum-exps [B, Hq, n]."""
        rows = []
        for row, seen in enumerate(self.seen):
            keys = self.known.of(row, seen.keys)
            output, lse = self.pieces.forward(q[row], *keys, **self.lengths(row), **self.options)
            rows.append((output, lse) if sinks is None else with_sinks(output, lse, sinks))
        return [x[0][None] if len(x) == 1 else torch.stack(x) for x in zip(*rows, strict=True)]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None):
        chunk, kept, results = call.chunk, call.chunk.kept, None
        if kept is not None:
            results = kept.get(call.key, last=chunk.goal == "gradient")
        if results is None:
            results = call.attend(q, sinks)
            if kept is not None and chunk.goal == "output":
                kept.put(call.key, results)
        ctx.call = call
        ctx.save_for_backward(q, sinks, *results)
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        call, (q, sinks, output, sums) = ctx.call, ctx.saved_tensors
        dq = torch.empty_like(q)
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        for row, seen in enumerate(call.seen):
            dk, dv = call.known.gradients_of(row, seen.keys)
            dq[row] = call.pieces.backward(
                grad[row],
                q[row],
                *call.known.of(row, seen.keys),
                output[row],
                sums[row],
                dk=dk,
                dv=dv,
                **call.lengths(row),
                **call.options,
            )
            if sinks is not None:
                dsinks += sinks_gradient(grad[row], output[row], sums[row], sinks)
        return None, dq, *call.known.complete_gradients(call.chunk.whole), dsinks
