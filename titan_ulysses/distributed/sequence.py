"""How a sequence of S tokens is described and cut among the P ranks that share it.

Data, model, attention and loss all need these few facts, so they lie below all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token that predicts nothing, as in transformers."""

Documents = tuple[tuple[int, ...], ...]
"""Document lengths of each row, in order; the lengths of a row sum to S."""


def local_slice(whole: Tensor, *, rank: int, degree: int, dim: int = 1) -> Tensor:
    """The tokens of one sequence-parallel rank: [B, S, ...] -> [B, T, ...] with T = S / P, a view.

    rank is the rank's place among the `degree` = P ranks that share the sequence, dim the dimension
    of the tokens. P must divide S. `join_slices` is the inverse.
    """
    tokens, rest = divmod(whole.shape[dim], degree)
    assert rest == 0, (whole.shape, degree)
    return whole.narrow(dim, rank * tokens, tokens)


def join_slices(slices: Sequence[Tensor], *, dim: int = 1) -> Tensor:
    """The whole sequence [B, S, ...] from the slices [B, T, ...] of all ranks, in order of rank."""
    return torch.cat(list(slices), dim=dim)
