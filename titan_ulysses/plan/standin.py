"""A replacement for attention kernels that exist only on CUDA, for simulation on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from fractions import Fraction
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_ulysses.distributed.parts import visited
from titan_ulysses.distributed.sequence import Documents
from titan_ulysses.plan.cost import Amount
from titan_ulysses.plan.memory import MemoryTracker
from titan_ulysses.ulysses.flash_cuda import CUDA_BLOCK
from titan_ulysses.ulysses.pieces import attend_documents
from titan_ulysses.ulysses.scores import (
    PieceKernels,
    Scores,
    of_documents,
    of_one_size,
    with_equal_sizes,
)
from titan_ulysses.ulysses.sparse import CHOSEN


class Standin:
    """SDPA's flash kernel over whole rows, in place of a kernel that handles documents and windows
    in one call.

    The memory of such a kernel's inputs, outputs and saved tensors does not depend on documents or
    windows. The number of scores that they leave per row is recorded for each layer, in `scores`.
    Where values have another head size than queries and keys, the smaller size is padded, as in the
    cores `varlen` and `flash`. The core `flex` needs no padding, so it takes that much less memory.
    Sinks change an output in place, which costs nothing that counts.
    """

    def __init__(self, core: str) -> None:
        """core: the name of the core that the run takes."""
        self.core = core
        self.scores: dict[int | None, Amount] = {}
        self.tracker: MemoryTracker | None = None

    def begin(self, tracker: MemoryTracker, scores: dict[int | None, Amount]) -> None:
        """Begin a simulation, which tracker follows; the scores of each layer go to `scores`."""
        self.scores, self.tracker = scores, tracker

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        documents: Documents,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        if chosen is not None:  # gathers and matrix products, the same on every device
            scores = of_documents(documents, scale, chosen=chosen)
            with self._sparse():
                return attend_documents(q, k, v, sinks, scores)
        pairs = sum(_pairs(length, window) for row in documents for length in row)
        self._note(Fraction(pairs, len(documents)))
        grouped = q.shape[2] != k.shape[2]

        attend = partial(
            F.scaled_dot_product_attention, scale=scale, is_causal=True, enable_gqa=grouped
        )
        output = with_equal_sizes(attend, *(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return output if sinks is None else _Sinks.apply(output, sinks)

    @property
    def pieces(self) -> PieceKernels:
        """Chunks of the sequence, by the same kernels with some of the queries."""
        return PieceKernels(self._forward, self._backward)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        if scores.chosen is not None:
            with self._sparse():
                return CHOSEN.forward(q, k, v, scores)
        self._note(_pairs_of_pieces(scores))
        size = v.shape[-1]
        output, lse = _FORWARD(*_heads_first(q, k, v), 0.0, False, scale=scores.scale)
        return output.narrow(-1, 0, size).squeeze(0).transpose(0, 1), lse.squeeze(0)

    def _backward(
        self,
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
        """Do what `CUDA_FLASH` does: the queries' own keys, then blocks of earlier ones."""
        if scores.chosen is not None:
            with self._sparse():
                return CHOSEN.backward(grad, q, k, v, output, lse, scores, dk=dk, dv=dv)
        pairs, size = _pairs_of_pieces(scores), q.shape[-1]
        own = len(k) if scores.ahead else len(q)
        starts = [*range(own, len(k), CUDA_BLOCK)]
        earlier = 0
        if starts:
            earlier = pairs - _pairs_of_pieces(scores.of(*[scores.query_lengths] * 2))
        dq = None
        # The blocks of earlier keys are alike, and a long sequence has thousands.
        for first, stop in chain([(0, own)], visited([*pairwise([*starts, len(k)])])):
            self._note(pairs - earlier if dq is None else Fraction(earlier, len(starts)))
            keys, values, dkeys, dvalues = (
                x.narrow(0, first, stop - first) for x in (k, v, dk, dv)
            )
            inputs = _heads_first(grad, q, keys, values, output)
            parts = _BACKWARD(*inputs, lse.unsqueeze(0), 0.0, False, scale=scores.scale)
            parts = [part.squeeze(0).transpose(0, 1) for part in parts]
            dkeys.add_(parts[1].narrow(-1, 0, k.shape[-1]))
            dvalues.add_(parts[2].narrow(-1, 0, v.shape[-1]))
            if dq is None:
                dq = parts[0].to(dk.dtype) if starts else parts[0]
            else:
                dq.add_(parts[0])
        return dq[..., :size].to(q.dtype)

    def _sparse(self) -> AbstractContextManager[None]:
        return self.tracker.attribution.counted_as("sparse attention")

    def _note(self, pairs: Amount) -> None:
        """Note the scores of a row that the layer's next calls compute."""
        self.scores[self.tracker.attribution.here().layer] = pairs


_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Return tensors [N, H, D] as [1, H, N, D], padded to one D."""
    return [x.transpose(0, 1).unsqueeze(0) for x in of_one_size(*tensors)]


def _pairs_of_pieces(scores: Scores) -> int:
    """Return the pairs with a score of the last queries of each document."""
    window, lengths = scores.window, zip(scores.query_lengths, scores.key_lengths, strict=True)
    if not scores.ahead:
        return sum(_pairs(n, window) - _pairs(n - queries, window) for queries, n in lengths)
    (queries, keys), hidden = next(lengths), 0
    if window is not None:
        hidden = max(0, keys + scores.ahead - window)  # of the keys, from the last query
    rows = min(queries, hidden)
    return queries * keys - rows * (2 * hidden - rows + 1) // 2


class _Sinks(torch.autograd.Function):
    """The output as it is, with a gradient for the sinks."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, sinks: Tensor) -> Tensor:
        ctx.save_for_backward(sinks)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def _pairs(length: int, window: int | None) -> int:
    """Return the number of (query, key) pairs with a score in a document of `length` tokens."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window
