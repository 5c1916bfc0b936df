"""The part of a tensor that this rank holds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def local_shard(x: Tensor) -> Tensor:
    """Return this rank's shard of x, or x itself if it is not sharded.

    The shard shares its memory with x (under no_grad).
    """
    return x.to_local() if isinstance(x, DTensor) else x


def local_box(x: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Return the sizes of this rank's shard of x, and where it begins in x.

    DTensor has no public way to say that.
    """
    if not isinstance(x, DTensor):
        return x.shape, (0,) * x.dim()
    return compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)


def plain_pieces(x: Tensor) -> list[Tensor]:
    """Return the plain tensors that make up this rank's shard of x.

    A quantized tensor of torchao consists of codes, scales and a table.
    """
    if isinstance(x, DTensor):
        x = x._local_tensor  # to_local() would be a differentiable operation
    if not is_traceable_wrapper_subclass(x):
        return [x]
    return [piece for name in x.__tensor_flatten__()[0] for piece in plain_pieces(getattr(x, name))]
