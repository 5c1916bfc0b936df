"""Attention of queries to chosen keys: each query reads only those that its indexer names.

Keys and values are gathered by row for a few queries at a time, so memory is that of a tile, and
FLOPs and bytes are linear in the number of queries, whatever the number of keys. Gradients of keys
and values are added back to the rows that they came from. See indexer.py for the choice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from titan_ulysses.distributed.parts import visited
from titan_ulysses.ulysses.scores import PieceKernels, Scores

_TILE_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
"""Bytes of the keys and values that are gathered at a time: what a cache holds, or enough for a
kernel. 2,048 keys of 16 heads of 192 and 128 numbers in bf16 are 20 MiB for each query.
"""


def _tiles(k: Tensor, v: Tensor, scores: Scores) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield tiles of the queries, with the indices [n, K] of their keys and which of these exist.

    An index that is outside of the keys names a key of another call, or none.
    """
    chosen, count = scores.chosen, len(k)
    assert chosen is not None
    wide = torch.promote_types(k.dtype, torch.float32)
    row = chosen.shape[1] * (k[0].numel() + v[0].numel()) * wide.itemsize
    size = max(1, _TILE_BYTES[k.device.type] // row)
    starts = range(0, len(chosen), size)
    for tile in visited([slice(x, min(x + size, len(chosen))) for x in starts]):
        indices = chosen[tile].long()
        exists = (indices >= 0) & (indices < count)
        yield tile, indices.clamp(0, count - 1), exists


def _weights(q: Tensor, k: Tensor, exists: Tensor, scale: float) -> Tensor:
    """Return the scores [Hkv, n, group, K] of queries [Hkv, n, group, D] with keys [Hkv, n, K, D],
    -inf for those that do not exist.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q, k.transpose(2, 3)).to(wide).mul_(scale)
    return scores.masked_fill_(~exists[:, None], -torch.inf)


@torch.no_grad()
def summed_weights(q: Tensor, k: Tensor, scores: Scores, lse: Tensor | None = None) -> Tensor:
    """Return the weights of the chosen keys, summed over the heads: [N, K], in fp32 or wider.

    lse [Hq, N]: the log-sum-exps of all keys that the queries see; None: of these.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    assert scores.chosen is not None
    sums = torch.empty_like(scores.chosen, dtype=wide)
    for tile, indices, exists in _tiles(k, k, scores):
        grouped = _by_kv_head(q[tile], k.shape[1])
        found = _weights(grouped, k.transpose(0, 1)[:, indices], exists, scores.scale)
        total = found.logsumexp(dim=-1, keepdim=True)
        if lse is not None:
            total = _by_kv_head(lse[:, tile].t()[..., None], k.shape[1])
        sums[tile] = found.sub_(_finite(total)).exp_().sum(dim=(0, 2))
    return sums


def weights_of_all(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return the weights of queries [n, Hq, D] for keys [m, Hkv, D], summed over the heads: [n, m].

    lse [Hq, n]: the log-sum-exps of all keys that the queries see. Weights of others mean nothing.
    """
    grouped = q.transpose(0, 1).unflatten(0, (k.shape[1], -1))  # [Hkv, group, n, D]
    scores = torch.matmul(grouped, k.permute(1, 2, 0)[:, None]).to(lse.dtype).mul_(scale)
    return scores.flatten(0, 1).sub_(lse[..., None]).exp_().sum(dim=0)


def _by_kv_head(x: Tensor, heads: int) -> Tensor:
    """[n, Hq, D] -> [Hkv, n, group, D]"""
    return x.unflatten(1, (heads, -1)).transpose(0, 1)


def _by_query(x: Tensor) -> Tensor:
    """[Hkv, n, group, D] -> [n, Hq, D]"""
    return x.transpose(0, 1).flatten(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    output = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide)
    keys, values = k.transpose(0, 1), v.transpose(0, 1)
    for tile, indices, exists in _tiles(k, v, scores):
        found = _weights(_by_kv_head(q[tile], len(keys)), keys[:, indices], exists, scores.scale)
        sums = found.logsumexp(dim=-1, keepdim=True)
        # A query without a key here has the sum -inf and no weights.
        weights = found.sub_(_finite(sums)).exp_().to(v.dtype)
        output[tile] = _by_query(torch.matmul(weights, values[:, indices]))
        lse[:, tile] = _by_query(sums)[..., 0].t()
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
    dq, heads = torch.empty_like(q), k.shape[1]
    for tile, indices, exists in _tiles(k, v, scores):
        of_queries = (grad[tile], q[tile], output[tile], lse[:, tile].t()[..., None])
        grads, queries, outputs, sums = (_by_kv_head(x, heads) for x in of_queries)
        keys, values = (x.transpose(0, 1)[:, indices] for x in (k, v))
        weights = _weights(queries, keys, exists, scores.scale).sub_(_finite(sums)).exp_()
        dots = (grads.to(lse.dtype) * outputs.to(lse.dtype)).sum(dim=-1, keepdim=True)
        slopes = torch.matmul(grads, values.transpose(2, 3)).to(lse.dtype).sub_(dots)
        slopes = slopes.mul_(weights).mul_(scores.scale).to(q.dtype)
        dq[tile] = _by_query(torch.matmul(slopes, keys))
        # Of each query's own keys, [Hkv, n, K, D], back to the rows that they were gathered from.
        of_keys = torch.matmul(slopes.transpose(2, 3), queries)
        of_values = torch.matmul(weights.to(v.dtype).transpose(2, 3), grads)
        for found, total in ((of_keys, dk), (of_values, dv)):
            for head, of_head in enumerate(found):
                rows = of_head.flatten(0, 1).to(total.dtype)
                total[:, head].index_add_(0, indices.flatten(), rows)
    return dq


def _finite(sums: Tensor) -> Tensor:
    return sums.clamp(min=torch.finfo(sums.dtype).min)


CHOSEN = PieceKernels(_forward, _backward)
"""Attention to `Scores.chosen` keys; neither windows nor soft-caps."""
