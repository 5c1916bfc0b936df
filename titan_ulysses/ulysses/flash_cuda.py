"""Attention of pieces with the flash kernels of CUDA, all documents in one call (see pieces.py)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from titan_ulysses.ulysses.scores import Lengths, PieceKernels, Scores, of_one_size

CUDA_BLOCK = 2**16
"""Keys of a call of the backward: with grouped heads it allocates dK and dV of all keys that it is
given, once for each query head. This many keys are enough work for a whole GPU.
"""


@lru_cache(maxsize=1024)
def borders(lengths: Lengths, device: torch.device) -> Tensor:
    """Return [documents + 1] int32 on device: where each document begins, and the end.

    Cached, so that all layers of a forward share one tensor, also for each of many chunks.
    """
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def _arguments(scores: Scores, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what both operators are told of scores, by position and by name.

    A query sees so many keys left and right of its place, -1 for all. The kernel gives the last
    query the place of the last key.
    """
    window, most_queries = scores.window, max(scores.query_lengths)
    by_position = (
        borders(scores.query_lengths, device),
        borders(scores.key_lengths, device),
        most_queries,
        # FlashAttention 2 takes this for the keys right of a query where a window says all of them,
        # and counts from the query's place, which is up to so many queries left of the first key.
        max(most_queries, *scores.key_lengths),
        0.0,
        window is None and not scores.ahead,  # is_causal; a window says so by itself
    )
    left = -1 if window is None else window - 1 - scores.ahead
    right = -1 if window is None or scores.ahead else 0
    by_name = {"scale": scores.scale, "window_size_left": left, "window_size_right": right}
    return by_position, by_name


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attend with the flash operators of torch: all documents in one call.

    Needs bf16 or fp16. Whichever of FlashAttention 2, 3 and 4 is active in this process computes
    it. All of them align causal attention at the bottom right, and index with 64 bits.
    """
    size, (q, k, v) = v.shape[-1], of_one_size(q, k, v, multiple=8)
    by_position, by_name = _arguments(scores, q.device)
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *by_position, False, **by_name
    )
    return output[..., :size], lse


def flash_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, ...]:
    """Return dq, dk and dv of a call of forward, from one call of the flash operators of torch."""
    sizes = q.shape[-1], k.shape[-1], v.shape[-1]
    q, k, v, grad, output = of_one_size(q, k, v, grad, output, multiple=8)
    by_position, by_name = _arguments(scores, q.device)
    unused = torch.empty(0, device=q.device)  # the state of a dropout that is 0
    gradients = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, output, lse, *by_position, unused, unused, **by_name
    )
    return tuple(x[..., :size] for x, size in zip(gradients, sizes, strict=True))


def _cuda_backward(
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
    """The queries' own keys of all documents in one call, then blocks of each document's earlier
    keys.
    """
    if scores.ahead:  # no own keys
        dq, *parts = flash_gradients(grad, q, k, v, output, lse, scores)
        dk.add_(parts[0])
        dv.add_(parts[1])
        return dq
    documents = list(scores.documents())
    own = [slice(y.stop - (x.stop - x.start), y.stop) for x, y in documents]
    lengths = tuple(x.stop - x.start for x in own)
    at_own = _joined(k, own), _joined(v, own)
    dq, *parts = flash_gradients(grad, q, *at_own, output, lse, scores.of(lengths, lengths))
    for keys, dk_, dv_ in zip(own, *(x.split(lengths) for x in parts), strict=True):
        dk[keys].add_(dk_)
        dv[keys].add_(dv_)
    earlier = [block for pair in documents for block in _earlier_blocks(*pair, scores)]
    if not earlier:
        return dq
    dq = dq.to(torch.promote_types(q.dtype, torch.float32))
    for rows, keys, block in earlier:
        found = flash_gradients(
            *(grad[rows], q[rows], k[keys], v[keys], output[rows], lse[:, rows].contiguous()),
            scores=block,
        )
        for sum_, part in zip((dq[rows], dk[keys], dv[keys]), found, strict=True):
            sum_.add_(part)
    return dq.to(q.dtype)


def _joined(x: Tensor, parts: list[slice]) -> Tensor:
    """Return the parts of x one after the other, without a copy if they are all of it."""
    if sum(part.stop - part.start for part in parts) == len(x):
        return x
    return x[parts[0]] if len(parts) == 1 else torch.cat([x[part] for part in parts])


def _earlier_blocks(
    rows: slice, columns: slice, scores: Scores
) -> Iterator[tuple[slice, slice, Scores]]:
    """Yield the queries, keys and scores of blocks of a document's keys before its first query.

    Only the queries that see a key of the block are in it.
    """
    window, first = scores.window, columns.stop - (rows.stop - rows.start)
    start = columns.start if window is None else max(columns.start, first - window + 1)
    for left in range(start, first, CUDA_BLOCK):
        right, count = min(first, left + CUDA_BLOCK), rows.stop - rows.start
        if window is not None:
            count = min(count, right - 1 + window - first)
        block = scores.of((count,), (right - left,), ahead=first + count - right)
        yield slice(rows.start, rows.start + count), slice(left, right), block


CUDA_FLASH = PieceKernels(_cuda_forward, _cuda_backward)
"""The flash kernels of CUDA, for bf16 and fp16; no soft-cap."""
