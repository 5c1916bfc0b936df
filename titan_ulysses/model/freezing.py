"""Parameters that are not trained: how they are chosen, stored and compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_ulysses.config.toml import to_toml
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.tensors import plain_pieces
from titan_ulysses.model.parameter_names import matching, plain


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match a pattern, before sharding.

    A tied parameter matches by any of its names. UserError if a pattern matches nothing, or if
    nothing is left to train.
    """
    named = {plain(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    for name in matching(patterns, named, setting="model.freeze", what="parameter"):
        named[name].requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise UserError(
            f"model.freeze = {to_toml(list(patterns))} freezes every parameter: leave some to "
            "train."
        )


def cast_frozen_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Store frozen parameters in dtype, that of the computation.

    They get no updates, so there is no sum that needs more precision.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def fingerprint(model: nn.Module) -> int:
    """Return a checksum of the bits of the frozen parameters; 0 if nothing is frozen.

    It is the same on every mesh. Collective.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if not frozen:
        return 0
    total = torch.stack(
        [bits(x).sum(dtype=torch.int64) for p in frozen for x in plain_pieces(p)]
    ).sum()
    first = frozen[0]  # all are sharded alike
    if isinstance(first, DTensor):
        total = total.to(first.device_mesh.device_type)
        for dimension, placement in enumerate(first.placements):
            if placement.is_shard():
                dist.all_reduce(total, group=first.device_mesh.get_group(dimension))
    return total.item()


def bits(x: Tensor) -> Tensor:
    """Return x's bits as integers.

    Their sum is exact: it does not depend on the order of summation or on threads.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().view(integers[x.element_size()])
