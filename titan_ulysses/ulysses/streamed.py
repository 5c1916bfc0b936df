"""Attention of one chunk of the sequence, for the heads of this rank (see memory/streaming.py).

The chunk's keys and values are appended to those of the layer, and its queries attend to the keys
of their documents so far. In backward the chunks come from the last to the first. The gradients of
a chunk's keys and values are then complete as soon as its own queries have added to them, because
no earlier query can see these keys.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan_ulysses.distributed.sequence import Chunk, KeysKnown
from titan_ulysses.ulysses.pieces import Pieces, sinks_gradient, with_sinks

Runs = Sequence[tuple[slice, slice]]
"""Slices (query heads, KV heads), each of which one call of a kernel can compute."""


def attend_chunk(
    pieces: Pieces,
    module: nn.Module,
    chunk: Chunk,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: dict[str, Any],
    runs: Runs,
) -> Tensor:
    """Return the attention [B, n, Hq, Dv] of a chunk's queries q [B, n, Hq, D].

    k [B, n, Hkv, D] and v [B, n, Hkv, Dv] are those of the chunk; earlier calls for the same layer,
    `module`, have kept those before. `layer` is as for a core, with sinks [Hq]. Raises `KeysKnown`
    if only keys and values are wanted.
    """
    known = chunk.memory.setdefault(module, KeysAndValues(chunk.seq_len))
    known.put(chunk.whole, k, v)
    if chunk.goal == "keys":
        raise KeysKnown
    options = {name: layer[name] for name in ("scale", "window", "softcap")}
    first, stop = chunk.whole.start, chunk.whole.stop
    seen = [_seen(row, first, stop, layer["window"]) for row in layer["documents"]]
    call = _Call(pieces, known, chunk.whole, seen, options, runs)
    return _Attention.apply(call, q, k, v, layer["sinks"])


class KeysAndValues:
    """The keys and values of a layer for this rank's KV heads, and in backward their gradients."""

    def __init__(self, seq_len: int):
        self._seq_len = seq_len
        self._tensors: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def put(self, tokens: slice, k: Tensor, v: Tensor) -> None:
        """Keep k and v [B, n, Hkv, D] of these tokens."""
        if not self._tensors:
            self._tensors = [x.new_empty(len(x), self._seq_len, *x.shape[2:]) for x in (k, v)]
        for whole, x in zip(self._tensors, (k, v), strict=True):
            whole[:, tokens] = x.detach()

    def of(self, row: int, tokens: slice, heads: slice) -> list[Tensor]:
        """Return k and v [n, heads, D] of tokens of a row."""
        return [x[row, tokens, heads] for x in self._tensors]

    def gradients_of(self, row: int, tokens: slice, heads: slice) -> list[Tensor]:
        """Return the sums of gradients that belong to `of`, to be added to; fp32 or wider."""
        if not self._gradients:
            wide = torch.promote_types(self._tensors[0].dtype, torch.float32)
            self._gradients = [torch.zeros_like(x, dtype=wide) for x in self._tensors]
        return [x[row, tokens, heads] for x in self._gradients]

    def complete_gradients(self, tokens: slice) -> list[Tensor]:
        """Return the gradients [B, n, Hkv, D] of k and v, in their dtype, once they are complete."""
        pairs = zip(self._gradients, self._tensors, strict=True)
        return [gradient[:, tokens].to(x.dtype) for gradient, x in pairs]


class _Seen(NamedTuple):
    """The keys of a row that a chunk's queries see."""

    keys: slice
    """All of them, in the whole sequence; one document follows the other."""
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


@lru_cache(maxsize=64)
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
    tokens: slice
    seen: list[_Seen]
    """For each row."""
    options: dict[str, Any]
    runs: Runs


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None):
        rows, sums = [], []
        for row, (keys, query_lengths, key_lengths) in enumerate(call.seen):
            parts = []
            for queries, heads in call.runs:
                output, lse = call.pieces.forward(
                    q[row, :, queries],
                    *call.known.of(row, keys, heads),
                    query_lengths=query_lengths,
                    key_lengths=key_lengths,
                    **call.options,
                )
                if sinks is not None:
                    output, lse = with_sinks(output, lse, sinks[queries])
                parts.append((output, lse))
            outputs, lses = zip(*parts, strict=True)
            rows.append(outputs[0] if len(parts) == 1 else torch.cat(outputs, dim=1))
            sums.append(lses[0] if len(parts) == 1 else torch.cat(lses))
        output = rows[0][None] if len(rows) == 1 else torch.stack(rows)
        ctx.call = call
        ctx.save_for_backward(q, sinks, output, *sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        call, (q, sinks, output, *sums) = ctx.call, ctx.saved_tensors
        dq = torch.empty_like(q)
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        for row, (keys, query_lengths, key_lengths) in enumerate(call.seen):
            for queries, heads in call.runs:
                mine = grad[row, :, queries], output[row, :, queries], sums[row][queries]
                dk, dv = call.known.gradients_of(row, keys, heads)
                dq[row, :, queries] = call.pieces.backward(
                    mine[0],
                    q[row, :, queries],
                    *call.known.of(row, keys, heads),
                    *mine[1:],
                    dk=dk,
                    dv=dv,
                    query_lengths=query_lengths,
                    key_lengths=key_lengths,
                    **call.options,
                )
                if sinks is not None:
                    dsinks[queries] += sinks_gradient(*mine, sinks[queries])
        return None, dq, *call.known.complete_gradients(call.tokens), dsinks
