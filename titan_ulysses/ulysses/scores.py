"""What a call of attention computes where it has only some of the queries (see pieces.py)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, chain, pairwise

import torch
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
    chosen: Tensor | None = None
    """[N, K]: the only keys that each query sees, as indices among the M keys. One that is not in
    [0, M) is none. None: a query sees all of its document before it.
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

    def among(self, first_key: int, queries: int | None = None) -> Scores:
        """Return the same where the keys begin at the one that has been `first_key`, and of the
        chosen keys, those of the first queries.
        """
        chosen = self.chosen
        return self if chosen is None else replace(self, chosen=chosen[:queries] - first_key)


def of_documents(
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chosen: Tensor | None = None,
) -> Scores:
    """Return the scores of the documents of all rows, one after the other.

    chosen: [B, S, K], the keys that each query sees as indices in its row; None: all.
    """
    lengths = tuple(chain(*documents))
    if chosen is not None:
        rows = torch.arange(len(chosen), device=chosen.device)[:, None, None] * chosen.shape[1]
        chosen = torch.where(chosen < 0, -1, chosen + rows).flatten(0, 1)
    return Scores(lengths, lengths, scale, window, softcap, chosen=chosen)


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


def first_key(documents: tuple[int, ...], token: int, window: int | None) -> int:
    """Return the first token of a row that this token or later ones read: the first one of its
    document that is in its window, which counts the token itself.
    """
    starts = list(accumulate(documents, initial=0))
    start = starts[bisect_right(starts, token) - 1]
    return start if window is None else max(start, token - window + 1)


@lru_cache(maxsize=1024)
def visible_keys(
    documents: tuple[int, ...], start: int, stop: int, window: int | None
) -> tuple[slice, tuple[int, ...], tuple[int, ...]]:
    """Return which keys the queries of tokens [start, stop) of a row see: the tokens of all of
    them, and the lengths of the documents in queries and in keys.

    Only the first of their documents can have begun before them. Of its earlier keys, those that
    the window hides from all queries are left out.
    """
    starts = list(accumulate(documents, initial=0))
    first, last = bisect_right(starts, start) - 1, bisect_left(starts, stop)
    begin = first_key(documents, start, window)
    lengths = tuple(b - a for a, b in pairwise([start, *starts[first + 1 : last], stop]))
    return slice(begin, stop), lengths, (lengths[0] + start - begin, *lengths[1:])
