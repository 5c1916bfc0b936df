"""Core attention: whole sequences, this rank's heads. Ulysses does not care what attention is, so this is all of it.

A core is a function `(q, k, v, *, documents, scale) -> output` with q and output [B, S, Hq, D], k and v [B, S, Hkv, D],
where Hkv divides Hq; `documents` holds each row's document lengths on the host. Attention is causal inside a document
and zero between documents, by construction: a document is a call of its own, and no S x S mask exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Core = Callable[..., Tensor]
Documents = tuple[tuple[int, ...], ...]
"""Document lengths of each row, in order; each row's sum to S."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, documents: Documents, scale: float) -> Tensor:
    """`F.scaled_dot_product_attention`, one call a document (all rows at once where they are cut alike)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if len(set(documents)) == 1:
        return _sdpa_row(q, k, v, documents[0], scale)
    return torch.cat([_sdpa_row(q[b : b + 1], k[b : b + 1], v[b : b + 1], row, scale) for b, row in enumerate(documents)])


def _sdpa_row(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    outputs = [
        F.scaled_dot_product_attention(
            q[:, :, span], k[:, :, span], v[:, :, span], is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)
        for span in _spans(lengths)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _spans(lengths: tuple[int, ...]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length
