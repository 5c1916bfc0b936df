"""Core attention: whole sequences, this rank's heads. Ulysses does not care what attention is, so this is all of it.

A core is a function `(q, k, v, *, documents, scale) -> output` with q and output [B, S, Hq, D], k and v [B, S, Hkv, D],
where Hkv divides Hq; `documents` holds each row's document lengths on the host. Attention is causal inside a document
and zero between documents, by construction: a document is a call of its own, and no S x S mask exists.
"""

from __future__ import annotations

from collections.abc import Callable

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
    rows = zip(q.split(1), k.split(1), v.split(1), documents, strict=True)
    return torch.cat([_sdpa_row(*row, scale) for row in rows])


def _sdpa_row(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    outputs = [
        F.scaled_dot_product_attention(*document, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        for document in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    ]
    outputs = [output.transpose(1, 2) for output in outputs]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

