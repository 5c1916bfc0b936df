"""The optimizer of a run, by optimizer.name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from titan_ulysses.config.schema import Optimizer as OptimizerConfig
from titan_ulysses.model.parameter_names import matching, plain
from titan_ulysses.optim.adamw import BITS, AdamW, ShardwiseAdamW
from titan_ulysses.optim.muon import Muon, muon_groups


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    offload: bool = False,
    skips: bool = False,
    device_type: str | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of all trained parameters of a model, with state sharded like them.

    offload keeps the state in host memory and copies it to the device one parameter at a time.
    Parameters that are themselves on the host (FSDP2's CPUOffloadPolicy, or a CPU mesh) have their
    state and their update there in any case. skips: the caller sets `found_inf` before each step,
    a scalar tensor, 1 for a step that must change nothing. device_type is the device type to assume
    for the parameters; the planner sets it, and None means where they are. UserError if
    optimizer.name = "muon" and the model has no matrix for it, or if a pattern of lr_factors
    matches no trained parameter.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = muon_groups(model) if config.name == "muon" else [{"params": trained}]
    groups = groups_by_factor(model, groups, config.lr_factors, config.lr)
    offload = offload and any((device_type or p.device.type) != "cpu" for p in trained)
    bits, stochastic_rounding = BITS.get(config.name, 32), config.stochastic_rounding
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    optimizer: torch.optim.Optimizer
    if config.name == "muon":
        optimizer = Muon(groups, **options, offload=offload)
    elif bits < 32 or stochastic_rounding or offload:
        optimizer = ShardwiseAdamW(
            groups, **options, bits=bits, stochastic_rounding=stochastic_rounding, offload=offload
        )
    else:
        optimizer = AdamW(groups, **options, fused=True)
    if skips:
        optimizer.found_inf = torch.zeros((), device=trained[0].device)
    return optimizer


def groups_by_factor(
    model: nn.Module, groups: list[dict[str, Any]], factors: dict[str, float], lr: float
) -> list[dict[str, Any]]:
    """Return groups of parameters divided by the factor of their learning rate, their "lr_factor".

    factors: by patterns of names, of which the last that matches counts. lr: what they multiply.
    """
    named = {plain(name): p for name, p in model.named_parameters() if p.requires_grad}
    of_parameter = dict.fromkeys(named.values(), 1.0)
    for pattern, factor in factors.items():
        setting = "optimizer.lr_factors"
        for name in matching([pattern], named, setting=setting, what="trained parameter"):
            of_parameter[named[name]] = factor
    return [
        {**group, "params": params, "lr": lr * factor, "lr_factor": factor}
        for group in groups
        for factor in dict.fromkeys(of_parameter.values())
        if (params := [p for p in group["params"] if of_parameter[p] == factor])
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step: lr times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
