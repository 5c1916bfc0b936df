"""What a checkpoint holds of a model and its optimizer: trained tensors, by parameter name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from titan_ulysses.distributed.device import module_of


def tensors_of(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, dict[str, Any]]:
    """Return the live tensors of model and optimizer by parameter name.

    An optimizer without state gets its state allocated, so that it can be filled.
    """
    tensors = {"model": _trained_state(model)}
    if optimizer is not None:
        tensors["optimizer"] = get_optimizer_state_dict(model, optimizer)["state"]
    module_of().synchronize()  # offloaded state may still be on its way to the host
    return tensors


def _trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of the model by name, without frozen parameters.

    A run that resumes loads frozen parameters from the same place as when it began.
    """
    # DCP's option `ignore_frozen_params` would keep tied frozen parameters under their second name.
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, p in named if not p.requires_grad}
    return {name: x for name, x in get_model_state_dict(model).items() if name not in frozen}


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in _trained_state(model).items()}


def saved_bytes(model: nn.Module) -> int:
    """Return the bytes of the model in a checkpoint, summed over all ranks.

    A tied tensor is counted under each of its names.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in _trained_state(model).values())


class Difference(NamedTuple):
    """The first parameter whose shape differs between a checkpoint and a model."""

    name: str
    text: str
    """the name, the shape in the checkpoint ("there") and the shape in the model, in words"""


def first_difference(
    saved: dict[str, list[int]], wanted: dict[str, list[int]]
) -> Difference | None:
    """Compare the names and shapes of a checkpoint with those of a model.

    Return None if they are equal.
    """
    for name in dict.fromkeys((*wanted, *saved)):
        there = saved.get(name, "absent")
        here = wanted.get(name, "absent")
        if there != here:
            return Difference(name, f"{name} is {there} there and {here}")
    return None
