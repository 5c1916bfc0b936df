"""The part of a tensor that this rank holds."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def local_shard(x: Tensor) -> Tensor:
    """This rank's shard of x, which shares its memory (under no_grad); x itself where it is
    whole.
    """
    return x.to_local() if isinstance(x, DTensor) else x


def plain_pieces(x: Tensor) -> list[Tensor]:
    """The plain tensors that this rank's shard of x is made of.

    A quantized tensor of torchao has codes, scales and a table.
    """
    x = local_shard(x)
    if is_traceable_wrapper_subclass(x):
        return [getattr(x, name) for name in x.__tensor_flatten__()[0]]
    return [x]
