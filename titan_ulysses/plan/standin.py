"""What stands for attention kernels that exist only on CUDA."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from titan_ulysses.distributed.sequence import Documents
from titan_ulysses.plan.memory import MemoryTracker
from titan_ulysses.ulysses.cores import with_equal_sizes


class Standin:
    """SDPA's flash kernel over whole rows, for kernels that see documents and windows in one call.

    What such a kernel takes, saves and returns does not depend on documents or windows. How many
    scores they leave, a row, is noted for each layer. Where values have a size of their own it
    pads, as the core `flash` does. flex needs no padding, and takes that much less.
    """

    def __init__(self) -> None:
        self.scores: dict[int | None, float] = {}
        self.tracker: MemoryTracker | None = None

    def begin(self, tracker: MemoryTracker) -> None:
        """Forget the simulation before, and note the scores of the one that tracker follows."""
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
    ) -> Tensor:
        pairs = sum(_pairs(length, window) for row in documents for length in row)
        self.scores[self.tracker.attribution.here().layer] = pairs / len(documents)
        grouped = q.shape[2] != k.shape[2]

        attend = partial(
            F.scaled_dot_product_attention, scale=scale, is_causal=True, enable_gqa=grouped
        )
        return with_equal_sizes(attend, *(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _pairs(length: int, window: int | None) -> float:
    """(query, key) pairs that score each other in a document of so many tokens."""
    if window is None or window >= length:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window
