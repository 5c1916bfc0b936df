"""LoRA on the experts of a mixture, by low-rank products on the tokens of each expert.

The experts of a layer share one parameter [E, ...], which peft adapts by `target_parameters`:
expert e has W_e + scale * L_e R_e. peft adds that product to all experts before each forward, as
large a tensor as the experts themselves, and so is its gradient. Here the sum is never made: while
the family's own experts run, their parameter is an `AdaptedWeight`, and a product of tokens with it
is x W_e + scale * (x L_e) R_e, by the function that the experts call: grouped, batched, or one
expert after the other. What a step takes for it grows with tokens x rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model.parameter_names import plain

_RANKS = 8
"""Grouped products on CUDA need rows of a multiple of 16 bytes: ranks are filled up with zeros."""

_PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "grouped_mm", "_grouped_mm"}
_PRODUCTS |= {"grouped_mm_fallback"}
"""Functions of a tensor and a weight whose product with a sum is the sum of products."""
_OF_THE_WEIGHT = {"shape", "ndim", "dtype", "device", "data_ptr", "size"}
"""What experts ask of their weight besides products."""


def wrapped_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield peft's wrapper of each adapted parameter, with the parameter's plain name."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "parameter_name"):
            yield f"{plain(name)}.{module.parameter_name}", module


def factors(wrapper: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return L [E, d1, rank] and R [E, rank, d2] of a parameter [E, d1, d2].

    a [E * rank, in] and b [out, rank * E] are the weights of peft's adapter. As in peft, d1 is "in"
    only where the experts say that they are transposed.
    """
    experts = wrapper.num_experts
    a, b = a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    if getattr(wrapper.get_base_layer(), "is_transposed", False):
        return a.transpose(1, 2), b.transpose(1, 2)
    return b, a


def use_low_rank_products(model: nn.Module) -> None:
    """Let experts with adapters compute as described above, before sharding.

    The `forward` of peft's wrappers is replaced on these instances. UserError for adapters of other
    parameters than those of experts.
    """
    for name, wrapper in wrapped_parameters(model):
        if wrapper.get_param().ndim != 3:
            raise UserError(
                f"target_parameters: {name} is not a parameter of experts, [experts, ..., ...]. "
                "Adapt the linear layers by target_modules."
            )
        wrapper.forward = partial(_forward, wrapper, name)


def _forward(wrapper: nn.Module, name: str, *args: Any, **keywords: Any) -> Any:
    active = [adapter for adapter in wrapper.active_adapters if adapter in wrapper.lora_A]
    if wrapper.disable_adapters or not active:
        return wrapper.base_layer(*args, **keywords)
    weight = wrapper.get_param()
    for adapter in active:
        a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
        left, right = factors(wrapper, a, b)
        fill = -left.shape[-1] % _RANKS
        left = F.pad(left, (0, fill)).contiguous()
        right = F.pad(right, (0, 0, 0, fill)).contiguous()
        weight = AdaptedWeight(weight, left, right, wrapper.scaling[adapter], name)
    # An attribute of the instance comes before its parameter of that name, which stays what it is.
    attributes = vars(wrapper.get_base_layer())
    attributes[wrapper.parameter_name] = weight
    try:
        return wrapper.base_layer(*args, **keywords)
    finally:
        del attributes[wrapper.parameter_name]


@dataclass(frozen=True)
class AdaptedWeight:
    """weight + scale * left @ right of all experts, some or one: [..., d1, d2].

    Only its products with other tensors are computed. UserError where experts use it otherwise.
    """

    weight: Tensor | AdaptedWeight
    left: Tensor
    right: Tensor
    scale: float
    name: str

    def __getattr__(self, key: str) -> Any:
        if key not in _OF_THE_WEIGHT:
            self._refuse(key)
        return getattr(self.weight, key)

    def __getitem__(self, experts: Any) -> AdaptedWeight:
        product = self.left[experts], self.right[experts]
        return AdaptedWeight(self.weight[experts], *product, self.scale, self.name)

    def transpose(self, *dims: int) -> AdaptedWeight:
        if {dim % self.ndim for dim in dims} != {self.ndim - 2, self.ndim - 1}:
            self._refuse("transpose")
        product = self.right.transpose(*dims), self.left.transpose(*dims)
        return AdaptedWeight(self.weight.transpose(*dims), *product, self.scale, self.name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        first, second, *bias = args if len(args) > 1 else (*args, None)
        kwargs, name = kwargs or {}, getattr(func, "__name__", str(func))
        self = first if isinstance(first, AdaptedWeight) else second
        if name not in _PRODUCTS or (self is first and name not in ("bmm", "matmul")):
            self._refuse(name)
        if self is first:
            low = func(self.left, self.scale * func(self.right, second, **kwargs), **kwargs)
            return func(self.weight, second, *bias, **kwargs) + low
        # A linear layer's weight is that of the product transposed.
        inner, outer = (self.right, self.left) if name == "linear" else (self.left, self.right)
        small = self.scale * func(first, inner, **{**kwargs, **_no_bias(kwargs)})
        low = func(small, outer, **{**kwargs, **_no_bias(kwargs)})
        return func(first, self.weight, *bias, **kwargs) + low

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(
            f"lora.target_parameters: the experts of this model use {self.name} for more than "
            f"products ({what}), which this version cannot compute with an adapter. Name other "
            "parameters, or adapt the linear layers by lora.target_modules."
        )


def _no_bias(keywords: dict[str, Any]) -> dict[str, None]:
    return dict.fromkeys({"bias"} & keywords.keys())
