"""Activation checkpointing: a block keeps only its input, and computes the rest again in backward."""

from __future__ import annotations

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper


def checkpoint_block(block: nn.Module) -> nn.Module:
    """Wrap one transformer block, of any signature. RNG and autocast are replayed; state-dict names do not change."""
    return checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
