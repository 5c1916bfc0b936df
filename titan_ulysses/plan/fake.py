"""Runs operations on fake tensors, at a fraction of what `FakeTensorMode` takes for each.

A step repeats its operations: layers, chunks and tiles call the same operators with the same
shapes. FakeTensorMode has a cache for that, but its keys hold all that a tensor can be, and the
search for a result takes about ten times as long as the rest of a simulated operation.

Where a step takes many slices, its code takes them by `narrow`: x[:, a:b] asks for the device of x
three times, each time through the dispatcher, and takes about twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._pytree import tree_leaves

_UNKNOWN = object()
"""No result is known for a call yet. (None is a result.)"""
_PLAIN = (str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_NAMESPACES = ("aten", "_c10d_functional")
_NOT_ALIKE = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
)


@dataclass(frozen=True)
class _New:
    """A result that is a new tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class FakeOperations:
    """Calls operators as FakeTensorMode does, and remembers the shapes of their results.

    Views are made by the meta device's kernel at once, without a key. The results of any other
    operator of ATen, and of a functional collective, depend only on shapes, strides, types and
    numbers: they are made from what an earlier call returned, if all of them are new tensors or the
    operator's first argument. All other calls go to FakeTensorMode.
    """

    _known: ClassVar[dict[tuple, Any]] = {}
    """what all simulations of a process have called: the next one is of much the same shapes"""

    def __init__(self) -> None:
        self._attributes: dict[tuple[FakeTensorMode, torch.device], dict[str, Any]] = {}

    def __call__(self, func, args: tuple, kwargs: dict[str, Any]) -> Any:
        kind = _kind(func)
        if kind == "other":
            return func(*args, **kwargs)
        if kind == "view":
            source = args[0]
            if type(source) is not FakeTensor or source.constant is not None:
                return func(*args, **kwargs)
            with in_kernel_invocation_manager(source.fake_mode):
                result = func(*args, **kwargs)
            return self._as_fake(result, source)
        tensors: list[FakeTensor] = []
        try:
            named = _described([*kwargs.values()], tensors) if kwargs else ()
            positional = _described(args, tensors)
            key = func, torch.get_default_dtype(), positional, tuple(kwargs), named
        except _NotDescribed:
            return func(*args, **kwargs)
        if not tensors:
            return func(*args, **kwargs)
        known = self._known.get(key, _UNKNOWN)
        if known is _UNKNOWN:
            result = func(*args, **kwargs)
            self._known[key] = _remembered(kind, result, args, tensors)
            return result
        if known is NotImplemented:
            return func(*args, **kwargs)
        return args[0] if kind == "in place" else self._made(known, tensors[0].fake_mode)

    def _made(self, recipe: Any, mode: FakeTensorMode) -> Any:
        if isinstance(recipe, _New):
            # An operator of a tensor on the meta device, without any mode.
            with torch._C._DisableTorchDispatch():
                empty = torch.empty_strided(
                    recipe.shape, recipe.stride, dtype=recipe.dtype, device="meta"
                )
            return self._fake(empty, mode, recipe.device)
        return recipe if recipe is None else type(recipe)(self._made(x, mode) for x in recipe)

    def _as_fake(self, result: Any, like: FakeTensor) -> Any:
        if isinstance(result, Tensor):
            return self._fake(result, like.fake_mode, like.fake_device)
        return type(result)(self._as_fake(x, like) for x in result)

    def _fake(self, meta: Tensor, mode: FakeTensorMode, device: torch.device) -> FakeTensor:
        """Return `FakeTensor(mode, meta, device)`, at a tenth of its time: the attributes of the
        first one are those of all.
        """
        attributes = self._attributes.get((mode, device))
        if attributes is None:
            first = FakeTensor(mode, meta, device)
            self._attributes[mode, device] = dict(vars(first))
            return first
        fake = Tensor._make_subclass(
            FakeTensor, meta, dispatch_device=True, device_for_backend_keys=device
        )
        vars(fake).update(attributes)
        return fake


@cache
def _kind(func) -> str:
    """Return how the results of func are made: "view", "new", "in place" (the first argument), or
    "other" where they are not made here.
    """
    if func.namespace not in _NAMESPACES or any(tag in func.tags for tag in _NOT_ALIKE):
        return "other"
    if "lift" in func._opname:  # these turn real tensors into fake ones
        return "other"
    arguments, returns = func._schema.arguments, func._schema.returns
    if func.is_view or func is torch.ops.aten._unsafe_view.default:
        is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
        )
        return "other" if is_composite else "view"
    aliases = [value.alias_info for value in returns]
    if not any(aliases):
        return "new"
    first = arguments[0].alias_info
    is_first = len(aliases) == 1 and first is not None and first.before_set == aliases[0].before_set
    return "in place" if is_first else "other"


class _NotDescribed(Exception):
    """An argument that makes no key."""


def _described(value: Any, tensors: list[FakeTensor]) -> Any:
    """Return all of an argument on which the shapes of results can depend. Appends its tensors."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.dtype.is_complex:
            raise _NotDescribed
        if value.layout is not torch.strided:
            raise _NotDescribed
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.fake_device
    if kind in (int, float, bool):
        return kind, value  # 1, 1.0 and True are equal, but give results of different types
    if kind in (tuple, list) or kind is torch.Size:
        return tuple([_described(x, tensors) for x in value])
    if isinstance(value, _PLAIN):
        return value
    raise _NotDescribed


def _remembered(kind: str, result: Any, args: tuple, inputs: list[FakeTensor]) -> Any:
    """Return what makes the same result again; NotImplemented if it cannot be made."""
    if kind == "in place":
        return "in place" if result is args[0] else NotImplemented
    seen = {x.untyped_storage()._cdata for x in inputs}
    for x in tree_leaves(result):
        if x is None:
            continue
        if type(x) is not FakeTensor or x.constant is not None or x.dtype.is_complex:
            return NotImplemented
        storage = x.untyped_storage()
        if storage._cdata in seen or x.layout is not torch.strided or x.storage_offset():
            return NotImplemented  # it shares memory
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        if storage.nbytes() != (last + 1 if x.numel() else 0) * x.element_size():
            return NotImplemented
        seen.add(storage._cdata)
    return _recipe(result)


def _recipe(result: Any) -> Any:
    if isinstance(result, Tensor):
        return _New(tuple(result.shape), result.stride(), result.dtype, result.fake_device)
    return result if result is None else type(result)(map(_recipe, result))
