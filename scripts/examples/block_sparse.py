"""A core attention of your own: block-sparse attention, in one function.

    PYTHONPATH=scripts/examples bash scripts/train.sh --model.attention block_sparse:block_sparse

Ulysses hands a core whole sequences and this rank's heads, so any attention that works on one
device works here: no rank, no mesh, no communication. This one lets a token see its own block of
128 tokens, the one before, and the first tokens of its document ("sinks" in the sense of arXiv
2309.17453), at a cost linear in the sequence length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
FIRST = 4


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, *, documents: tuple[tuple[int, ...], ...], scale: float
) -> Tensor:
    """q [B, S, Hq, D], k and v [B, S, Hkv, D], `documents` the document lengths of each row -> [B,
    S, Hq, D].
    """
    rows = []
    for row, lengths in enumerate(documents):
        # [heads, L, D] of each document.
        parts = (x[row].transpose(0, 1).split(lengths, dim=1) for x in (q, k, v))
        attended = [_document(q, k, v, scale) for q, k, v in zip(*parts, strict=True)]
        rows.append(torch.cat(attended, dim=1))
    return torch.stack(rows).transpose(1, 2)


def _document(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention inside one document of L tokens, a block of queries at a time: q [Hq, L, D] -> [Hq,
    L, D].
    """
    outputs, length = [], q.shape[1]
    for start in range(0, length, BLOCK):
        stop, near = min(start + BLOCK, length), max(0, start - BLOCK)
        positions = torch.cat([torch.arange(min(FIRST, near)), torch.arange(near, stop)]).to(
            q.device
        )
        seen = positions <= torch.arange(start, stop, device=q.device)[:, None]
        block = F.scaled_dot_product_attention(
            q[None, :, start:stop],
            k[None, :, positions],
            v[None, :, positions],
            seen,
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(block[0])
    return torch.cat(outputs, dim=1)
