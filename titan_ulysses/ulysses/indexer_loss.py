"""The loss of an indexer: the divergence of its choice from the attention that it serves.

DeepSeek-V3.2 (arXiv 2512.02556, section 2.1.1) trains an indexer with

    L_I = sum_t KL(p_t || softmax(I_t))

where p_t is the attention of token t's heads to each key, summed over the heads and divided by its
sum. In the warm-up attention is dense, all keys count, and only indexers are trained. Then the
model learns with them, and the chosen keys alone count. p has no gradient, and the indexer's inputs
are detached from the graph: its parameters learn from L_I alone, and all others from the loss of
the model alone. Here a token counts as in the cross-entropy: those with a label, divided by the
labels of the whole step.

Each rank knows the attention of its heads to the keys of all tokens. The sum over the heads of all
ranks goes to the rank of the token, in one all-to-all of K numbers a token (in the warm-up, one for
each tile of all scores), which then differentiates the scores of its tokens. Gradients of keys go
back to the rank of the key in another one. Everything is computed in backward, by tiles, before the
backward of attention itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from titan_ulysses.distributed.parts import visited

BLOCK = 2048
"""Keys of a tile of all scores."""
TILE_NUMBERS = 2**24
"""The most scores of a tile, over all heads: 64 MiB in fp32."""

KeyBlocks = Callable[[bool], Iterable[tuple[slice, Tensor, Tensor | None]]]
"""(with gradients) -> blocks of tokens, their keys [B, n, D], and if asked for, the sums of their
gradients [B, n, D], to be added to.
"""


@dataclass
class IndexerScores:
    """What an indexer made of this rank's tokens; all but the choice have gradients."""

    queries: Tensor
    """[B, T, H, D]"""
    weights: Tensor
    """[B, T, H]"""
    keys: Tensor
    """[B, T, D]"""
    scale: float
    chosen: Tensor | None
    """[B, T, K]: the keys that each query reads, in the whole sequence; -1: none. None: all."""
    total: Tensor
    """[1] fp64: the loss, summed over this rank's tokens of all steps; it is added to"""

    def tiles(self, keys: int) -> Iterator[tuple[int, slice]]:
        """Yield rows and tiles of their queries, for so many keys at a time."""
        rows, tokens, heads = self.weights.shape
        size = max(1, TILE_NUMBERS // (heads * keys))
        starts = [(row, x) for row in range(rows) for x in range(0, tokens, size)]
        for row, x in visited(starts):
            yield row, slice(x, min(x + size, tokens))

    def of_tile(self, row: int, tile: slice, block: slice, keys: Tensor) -> tuple[Tensor, ...]:
        """Return for a tile which of its chosen keys are in a block of keys, their indices there,
        the keys [n, K, D], and the parts [n, H, K] of their scores.
        """
        assert self.chosen is not None
        indices = self.chosen[row, tile].long() - block.start
        here = (indices >= 0) & (indices < keys.shape[1])
        indices = indices.clamp(0, keys.shape[1] - 1)
        of_queries = keys[row][indices].to(self.queries.dtype)
        parts = torch.matmul(self.queries[row, tile], of_queries.transpose(1, 2))
        return here, indices, of_queries, parts.mul_(self.scale).relu_()


@torch.no_grad()
def differentiate(
    scores: IndexerScores, target: Tensor, share: Tensor, blocks: KeyBlocks
) -> tuple[Tensor, Tensor]:
    """Return the gradients of queries and weights, add those of keys to the sums that blocks has,
    and the loss to `scores.total`.

    target [B, T, K] is p, with any sum. share [B, T] is what each token's divergence counts.
    """
    found = torch.full_like(target, -torch.inf)  # the scores of the chosen keys
    count = target.shape[2]
    for block, keys, _ in blocks(False):
        for row, tile in scores.tiles(count):
            here, _, _, parts = scores.of_tile(row, tile, block, keys)
            weights = scores.weights[row, tile]
            own = torch.matmul(weights[:, None], parts)[:, 0].to(found.dtype)
            found[row, tile] = torch.where(here, own, found[row, tile])
    p = target / target.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    log_q = found.log_softmax(dim=-1)
    divergence = torch.where(p > 0, p * (p.log() - log_q), 0).sum(dim=-1)
    scores.total.add_((divergence * share).sum(dtype=torch.float64))
    share = share.to(target.dtype)
    slopes = ((log_q.exp() - p) * share[..., None]).to(scores.weights.dtype)
    dq, dw = torch.zeros_like(scores.queries), torch.zeros_like(scores.weights)
    for block, keys, sums in blocks(True):
        assert sums is not None
        for row, tile in scores.tiles(count):
            here, indices, of_queries, parts = scores.of_tile(row, tile, block, keys)
            slope = torch.where(here, slopes[row, tile], 0)[:, None]
            dw[row, tile] += torch.matmul(parts, slope.transpose(1, 2))[..., 0]
            inner = (parts > 0) * slope * scores.weights[row, tile][..., None] * scores.scale
            dq[row, tile] += torch.matmul(inner, of_queries)
            dk = torch.matmul(inner.transpose(1, 2), scores.queries[row, tile])
            sums[row].index_add_(0, indices.flatten(), dk.flatten(0, 1).to(sums.dtype))
    return dq, dw


DenseBlocks = Callable[
    [bool], Iterable[tuple[slice, Tensor, Tensor | None, Callable[[int, slice, slice], Tensor]]]
]
"""The same, and a function of (row, own queries, keys of the block) that returns the attention
[P, n, m] of this rank's heads, for the queries of each rank.
"""


@torch.no_grad()
def differentiate_all(
    scores: IndexerScores,
    places: Tensor,
    start: int,
    heads: int,
    share: Tensor,
    blocks: DenseBlocks,
    mesh: DeviceMesh,
) -> tuple[Tensor, Tensor]:
    """Do what `differentiate` does, for all keys: dense attention of so many heads is the target.

    places [B, T]: the index of each token in its document. start: the first of them in the whole
    sequence. All ranks take the same tiles, because the target of each is a sum over the ranks.
    """
    tokens = start + torch.arange(places.shape[1], device=places.device)
    lse = torch.full(places.shape, -torch.inf, device=places.device, dtype=scores.weights.dtype)

    def tiles(block: slice) -> Iterator[tuple[int, slice, slice, Tensor]]:
        for x in visited([*range(block.start, block.stop, BLOCK)]):
            part = slice(x, min(x + BLOCK, block.stop))
            keys = torch.arange(part.start, part.stop, device=places.device)
            for row, tile in scores.tiles(BLOCK):
                first = (tokens - places[row])[tile, None]
                seen = (keys >= first) & (keys <= tokens[tile, None])
                yield row, tile, slice(part.start - block.start, part.stop - block.start), seen

    def parts_of(row: int, tile: slice, keys: Tensor) -> Tensor:
        parts = torch.matmul(scores.queries[row, tile], keys.to(scores.queries.dtype).t())
        return parts.mul_(scores.scale).relu_()  # [n, H, m]

    def sums_of(row: int, tile: slice, parts: Tensor, seen: Tensor) -> Tensor:
        found = torch.matmul(scores.weights[row, tile, None], parts)[:, 0]
        return found.masked_fill_(~seen, -torch.inf)

    for block, keys, _, _ in blocks(False):
        for row, tile, part, seen in tiles(block):
            own = sums_of(row, tile, parts_of(row, tile, keys[row, part]), seen)
            lse[row, tile] = torch.logaddexp(lse[row, tile], own.logsumexp(dim=-1))
    dq, dw = torch.zeros_like(scores.queries), torch.zeros_like(scores.weights)
    for block, keys, sums, attention in blocks(True):
        assert sums is not None
        for row, tile, part, seen in tiles(block):
            target = attention(row, tile, part)
            if mesh.size() > 1:
                target = funcol.all_to_all_single(target, None, None, mesh.get_group())
                target = funcol.wait_tensor(target)
            p = torch.where(seen, target.sum(dim=0) / heads, 0)
            of_keys = keys[row, part].to(dq.dtype)
            parts = parts_of(row, tile, of_keys)
            log_q = sums_of(row, tile, parts, seen) - lse[row, tile, None]
            counted = share[row, tile, None].to(p.dtype)
            terms = torch.where(p > 0, p * (p.log() - log_q), 0) * counted
            scores.total.add_(terms.sum(dtype=torch.float64))
            slope = ((log_q.exp() - p) * counted).to(dq.dtype)[:, None]
            dw[row, tile] += torch.matmul(parts, slope.transpose(1, 2))[..., 0]
            inner = (parts > 0) * slope * scores.weights[row, tile][..., None] * scores.scale
            dq[row, tile] += torch.matmul(inner, of_keys)
            queries = scores.queries[row, tile].flatten(0, 1)
            sums[row, part].add_(torch.matmul(inner.flatten(0, 1).t(), queries))
    return dq, dw


def sum_for_owners(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the sum over all ranks of x [B, S, ...], of this rank's tokens only: [B, T, ...]."""
    if mesh.size() == 1:
        return x
    parts = torch.stack(x.chunk(mesh.size(), dim=1))
    received = funcol.all_to_all_single(parts, None, None, mesh.get_group())
    return funcol.wait_tensor(received).sum(dim=0)


def with_indexer_loss(
    output: Tensor,
    scores: IndexerScores,
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor]],
    *given: Tensor | None,
) -> Tensor:
    """Return the output of attention, whose backward gives queries, weights and keys of the
    indexer the gradients that `gradients(scores, *given)` computes.
    """
    made = scores.queries, scores.weights, scores.keys
    own = scores.scale, scores.total, gradients
    return _IndexerLoss.apply(output, own, *made, scores.chosen, *given)


class _IndexerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, own: tuple, *tensors: Tensor | None) -> Tensor:
        ctx.own = own
        ctx.save_for_backward(*tensors)  # which a checkpoint does not keep
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale, total, gradients), (q, w, k, chosen, *given) = ctx.own, ctx.saved_tensors
        made = q, w, k
        found = gradients(IndexerScores(*made, scale, chosen, total), *given)
        pairs = zip(found, made, strict=True)
        return grad, None, *(x.to(like.dtype) for x, like in pairs), None, *[None for _ in given]
