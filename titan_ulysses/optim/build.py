"""The optimizer of a run, by optimizer.name."""

from __future__ import annotations

import torch
from torch import nn

from titan_ulysses.config.schema import Optimizer as OptimizerConfig
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.optim.adamw import build_optimizer
from titan_ulysses.optim.muon import Muon, hidden_matrices


def optimizer_of(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    offload: bool = False,
    skips: bool = False,
    device_type: str | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of all trained parameters of a model, with state sharded like them.

    The keywords are those of `build_optimizer`. UserError if optimizer.name = "muon" and the model
    has no matrix for it.
    """
    if config.name != "muon":
        return build_optimizer(
            model.parameters(), config, offload=offload, skips=skips, device_type=device_type
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = hidden_matrices(model)
    if not matrices:
        raise UserError(
            'optimizer.name = "muon": no trained parameter is a hidden matrix. Set optimizer.name '
            '= "adamw"'
        )
    optimizer = Muon(
        trained,
        matrices,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        offload=offload and any((device_type or p.device.type) != "cpu" for p in trained),
    )
    if skips:
        optimizer.found_inf = torch.zeros((), device=trained[0].device)
    return optimizer
