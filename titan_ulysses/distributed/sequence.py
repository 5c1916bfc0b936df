"""How a sequence of S tokens is described and cut among the P ranks that share it.

Data, model, attention and loss all need these few definitions, so this module imports none of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token whose next token is not predicted, as in transformers."""

Documents = tuple[tuple[int, ...], ...]
"""Document lengths of each row, in order; the lengths of a row sum to S."""


def local_slice(whole: Tensor, *, rank: int, degree: int, dim: int = 1) -> Tensor:
    """Return the tokens of one sequence-parallel rank, as a view: [B, S, ...] -> [B, T, ...].

    T = S / P, and P must divide S. `rank` is the rank's place among the `degree` = P ranks that
    share the sequence, and `dim` is the dimension of the tokens. `join_slices` is the inverse.
    """
    tokens, rest = divmod(whole.shape[dim], degree)
    assert rest == 0, (whole.shape, degree)
    return whole.narrow(dim, rank * tokens, tokens)


def join_slices(slices: Sequence[Tensor], *, dim: int = 1) -> Tensor:
    """Return the whole sequence [B, S, ...] from all ranks' slices [B, T, ...], in rank order."""
    return torch.cat(list(slices), dim=dim)
