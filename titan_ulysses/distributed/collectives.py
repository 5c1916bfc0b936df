"""Counts of collectives and of the bytes that they transfer, taken from the real calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast")


@cache
def _kind_of(operator: str) -> str | None:
    """Return the kind of collective that an operator is: `_allgather_base_` is an all_gather."""
    letters = operator.replace("_", "")
    return next((kind for kind in _KINDS if letters.startswith(kind.replace("_", ""))), None)


class CollectiveCounter(TorchDispatchMode):
    """A dispatch mode that counts the collectives called under it, in forward and in backward.

    It sees those of FSDP and those of the Ulysses exchange. `counts[kind]` is (calls, bytes). The
    bytes are the size of this rank's input, including the part that stays on this rank.
    """

    def __init__(self, *, weight: Callable[[], int] = lambda: 1) -> None:
        """weight() says for how many calls the current one stands."""
        super().__init__()
        self._weight = weight
        self.counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: operators inside compiled code are not counted.

        Otherwise Dynamo would compile nothing under this mode. Compiled code contains no
        collectives.
        """
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # DTensor runs first; its own calls come here with plain tensors
        self.count(func, args)
        return func(*args, **(kwargs or {}))

    def count(self, func, args: tuple, *_: Any) -> None:
        """Count func if it is a collective.

        A dispatch mode that sees the same operations can call this instead of entering this one.
        """
        if func.namespace in ("c10d", "_c10d_functional"):
            kind = _kind_of(func._opname)
            if kind is not None:
                calls, size = self.counts[kind]
                weight = self._weight()
                self.counts[kind] = calls + weight, size + weight * _input_bytes(func, args)


def _input_bytes(func, args: tuple) -> int:
    """Return the bytes of a collective's input tensors.

    The input is found by the name of its argument, because some operators list their output first.
    """
    names = [argument.name for argument in func._schema.arguments]
    name = next(
        n
        for n in ("input_tensors", "input_tensor", "input", "inputs", "tensors", "self")
        if n in names
    )
    given = args[names.index(name)]
    flat = torch.utils._pytree.tree_leaves(given)
    return sum(t.numel() * t.element_size() for t in flat if isinstance(t, torch.Tensor))
