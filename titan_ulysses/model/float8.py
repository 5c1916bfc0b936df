"""float8 training through torchao (arXiv 2209.05433): the blocks' linear layers use 8 bits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model.parameter_names import is_router
from titan_ulysses.model.torchao import import_torchao, require_torchao

_SMALLEST_CAPABILITY = (8, 9)  # Ada and Hopper: the first tensor cores with float8
_ALIGNMENT = 16


def check_float8(device_type: str) -> None:
    """Raise UserError where this machine cannot multiply in float8. Needs no model."""
    require_torchao("quantize.float8 = true")
    if device_type != "cuda":
        raise UserError(
            f"quantize.float8 = true needs a GPU, and this run is on {device_type}: set it to "
            "false."
        )
    capability = torch.cuda.get_device_capability()
    if capability < _SMALLEST_CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (capability, _SMALLEST_CAPABILITY))
        raise UserError(
            f"quantize.float8 = true needs compute capability {need} (L4, H100, B200), and "
            f"{torch.cuda.get_device_name()} has {have}: set it to false."
        )


def use_float8(blocks: Iterable[nn.Module], *, tokens: int) -> int:
    """Make linear layers of blocks multiply in float8, in place and before sharding.

    Returns the number of converted layers: those whose sizes are multiples of 16, except routers.
    Parameters keep their names, dtype and values. Each product scales and casts its two operands,
    with one scale per tensor, which on a rank covers its own tokens. Gradients of outputs are cast
    to e5m2, all else to e4m3. `tokens` is the number of tokens in one call on a rank. If it is not
    a multiple of 16, operands are padded, which costs a copy. UserError if no layer is converted.
    """
    float8 = import_torchao("float8")
    config = float8.Float8LinearConfig(pad_inner_dim=tokens % _ALIGNMENT != 0)
    blocks = list(blocks)
    named = [item for block in blocks for item in block.named_modules()]
    converted = sum(_can_be_float8(module, name) for name, module in named)
    if not converted:
        sizes = sorted(
            {(m.in_features, m.out_features) for _, m in named if isinstance(m, nn.Linear)}
        )
        raise UserError(
            "quantize.float8 = true: no linear layer of the blocks has sizes that are multiples of "
            f"{_ALIGNMENT} ({', '.join(f'{i} x {o}' for i, o in sizes[:4])}). Set it to false, or "
            "change the model's sizes."
        )
    for block in blocks:
        float8.convert_to_float8_training(block, module_filter_fn=_can_be_float8, config=config)
    return converted


def is_float8(module: nn.Module) -> bool:
    """Return whether module is a linear layer that multiplies in float8."""
    return type(module).__name__ == "Float8Linear"


def _can_be_float8(module: nn.Module, name: str) -> bool:
    # A subclass has a forward of its own, which the conversion would lose.
    is_plain = type(module) is nn.Linear and not is_router(name)
    return (
        is_plain and module.in_features % _ALIGNMENT == 0 and module.out_features % _ALIGNMENT == 0
    )
