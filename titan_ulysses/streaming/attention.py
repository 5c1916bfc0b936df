"""Attention of one chunk of the sequence, for the queries of this rank.

The chunk's keys and values join those of the layer that are still read (`keys.py`), and its queries
attend to the keys of their documents so far. In backward the chunks come from the last to the
first. The gradients of a chunk's keys and values are then complete as soon as its own queries have
added to them, because no earlier query can see these keys.

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

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan_ulysses.streaming.keys import KeyBlocks, KeysAndValues
from titan_ulysses.ulysses.heads import HeadPlan
from titan_ulysses.ulysses.pieces import sinks_gradient, with_sinks
from titan_ulysses.ulysses.scores import PieceKernels, Scores, visible_keys
from titan_ulysses.ulysses.sparse import summed_weights, weights_of_all
from titan_ulysses.ulysses.tiles import Merged


class KernelCall(NamedTuple):
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


class Overlap(NamedTuple):
    """What of a call a block of keys has to do with."""

    queries: slice
    """of those of the call"""
    keys: slice
    """of those of the block"""
    scores: Scores


class ChunkAttention(NamedTuple):
    """What the attention of a chunk needs to know beside its tensors."""

    pieces: PieceKernels
    keys: KeysAndValues
    chunk: slice
    """The chunk's tokens in the whole sequence."""
    plan: HeadPlan
    rank: int
    layer: dict[str, Any]
    """Of the layer: documents, scale, window, softcap, sinks; chosen [B, n, K] of the chunk."""
    sums: list[Tensor]
    """The log-sum-exps of the parts, once they are known."""
    outputs: Callable[[Callable[[], list[Tensor]]], list[Tensor]]
    """Returns what a function computes, or what was kept of it."""

    def calls(self) -> list[KernelCall]:
        """Return what this rank computes."""
        calls, window = [], self.layer["window"]
        options = {name: self.layer[name] for name in ("scale", "window", "softcap")}
        tokens = (self.chunk.stop - self.chunk.start) // self.plan.degree
        for part, (sources, heads) in enumerate(self.plan.parts[self.rank]):
            start, stop = (self.chunk.start + tokens * x for x in (sources.start, sources.stop))
            for row, documents in enumerate(self.layer["documents"]):
                seen, n, m = visible_keys(documents, start, stop, window)
                chosen = self.layer["chosen"]
                if chosen is not None:
                    at = slice(start - self.chunk.start, stop - self.chunk.start)
                    chosen = chosen[row, at] - seen.start
                scores = Scores(n, m, **options, chosen=chosen)
                for queries, keys in self.plan.runs(self.rank, part):
                    sinks = slice(heads.start + queries.start, heads.start + queries.stop)
                    calls.append(KernelCall(part, row, queries, keys, sinks, seen, scores))
        return calls

    def blocks(
        self, calls: Sequence[KernelCall]
    ) -> Iterator[tuple[slice, Sequence[Tensor], list[tuple[int, Overlap]]]]:
        """Yield each block of keys that the calls see: its tokens, its k and v, and the index of
        each call that sees some of it, with what it has to do with the block.
        """
        if not calls:
            return
        first, last = min(x.tokens.start for x in calls), max(x.tokens.stop for x in calls)
        for block, tensors in self.keys.read(slice(first, last)):
            found = ((i, overlap_of(call, block, self.chunk)) for i, call in enumerate(calls))
            yield block, tensors, [(i, overlap) for i, overlap in found if overlap is not None]

    def forward(self, queries: Sequence[Tensor], head_size: int) -> list[Tensor]:
        """Return the outputs [B, n, h, Dv] of all parts, then their log-sum-exps [B, h, n].

        head_size: that of values, Dv.
        """
        calls, sinks = self.calls(), self.layer["sinks"]
        found = [MergedResults(sum(call.scores.query_lengths)) for call in calls]
        for _, tensors, overlaps in self.blocks(calls):
            for i, overlap in overlaps:
                call = calls[i]
                q = queries[call.part][call.row, overlap.queries, call.queries]
                k, v = (x[call.row, overlap.keys, call.keys] for x in tensors)
                found[i].add(overlap.queries, *self.pieces.forward(q, k, v, overlap.scores))
        outputs, sums = [], []
        for part, q in enumerate(queries):
            mine = [
                (call, *merged.end())
                for call, merged in zip(calls, found, strict=True)
                if call.part == part
            ]
            if sinks is not None:
                mine = [(x, *with_sinks(output, lse, sinks[x.sinks])) for x, output, lse in mine]
            if len(mine) == 1:
                output, lse = (x[None] for x in mine[0][1:])
            else:
                rows, tokens, heads = q.shape[:3]
                wide = torch.promote_types(q.dtype, torch.float32)
                output = q.new_empty(rows, tokens, heads, head_size)
                lse = q.new_empty(rows, heads, tokens, dtype=wide)
                for call, o, s in mine:
                    output[call.row, :, call.queries] = o
                    lse[call.row, call.queries] = s
            outputs.append(output)
            sums.append(lse)
        return outputs + sums

    def summed_weights(self, queries: Sequence[Tensor]) -> Tensor:
        """Return the attention [B, n, K] of the chunk's queries to the keys that they chose, summed
        over the heads of this rank.
        """
        calls, chosen, sums = self.calls(), self.layer["chosen"], self.sums
        found = torch.zeros_like(chosen, dtype=sums[0].dtype)
        for _, (keys, _), overlaps in self.blocks(calls):
            for i, overlap in overlaps:
                call = calls[i]
                q = queries[call.part][call.row, overlap.queries, call.queries]
                k = keys[call.row, overlap.keys, call.keys]
                lse = sums[call.part][call.row, call.queries, overlap.queries]
                tokens = len(queries[call.part][call.row])
                first = call.tokens.stop - tokens - self.chunk.start + overlap.queries.start
                place = found[call.row, first : first + len(q)]
                place += summed_weights(q, k, overlap.scores, lse)
        return found

    def weights_of_all(
        self, queries: Sequence[Tensor], keys: Tensor, row: int, own: slice, part: slice
    ) -> Tensor:
        """Return the attention [P, n, m] of this rank's heads to part of a block of keys, for some
        of each rank's tokens of the chunk, `own`.
        """
        tokens = (self.chunk.stop - self.chunk.start) // self.plan.degree
        count = own.stop - own.start
        found = self.sums[0].new_zeros(self.plan.degree, count, part.stop - part.start)
        for i, (sources, _) in enumerate(self.plan.parts[self.rank]):
            for owner in sources:
                first = (owner - sources.start) * tokens + own.start
                mine = slice(first, first + count)
                for of_q, of_k in self.plan.runs(self.rank, i):
                    pair = queries[i][row, mine, of_q], keys[row, part, of_k]
                    lse = self.sums[i][row, of_q, mine]
                    found[owner] += weights_of_all(*pair, lse, self.layer["scale"])
        return found

    def backward(
        self,
        grads: Sequence[Tensor],
        queries: Sequence[Tensor],
        outputs: Sequence[Tensor],
        sums: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return the gradients of the queries, and add those of the keys to what is known."""
        calls, by_blocks = self.calls(), isinstance(self.keys, KeyBlocks)
        dqs = [
            torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
            if by_blocks
            else torch.empty_like(q)
            for q in queries
        ]
        for block, tensors, overlaps in self.blocks(calls):
            gradients = self.keys.gradients_of(block)
            for i, overlap in overlaps:
                call = calls[i]
                at = call.row, overlap.queries, call.queries
                grad, q, output, dq = (x[call.part][at] for x in (grads, queries, outputs, dqs))
                lse = sums[call.part][call.row, call.queries, overlap.queries]
                k, v, dk, dv = (
                    x[call.row, overlap.keys, call.keys] for x in (*tensors, *gradients)
                )
                own = self.pieces.backward(grad, q, k, v, output, lse, overlap.scores, dk=dk, dv=dv)
                if by_blocks:
                    dq.add_(own)
                else:
                    dq.copy_(own)
            self.keys.put_gradients(block, gradients)
        return [dq.to(q.dtype) for dq, q in zip(dqs, queries, strict=True)]


def overlap_of(call: KernelCall, block: slice, chunk: slice) -> Overlap | None:
    """Return what the queries of a call compute with a block of keys, or None if they see none of
    them. chunk: the tokens of the queries' own chunk.
    """
    scores, tokens = call.scores, call.tokens
    begin, stop = max(tokens.start, block.start), min(tokens.stop, block.stop)
    count = sum(scores.query_lengths)
    if begin >= stop:
        return None
    keys = slice(begin - block.start, stop - block.start)
    if block.stop > chunk.start:
        first = scores.key_lengths[0] - (begin - tokens.start)
        own = scores.of(scores.query_lengths, (first, *scores.key_lengths[1:]))
        return Overlap(slice(0, count), keys, own.among(begin - tokens.start))
    # Only the first document has keys before the chunk. Its queries are right of all of these.
    start, rows = tokens.stop - count, scores.query_lengths[0]
    if scores.window is not None:
        rows = min(rows, stop - 1 + scores.window - start)
        if rows <= 0:
            return None
    ahead = start + rows - stop
    own = scores.of((rows,), (stop - begin,), ahead=ahead)
    return Overlap(slice(0, rows), keys, own.among(begin - tokens.start, rows))


class MergedResults:
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


def attend(
    call: ChunkAttention, k: Tensor, v: Tensor, queries: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the outputs [B, n, h, Dv] of the parts of this rank's queries [B, n, h, D].

    k and v are the chunk's own, which `call.keys` has already: they get gradients.
    """
    return _Attention.apply(call, call.layer["sinks"], k, v, *queries)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, call: ChunkAttention, sinks: Tensor | None, k: Tensor, v: Tensor, *queries: Tensor
    ) -> tuple[Tensor, ...]:
        results = call.outputs(lambda: call.forward(queries, v.shape[-1]))
        call.sums[:] = results[len(queries) :]
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
        dqs = call.backward(grads, queries, outputs, sums)
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        for one in call.calls() if sinks is not None else ():
            grad, output = (x[one.part][one.row, :, one.queries] for x in (grads, outputs))
            lse, of_heads = sums[one.part][one.row, one.queries], sinks[one.sinks]
            dsinks[one.sinks] += sinks_gradient(grad, output, lse, of_heads)
        return None, dsinks, *call.keys.complete_gradients(call.chunk), *dqs
