"""Attention of one chunk of the sequence, for the queries of this rank (see memory/streaming.py).

The chunk's keys and values join those of the layer that are still read, and its queries attend to
the keys of their documents so far. In backward the chunks come from the last to the first. The
gradients of a chunk's keys and values are then complete as soon as its own queries have added to
them, because no earlier query can see these keys.

A rank has the keys and values of the KV heads that its queries read, as `heads.deal_heads` gives
them: of one layer S * hkv_p * (D + Dv) numbers, hkv_p < Hkv / P + 2. Of chunks that no query reads
any more, because a window or the end of a document hides them, nothing is held.

The wire: q, k and v of a chunk go to the ranks of their heads in one all-to-all. In backward keys
and values are sent alone first, in the sweep that computes them again, and then, in the chunk's own
turn, queries alone, so q, k and v travel once in forward and once in backward. The keys and values
of forward would have to be kept for all layers at once not to be sent again.

In numbers that this rank gives to all-to-alls, with n tokens of a chunk, t = n / P of them on each
rank, and K = P + Hkv - gcd(P, Hkv), the KV heads that all ranks have together:

    forward    t (D Hq + (D + Dv) K) of q, k and v, and t Dv Hq of the output
    backward   the same again, t Dv Hq of the output's gradient, and of the gradients of q, k and v
               t D Hq + n (D + Dv) hkv_p
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_ulysses.distributed.sequence import (
    Chunk,
    Documents,
    KeysKnown,
    Reach,
    SequenceTensors,
    first_key,
)
from titan_ulysses.ulysses.cores import Core
from titan_ulysses.ulysses.exchange import (
    SEQUENCE,
    heads_to_sequence,
    keys_to_heads,
    sequence_to_heads,
)
from titan_ulysses.ulysses.heads import HeadPlan, deal_heads
from titan_ulysses.ulysses.key_blocks import (
    RESIDENT_CHUNKS,
    KeyBlocks,
    MergedParts,
    Part,
    part_of,
)
from titan_ulysses.ulysses.pieces import pieces_of, sinks_gradient, with_sinks
from titan_ulysses.ulysses.scores import Pieces, Scores


def attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: Chunk,
    module: nn.Module,
    mesh: DeviceMesh,
    core: Core,
    *,
    documents: Documents,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute a layer's attention for the queries of a chunk: -> [B, t, Hq, Dv].

    q is [B, t, Hq, D], k [B, t, Hkv, D] and v [B, t, Hkv, Dv]: this rank's t tokens of the chunk.
    core must have pieces. Earlier calls for the same `module` have kept what is read of the chunks
    before. Raises `KeysKnown` where only keys and values are wanted.
    """
    pieces = pieces_of(core)
    assert pieces is not None, core
    plan = deal_heads(q.shape[2], k.shape[2], mesh.size())
    reach = chunk.reach or Reach(documents, window, chunk.size)
    known = chunk.memory.get(module)
    if known is None:
        known = chunk.memory[module] = _remember(reach, chunk)
    assert isinstance(known, KeysAndValues | KeyBlocks)
    known.hold(reach.of(chunk.reader or chunk.whole))
    queries, k, v = _to_heads(q, k, v, chunk, mesh, plan, known)
    if not chunk.keys_known:
        known.put(chunk.whole, k, v)
    if chunk.goal == "keys":
        raise KeysKnown
    rank = 0 if mesh.size() == 1 else mesh.get_local_rank()
    options = {"scale": scale, "window": window, "softcap": softcap}
    call = _Call(pieces, known, chunk, (chunk.index, module), plan, rank, documents, options)
    outputs = _Attention.apply(call, sinks, k, v, *queries)
    if mesh.size() == 1:
        return outputs[0]
    return heads_to_sequence(outputs, plan, mesh).to_local()


def _to_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: Chunk,
    mesh: DeviceMesh,
    plan: HeadPlan,
    known: KeysAndValues | KeyBlocks,
) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """Return this rank's queries (for each part of the plan), keys and values of all the chunk."""
    if mesh.size() == 1:
        return (q,), k, v
    q, k, v = (DTensor.from_local(x, mesh, (SEQUENCE,), run_check=False) for x in (q, k, v))
    if chunk.goal == "keys":
        return (), *keys_to_heads(k, v, plan)
    here = known.of(chunk.whole) if chunk.keys_known else None
    return sequence_to_heads(q, k, v, plan, known=here)


def _remember(reach: Reach, chunk: Chunk) -> KeysAndValues | KeyBlocks:
    """Return what remembers the keys and values of a layer."""
    store = chunk.store
    if store is None or store.is_direct:
        return KeysAndValues(reach, store)
    few = reach.most() <= RESIDENT_CHUNKS * chunk.size
    return KeysAndValues(reach, None) if few else KeyBlocks(reach, store)


