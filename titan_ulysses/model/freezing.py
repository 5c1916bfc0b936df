"""Parameters that are not trained: which, and how they are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from titan_ulysses.errors import UserError
from titan_ulysses.model.names import matching, plain
from titan_ulysses.toml import to_toml


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names a pattern matches, before sharding. Tied ones go by any of their names.

    UserError where a pattern matches nothing, or nothing is left to train.
    """
    named = {plain(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    for name in matching(patterns, named, setting="model.freeze", what="parameter"):
        named[name].requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise UserError(f"model.freeze = {to_toml(list(patterns))} freezes every parameter: leave some to train.")


def narrow_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store frozen parameters in dtype, that of the computation: there is no update whose sum would need more."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
