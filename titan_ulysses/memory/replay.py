"""What a function needs to be computed again in backward, part by part.

These are its random numbers, its autocast state, and sums of gradients in a wide dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def accumulate(total: Tensor | None, gradient: Tensor, *, alone: bool = False) -> Tensor:
    """Return total + gradient in fp32 or wider; a gradient that stands alone keeps its dtype.

    Accumulating 64 parts in bf16 would have six times the error.
    """
    if total is None:
        wide = gradient.dtype if alone else torch.promote_types(gradient.dtype, torch.float32)
        return gradient.to(wide)
    return total.add_(gradient)


def rng_state(device: torch.device) -> Tensor:
    """Return the state of the device's random number generator, on the host."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def replayed(device: torch.device, state: Tensor) -> Iterator[None]:
    """Set the RNG to state inside this context, and back to where it was afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(
            state
        )
        yield


def autocast_state(device_type: str) -> torch.autocast:
    """Return a context that has the autocast state of now."""
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
