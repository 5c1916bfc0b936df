"""A replacement for attention kernels that exist only on CUDA, for simulation on a CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_ulysses.distributed.sequence import Documents
from titan_ulysses.plan.memory import MemoryTracker
from titan_ulysses.ulysses.cores import with_equal_sizes


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
        self.scores: dict[int | None, float] = {}
        self.tracker: MemoryTracker | None = None

    def begin(self, tracker: MemoryTracker) -> None:
        """Begin a new simulation, which tracker follows, and forget the scores of the last one."""
        self.scores, self.tracker = {}, tracker

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
    ) -> Tensor:
        pairs = sum(_pairs(length, window) for row in documents for length in row)
        self.scores[self.tracker.attribution.here().layer] = pairs / len(documents)
        grouped = q.shape[2] != k.shape[2]

        attend = partial(
            F.scaled_dot_product_attention, scale=scale, is_causal=True, enable_gqa=grouped
        )
        output = with_equal_sizes(attend, *(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return output if sinks is None else _Sinks.apply(output, sinks)


class _Sinks(torch.autograd.Function):
    """The output as it is, with a gradient for the sinks."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, sinks: Tensor) -> Tensor:
        ctx.save_for_backward(sinks)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def _pairs(length: int, window: int | None) -> float:
    """Return the number of (query, key) pairs with a score in a document of `length` tokens."""
    if window is None or window >= length:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window
