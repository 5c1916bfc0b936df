"""What a call of attention computes where it has only some of the queries (see pieces.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise

import torch.nn.functional as F
from torch import Tensor

from titan_ulysses.distributed.sequence import Documents

Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Scores:
    """Which scores a call of attention computes, and how.

    Document j has query_lengths[j] of the N queries and key_lengths[j] >= query_lengths[j] of the M
    keys, one document after the other. Its queries stand at the places of its *last* keys:
    attention is causal, aligned at the bottom right.
    """

    query_lengths: Lengths
    key_lengths: Lengths
    scale: float
    """what the products of queries and keys are multiplied by"""
    window: int | None = None
    """the number of keys that a query sees, including its own; None: all before it"""
    softcap: float | None = None
    """scores become softcap * tanh(score / softcap)"""
    ahead: int = 0
    """how many keys further right the queries stand. If it is not 0, there is one document, with
    fewer keys than queries or more; each query is right of all keys and sees at least one of them.
    """

    def documents(self) -> Iterator[tuple[slice, slice]]:
        """Yield the queries and the keys of each document that has queries."""
        lengths = self.query_lengths, self.key_lengths
        borders = (pairwise(accumulate(x, initial=0)) for x in lengths)
        for rows, columns in zip(*borders, strict=True):
            if rows[0] < rows[1]:
                yield slice(*rows), slice(*columns)

    def of(self, query_lengths: Lengths, key_lengths: Lengths, *, ahead: int = 0) -> Scores:
        """Return the same of other documents."""
        return replace(self, query_lengths=query_lengths, key_lengths=key_lengths, ahead=ahead)


def of_documents(
    documents: Documents, scale: float, window: int | None = None, softcap: float | None = None
) -> Scores:
    """Return the scores of the documents of all rows, one after the other."""
    lengths = tuple(chain(*documents))
    return Scores(lengths, lengths, scale, window, softcap)


@dataclass(frozen=True)
class PieceKernels:
    """What a core can do with some of the queries of each document.

    q is [N, Hq, D], k [M, Hkv, D] and v [M, Hkv, Dv], where Hkv divides Hq and Dv may differ from
    D. `scores` says which queries and keys they are.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    """forward(q, k, v, scores) -> output [N, Hq, Dv] in q's dtype, and its log-sum-exp lse [Hq, N],
    fp32 or wider.
    """
    backward: Callable[..., Tensor]
    """backward(grad, q, k, v, output, lse, scores, *, dk, dv) -> dq [N, Hq, D] in q's dtype. It
    *adds* the gradients of k and v to dk [M, Hkv, D] and dv [M, Hkv, Dv], fp32 or wider. output and
    lse are those of all keys that the queries see, sinks included. Nothing with the size of all
    keys times the query heads is allocated.
    """


def of_one_size(*tensors: Tensor, multiple: int = 1) -> list[Tensor]:
    """Pad the last dimension with zeros to the largest one, rounded up to a multiple.

    This is exact: zeros in q and k add nothing to a score, and zeros in v give columns of zeros in
    the output, which are cut off. So it is for an output and its gradient.
    """
    size = -(-max(x.shape[-1] for x in tensors) // multiple) * multiple
    return [x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])) for x in tensors]


def with_equal_sizes(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Call attend(q, k, v) with one head size, the larger of D and Dv.

    It is needed because flash-attn 2 refuses unequal head sizes, and because
    `F.scaled_dot_product_attention` then falls back from its flash kernels to slower ones, which on
    a CPU hold all S x S scores.
    """
    return attend(*of_one_size(q, k, v))[..., : v.shape[-1]]
