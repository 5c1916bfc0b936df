"""Attention of queries to chosen keys: each query reads only those that its indexer names.

A query with its K keys is K pairs, and all that is computed is sums of rows over pairs:

    s_qk = q . k        o_q = sum_k p_qk v_k        dv_k = sum_q p_qk do_q        and so on.

`embedding_bag` computes such a sum, and its gradient by the weights such products, without a copy
of the rows. The pairs of a few queries are sorted by their keys: products and sums of a key then
read its row once, and the rows of the few queries from a cache. FLOPs are linear in the number of
queries, whatever the number of keys. So are bytes, but for the sums of the keys' gradients, which
take one pass over all keys for each tile of queries. See indexer.py for the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_ulysses.distributed.parts import visited
from titan_ulysses.ulysses.scores import PieceKernels, Scores

_TILE_PAIRS = {"cpu": 2**20, "cuda": 2**23}
"""Pairs of a tile. Each needs about 50 bytes, whatever the head size. At 2,048 keys a query, a tile
on a GPU has 4,096 queries.
"""


class _Tile(NamedTuple):
    """Some queries, n of them, and their pairs [n K] with M keys."""

    queries: slice
    keys: Tensor
    """[n, K]: the keys of each query. Where there is none, or it is a key of another call, any."""
    places: Tensor
    """[n K]: where each pair of keys [n, K] is by key"""
    query_of: Tensor
    """[n K], by key"""
    key_of: Tensor
    """[n K], by key; of pairs that do not exist, which are the last ones, M + query_of"""
    bags: Tensor
    """[M + n]: where the pairs of each number of key_of begin"""
    key_count: int
    """M"""

    def dots(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the products of rows of queries [n, D] and keys [M, D], [n K] by key, in fp32 or
        wider; 0 for pairs that do not exist.
        """
        wide = torch.promote_types(queries.dtype, torch.float32)  # CUDA has no kernel for bf16
        pairs = self.key_of.clamp(max=self.key_count), self.bags, self.query_of
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            queries.to(wide), keys.to(wide), *pairs, 0, self.key_count
        )

    def scores(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Return the scores [n K] by key, -inf for pairs that do not exist."""
        found = self.dots(queries, keys).mul_(scale)
        return found.masked_fill_(self.key_of >= self.key_count, -torch.inf)

    def by_query(self, x: Tensor) -> Tensor:
        """Return numbers of the pairs, [n K] by key, as [n, K]."""
        return x.index_select(0, self.places).view(self.keys.shape)

    def sum_of_keys(self, weights: Tensor, keys: Tensor) -> Tensor:
        """Return for each query the sum of the rows of its keys [M, D] times weights [n, K]."""
        weights = weights.to(keys.dtype)
        return F.embedding_bag(self.keys, keys, mode="sum", per_sample_weights=weights)

    def add_queries(self, total: Tensor, weights: Tensor, queries: Tensor) -> None:
        """Add to each key [M, D] the rows of queries [n, D] times weights, [n K] by key."""
        pairs = self.query_of, queries, self.bags
        weights = weights.to(queries.dtype)
        sums = F.embedding_bag(*pairs, mode="sum", per_sample_weights=weights)
        total.add_(sums[: self.key_count])


def _tiles(keys: int, scores: Scores) -> Iterator[_Tile]:
    """Yield tiles of the queries, given the number of keys.

    An index that is outside of the keys names a key of another call, or none.
    """
    chosen = scores.chosen
    assert chosen is not None
    size = max(1, _TILE_PAIRS[chosen.device.type] // chosen.shape[1])
    starts = range(0, len(chosen), size)
    for queries in visited([slice(x, min(x + size, len(chosen))) for x in starts]):
        indices = chosen[queries].int()
        numbers = torch.arange(keys + len(indices), dtype=torch.int32, device=indices.device)
        exists = (indices >= 0) & (indices < keys)
        # A pair that does not exist is in a bag of its query, so that no bag has too many of them.
        named = torch.where(exists, indices, numbers[keys:, None])
        key_of, order = named.flatten().sort()
        query_of = (order // indices.shape[1]).int()
        counted = torch.arange(len(order), dtype=torch.int32, device=order.device)
        places = torch.empty_like(counted).scatter_(0, order, counted)
        bags = torch.searchsorted(key_of, numbers, out_int32=True)
        yield _Tile(queries, indices.clamp(0, keys - 1), places, query_of, key_of, bags, keys)


@torch.no_grad()
def summed_weights(q: Tensor, k: Tensor, scores: Scores, lse: Tensor | None = None) -> Tensor:
    """Return the weights of the chosen keys, summed over the heads: [N, K], in fp32 or wider.

    lse [Hq, N]: the log-sum-exps of all keys that the queries see; None: of these.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    assert scores.chosen is not None
    sums = torch.zeros_like(scores.chosen, dtype=wide)
    for tile, head, of_keys in _tiles_of_heads(q, k, scores):
        at = tile.queries
        found = tile.by_query(tile.scores(q[at, head], k[:, of_keys], scores.scale))
        total = found.logsumexp(dim=-1) if lse is None else lse[head, at]
        sums[at] += found.sub_(_finite(total)[:, None]).exp_()
    return sums


def weights_of_all(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return the weights of queries [n, Hq, D] for keys [m, Hkv, D], summed over the heads: [n, m].

    lse [Hq, n]: the log-sum-exps of all keys that the queries see. Weights of others mean nothing.
    """
    grouped = q.transpose(0, 1).unflatten(0, (k.shape[1], -1))  # [Hkv, group, n, D]
    scores = torch.matmul(grouped, k.permute(1, 2, 0)[:, None]).to(lse.dtype).mul_(scale)
    return scores.flatten(0, 1).sub_(lse[..., None]).exp_().sum(dim=0)


def _tiles_of_heads(q: Tensor, k: Tensor, scores: Scores) -> Iterator[tuple[_Tile, int, int]]:
    """Yield each tile with each head of the queries, and that of its keys."""
    for tile in _tiles(len(k), scores):
        for head in visited([*range(q.shape[1])]):
            yield tile, head, head * k.shape[1] // q.shape[1]


def _forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    output = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide)
    for tile, head, of_keys in _tiles_of_heads(q, k, scores):
        at = tile.queries
        found = tile.by_query(tile.scores(q[at, head], k[:, of_keys], scores.scale))
        lse[head, at] = sums = found.logsumexp(dim=-1)
        # A query without a key here has the sum -inf and no weights.
        weights = found.sub_(_finite(sums)[:, None]).exp_()
        output[at, head] = tile.sum_of_keys(weights, v[:, of_keys])
    return output, lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    scores: Scores,
    *,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    dq = torch.empty_like(q)
    for tile, head, of_keys in _tiles_of_heads(q, k, scores):
        at, keys, values = (tile.queries, head), k[:, of_keys], v[:, of_keys]
        sums = _finite(lse[head, tile.queries]).index_select(0, tile.query_of)
        dots = (grad[at].to(lse.dtype) * output[at].to(lse.dtype)).sum(dim=-1)
        dots = dots.index_select(0, tile.query_of)
        weights = tile.scores(q[at], keys, scores.scale).sub_(sums).exp_()
        slopes = tile.dots(grad[at], values).sub_(dots).mul_(weights).mul_(scores.scale)
        dq[at] = tile.sum_of_keys(tile.by_query(slopes), keys)
        tile.add_queries(dk[:, of_keys], slopes, q[at])
        tile.add_queries(dv[:, of_keys], weights, grad[at])
    return dq


def _finite(sums: Tensor) -> Tensor:
    return sums.clamp(min=torch.finfo(sums.dtype).min)


CHOSEN = PieceKernels(_forward, _backward)
"""Attention to `Scores.chosen` keys; neither windows nor soft-caps."""