class KeysAndValues:
    """The keys and values of a layer that are still read, and in backward their gradients.

    They are of this rank's KV heads, and of one range of tokens, which moves through the sequence.
    """

    def __init__(self, reach: Reach, store: SequenceTensors | None):
        """store makes their memory; None: it is on the device of the first keys."""
        self.reach, self._store, self._tokens = reach, store, slice(0, 0)
        self._tensors: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def hold(self, tokens: slice) -> None:
        """Hold these tokens from now on, which are at most `reach.most()`, and forget others."""
        before, self._tokens = self._tokens, tokens
        if before.start == tokens.start:
            return
        for x in self._tensors + self._gradients:
            _move(x, before, tokens, self.reach.size)
        kept = slice(max(before.start, tokens.start), min(before.stop, tokens.stop))
        for x in self._gradients:
            x[:, : kept.start - tokens.start] = 0
            x[:, max(0, kept.stop - tokens.start) :] = 0

    def put(self, tokens: slice, k: Tensor, v: Tensor) -> None:
        """Keep k and v [B, n, Hkv, D] of these tokens."""
        if not self._tensors:
            for x in (k, v):
                shape = torch.Size((len(x), self.reach.most(), *x.shape[2:]))
                self._tensors.append(self._empty(shape, x, x.dtype))
        for whole, x in zip(self.of(tokens), (k, v), strict=True):
            whole.copy_(x.detach())

    def of(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """Return k and v [B, n, Hkv, D] of tokens that are held."""
        k, v = (x[:, self._places(tokens)] for x in self._tensors)
        return k, v

    def read(self, tokens: slice) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
        """Yield blocks of tokens that are held, each with its k and v: here a single block."""
        yield tokens, self.of(tokens)

    def gradients_of(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """Return the sums of gradients that belong to `of`, to be added to; fp32 or wider."""
        if not self._gradients:
            wide = torch.promote_types(self._tensors[0].dtype, torch.float32)
            self._gradients = [self._empty(x.shape, x, wide).zero_() for x in self._tensors]
        dk, dv = (x[:, self._places(tokens)] for x in self._gradients)
        return dk, dv

    def put_gradients(self, tokens: slice, gradients: Sequence[Tensor]) -> None:
        """Keep what `gradients_of` returned: here they were added to in place."""

    def complete_gradients(self, tokens: slice) -> list[Tensor]:
        """Return the gradients [B, n, Hkv, D] of k and v, once they are complete."""
        pairs = zip(self.gradients_of(tokens), self._tensors, strict=True)
        return [gradient.to(x.dtype) for gradient, x in pairs]

    def _empty(self, shape: torch.Size, like: Tensor, dtype: torch.dtype) -> Tensor:
        if self._store is None:
            return like.new_empty(shape, dtype=dtype)
        return self._store.empty(shape, dtype)

    def _places(self, tokens: slice) -> slice:
        return slice(tokens.start - self._tokens.start, tokens.stop - self._tokens.start)


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


class _Seen(NamedTuple):
    """The keys of a row that some queries see."""

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
    begin = first_key(documents, start, window)
    lengths = tuple(b - a for a, b in pairwise([start, *starts[first + 1 : last], stop]))
    return _Seen(slice(begin, stop), lengths, (lengths[0] + start - begin, *lengths[1:]))


class _Piece(NamedTuple):
    """What one call of a kernel computes: queries of one row and part, and of one run of heads."""

    part: int
    row: int
    queries: slice
    """heads among those of the part"""
    keys: slice
    """KV heads among those of the rank"""
    sinks: slice
    """heads among all query heads"""
    tokens: slice
    """the keys that are seen, in the whole sequence"""
    scores: Scores


class _Call(NamedTuple):
    """What the attention of a chunk needs to know beside its tensors."""

    pieces: Pieces
    known: KeysAndValues | KeyBlocks
    chunk: Chunk
    key: tuple
    """The name of what is kept of this call."""
    plan: HeadPlan
    rank: int
    documents: Documents
    options: dict
    """Of the layer's `Scores`."""

    def work(self) -> Iterator[_Piece]:
        """Yield what this rank computes."""
        whole = self.chunk.whole
        tokens = (whole.stop - whole.start) // self.plan.degree
        for part, (sources, heads) in enumerate(self.plan.parts[self.rank]):
            start, stop = (whole.start + tokens * x for x in (sources.start, sources.stop))
            for row, documents in enumerate(self.documents):
                seen = _seen(documents, start, stop, self.options["window"])
                scores = Scores(seen.query_lengths, seen.key_lengths, **self.options)
                for queries, keys in self.plan.runs(self.rank, part):
                    sinks = slice(heads.start + queries.start, heads.start + queries.stop)
                    yield _Piece(part, row, queries, keys, sinks, seen.keys, scores)

    def parts(
        self, work: Sequence[_Piece], block: slice, keys: Sequence[Tensor]
    ) -> Iterator[tuple[int, Part, list[Tensor]]]:
        """Yield the index of each piece that sees keys of a block, its part of the block, and that
        part of tensors [B, n, Hkv, ...] of the block's keys.
        """
        for index, piece in enumerate(work):
            part = part_of(piece.scores, piece.tokens, block, self.chunk.whole)
            if part is not None:
                yield index, part, [x[piece.row, part.keys, piece.keys] for x in keys]

    def attend(
        self, queries: Sequence[Tensor], sinks: Tensor | None, head_size: int
    ) -> list[Tensor]:
        """Return the outputs [B, n, h, Dv] of all parts, then their log-sum-exps [B, h, n].

        head_size: that of values, Dv.
        """
        work = [*self.work()]
        found = [MergedParts(sum(piece.scores.query_lengths)) for piece in work]
        for block, tensors in self.known.read(_span(work)):
            for index, part, keys in self.parts(work, block, tensors):
                piece = work[index]
                q = queries[piece.part][piece.row, part.queries, piece.queries]
                found[index].add(part.queries, *self.pieces.forward(q, *keys, part.scores))
        results: list[tuple[Tensor, Tensor]] = []
        for number, of_part in enumerate(queries):
            mine = [x for x in zip(work, found, strict=True) if x[0].part == number]
            if len(mine) == 1:
                output, lse = _with_sinks(*mine[0], sinks)
                results.append((output[None], lse[None]))
                continue
            results.append(_empty(of_part, head_size))
            for piece, merged in mine:
                output, lse = _with_sinks(piece, merged, sinks)
                results[number][0][piece.row, :, piece.queries] = output
                results[number][1][piece.row, piece.queries] = lse
        return [*chain(*zip(*results, strict=True))]

    def differentiate(
        self,
        grads: Sequence[Tensor],
        queries: Sequence[Tensor],
        outputs: Sequence[Tensor],
        sums: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return the gradients of the queries, and add those of the keys to what is known."""
        work = [*self.work()]
        by_blocks = isinstance(self.known, KeyBlocks)
        dqs = [
            torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
            if by_blocks
            else torch.empty_like(q)
            for q in queries
        ]
        for block, tensors in self.known.read(_span(work)):
            gradients = self.known.gradients_of(block)
            for index, part, of_keys in self.parts(work, block, [*tensors, *gradients]):
                piece, (k, v, dk, dv) = work[index], of_keys
                at = piece.row, part.queries, piece.queries
                grad, q, output, dq = (x[piece.part][at] for x in (grads, queries, outputs, dqs))
                lse = sums[piece.part][piece.row, piece.queries, part.queries]
                found = self.pieces.backward(grad, q, k, v, output, lse, part.scores, dk=dk, dv=dv)
                if by_blocks:
                    dq.add_(found)
                else:
                    dq.copy_(found)
            self.known.put_gradients(block, gradients)
        return [dq.to(q.dtype) for dq, q in zip(dqs, queries, strict=True)]


def _span(work: Sequence[_Piece]) -> slice:
    """Return the tokens whose keys are seen."""
    if not work:
        return slice(0, 0)
    return slice(min(x.tokens.start for x in work), max(x.tokens.stop for x in work))


def _empty(q: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Return memory for an output [B, n, h, Dv] and its log-sum-exp [B, h, n]."""
    rows, tokens, heads = q.shape[:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(rows, heads, tokens, dtype=wide)
    return q.new_empty(rows, tokens, heads, head_size), lse


def _with_sinks(piece: _Piece, merged: MergedParts, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    found = merged.end()
    return found if sinks is None else with_sinks(*found, sinks[piece.sinks])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, call: _Call, sinks: Tensor | None, k: Tensor, v: Tensor, *queries: Tensor
    ) -> tuple[Tensor, ...]:
        chunk, kept, results = call.chunk, call.chunk.kept, None
        if kept is not None:
            results = kept.get(call.key, last=chunk.goal == "gradient")
        if results is None:
            results = call.attend(queries, sinks, v.shape[-1])
            if kept is not None and chunk.goal == "output":
                kept.put(call.key, results)
        ctx.call = call
        ctx.save_for_backward(sinks, *queries, *results)
        return tuple(results[: len(queries)])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        call, (sinks, *saved) = ctx.call, ctx.saved_tensors
        queries, outputs, sums = (
            saved[i : i + len(grads)] for i in range(0, 3 * len(grads), len(grads))
        )
        dqs = call.differentiate(grads, queries, outputs, sums)
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        for piece in call.work() if sinks is not None else ():
            grad, output = (x[piece.part][piece.row, :, piece.queries] for x in (grads, outputs))
            lse, of_heads = sums[piece.part][piece.row, piece.queries], sinks[piece.sinks]
            dsinks[piece.sinks] += sinks_gradient(grad, output, lse, of_heads)
        return None, dsinks, *call.known.complete_gradients(call.chunk.whole), *dqs
