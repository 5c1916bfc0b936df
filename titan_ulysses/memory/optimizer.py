"""The optimizer: AdamW, fused on CPU and CUDA alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from titan_ulysses.config import Optimizer as OptimizerConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over all parameters that are trained; sharded parameters get sharded state."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(
        trained, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )
