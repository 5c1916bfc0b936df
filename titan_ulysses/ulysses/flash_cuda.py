"""Attention of pieces with the flash kernels of CUDA, all documents in one call (see pieces.py)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate

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


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attend with the flash operators of torch: all documents in one call.

    Needs bf16 or fp16. Whichever of FlashAttention 2, 3 and 4 is active in this process computes
    it. All of them align causal attention at the bottom right, and index with 64 bits.
    """
    size, (q, k, v) = v.shape[-1], of_one_size(q, k, v, multiple=8)
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v),
        *_lengths(scores, q.device),
        0.0,
        scores.window is None and not scores.ahead,  # is_causal; a window says so by itself
        False,
        scale=scores.scale,
        **_window(scores),
    )
    return output[..., :size], lse


def _lengths(scores: Scores, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    most_queries = max(scores.query_lengths)
    return (
        borders(scores.query_lengths, device),
        borders(scores.key_lengths, device),
        most_queries,
        # FlashAttention 2 takes this for the keys right of a query where a window says all of them,
        # and counts from the query's place, which is up to so many queries left of the first key.
        max(most_queries, *scores.key_lengths),
    )


def _window(scores: Scores) -> dict[str, int]:
    """Return the keys left and right of a query that it sees; -1 is all.

    The kernel gives the last query the place of the last key.
    """
    if scores.window is None:
        return {"window_size_left": -1, "window_size_right": -1}
    if scores.ahead:
        return {"window_size_left": scores.window - 1 - scores.ahead, "window_size_right": -1}
    return {"window_size_left": scores.window - 1, "window_size_right": 0}


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
        parts = _call(*(grad, q, k, v, output, lse), scores=scores, causal=False, **_window(scores))
        dk.add_(parts[1])
        dv.add_(parts[2])
        return parts[0]
    documents = list(scores.documents())
    own = [slice(y.stop - (x.stop - x.start), y.stop) for x, y in documents]
    lengths = tuple(x.stop - x.start for x in own)
    at_own = _joined(k, own), _joined(v, own)
    parts = flash_own(grad, q, *at_own, output, lse, scores.of(lengths, lengths))
    for keys, dk_, dv_ in zip(own, *(x.split(lengths) for x in parts[1:]), strict=True):
        dk[keys].add_(dk_)
        dv[keys].add_(dv_)
    window = scores.window
    earlier = [block for pair in documents for block in _earlier_blocks(*pair, window, CUDA_BLOCK)]
    if not earlier:
        return parts[0]
    dq = parts[0].to(torch.promote_types(q.dtype, torch.float32))
    for rows, keys, left in earlier:
        block = scores.of((rows.stop - rows.start,), (keys.stop - keys.start,))
        dq_, dk_, dv_ = _call(
            *(grad[rows], q[rows], k[keys], v[keys], output[rows], lse[:, rows].contiguous()),
            scores=block,
            causal=False,
            window_size_left=left,
            window_size_right=-1,
        )
        for sum_, part in ((dq[rows], dq_), (dk[keys], dk_), (dv[keys], dv_)):
            sum_.add_(part)
    return dq.to(q.dtype)


def flash_own(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, ...]:
    """Return dq, dk and dv of whole documents: of as many queries as keys."""
    return _call(
        *(grad, q, k, v, output, lse),
        scores=scores,
        causal=scores.window is None,
        **_window(scores),
    )


def _joined(x: Tensor, parts: list[slice]) -> Tensor:
    """Return the parts of x one after the other, without a copy if they are all of it."""
    if sum(part.stop - part.start for part in parts) == len(x):
        return x
    return x[parts[0]] if len(parts) == 1 else torch.cat([x[part] for part in parts])


def _earlier_blocks(
    rows: slice, columns: slice, window: int | None, size: int
) -> Iterator[tuple[slice, slice, int]]:
    """Yield (queries, keys, window to the left, or -1) for blocks of a document's keys before its
    first query.

    The window is counted as the kernel counts it: from the place that it gives to the last of the
    queries, which is that of the block's last key. Only the queries that see a key of the block are
    in it, and they are further right by `ahead` keys in truth.
    """
    first = columns.stop - (rows.stop - rows.start)
    start = columns.start if window is None else max(columns.start, first - window + 1)
    for left in range(start, first, size):
        right = min(first, left + size)
        if window is None:
            yield rows, slice(left, right), -1
            continue
        stop = min(rows.stop, rows.start + (right - 1 + window - first))
        ahead = first + (stop - rows.start) - right
        yield slice(rows.start, stop), slice(left, right), window - 1 - ahead


def _call(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    scores: Scores,
    causal: bool,
    **window: int,
) -> tuple[Tensor, ...]:
    sizes = q.shape[-1], k.shape[-1], v.shape[-1]
    q, k, v, grad, output = of_one_size(q, k, v, grad, output, multiple=8)
    unused = torch.empty(0, device=q.device)  # the state of a dropout that is 0
    gradients = torch.ops.aten._flash_attention_backward(
        *(grad, q, k, v, output, lse),
        *_lengths(scores, q.device),
        0.0,
        causal,
        *(unused, unused),
        scale=scores.scale,
        **window,
    )
    return tuple(x[..., :size] for x, size in zip(gradients, sizes, strict=True))


CUDA_FLASH = PieceKernels(_cuda_forward, _cuda_backward)
"""The flash kernels of CUDA, for bf16 and fp16; no soft-cap."""
