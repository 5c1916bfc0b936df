"""What a function needs to be computed again in backward, part by part.

These are its random numbers, its autocast state, and sums of gradients in a wide dtype; and a way
to add to the gradients of parameters before autograd goes on, for functions of hidden states that
are not where the parameters are.

Autograd computes a node in the thread of the device that its forward's outputs are on, and adds to
the gradient of a parameter in the thread of the parameter's (`Node::device` in
torch/csrc/autograd/function.h). With hidden states on the host and parameters on a GPU these are
two threads: FSDP takes a block's gradients when that of its hidden states has come, and what adds
to them waits in the other thread, so that it may come too late.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from titan_ulysses.distributed.device import forked_rng, generator_of


def accumulate(total: Tensor | None, gradient: Tensor, *, alone: bool = False) -> Tensor:
    """Return total + gradient in fp32 or wider; a gradient that stands alone keeps its dtype.

    Accumulating 64 parts in bf16 would have six times the error.
    """
    if total is None:
        wide = gradient.dtype if alone else torch.promote_types(gradient.dtype, torch.float32)
        return gradient.to(wide)
    return total.add_(gradient)


def stand_ins(parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return inputs of an autograd function that stand for parameters, with their values.

    Its backward runs if one of them needs a gradient, as with the parameters. It must then give
    their gradients to `add_gradients`, and return None for the stand-ins.
    """
    return [None if p is None else p.detach().requires_grad_(p.requires_grad) for p in parameters]


def add_gradients(parameters: Sequence[Tensor | None], gradients: list[Tensor | None]) -> None:
    """Add to the gradients of parameters, as autograd does it, hooks too, before this returns.

    gradients, in any dtype, end with theirs (None: none). Each becomes None once it is added, so
    that only one of them is there twice at a time.
    """
    first = len(gradients) - len(parameters)
    for i, parameter in enumerate(parameters, start=first):
        gradient, gradients[i] = gradients[i], None
        if parameter is not None and gradient is not None:
            gradient = gradient.to(parameter.dtype)
            torch.autograd.backward(parameter, gradient)


def rng_state(device: torch.device) -> Tensor:
    """Return the state of the device's random number generator, on the host."""
    return generator_of(device).get_state()


@contextlib.contextmanager
def replayed(device: torch.device, state: Tensor) -> Iterator[None]:
    """Set the RNG to state inside this context, and back to where it was afterwards."""
    with forked_rng([device]):
        generator_of(device).set_state(state)
        yield


def autocast_state(device_type: str) -> torch.autocast:
    """Return a context that has the autocast state of now."""
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
