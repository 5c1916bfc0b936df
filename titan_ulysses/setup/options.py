"""How a model is parallelized: the options of `parallelize`, and the core attention that they
name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from titan_ulysses.config.schema import Config
from titan_ulysses.memory.offload import Offload
from titan_ulysses.model.families import attention_needs
from titan_ulysses.ulysses.cores import Core, choose_core

if TYPE_CHECKING:  # importing transformers first is noisy, see model/__init__.py
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ParallelOptions:
    """What `parallelize` does to a model. The defaults are right for a long sequence on one
    node.
    """

    attention: str | Core = "auto"
    """A core attention, or the name of one (see `ulysses/cores.py`)."""
    loss_tile_tokens: int = 0
    """Tokens in a tile of the loss head; 0 chooses (see `memory/loss.py`), -1 takes all at once."""
    mlp_tile_tokens: int = 0
    """Tokens in a tile of an MLP; -1 takes all at once. 0 takes as many tokens as the model is
    wide, at least 1,024; without activation checkpoints it does not tile.
    """
    checkpoint_every: int = 1
    """Of so many blocks only the input is kept for backward; 0: no activation checkpoints."""
    offload: Offload = "none"
    """Where these inputs wait: on the device ("none"), in host memory ("host"), in files
    ("disk").
    """
    offload_folder: str | None = None
    """Folder for offload = "disk"; None: the system's temporary folder."""
    parameter_offload: bool = False
    """Keep shards and gradients in host memory, where the optimizer then steps."""
    compile: bool = False
    """Compile the MLP and the norms of each block with torch.compile."""
    z_loss: float = 0.0
    """Weight of the squared log-normalizer of the logits (see `memory/loss.py`)."""
    param_dtype: torch.dtype | None = None
    """Dtype in which the model computes; None: its own. Parameters are stored as they are."""
    reduce_dtype: torch.dtype | None = None
    """Dtype in which gradients are summed; None: fp32, or wider as param_dtype is."""
    tile_norms_with_mlp: bool = True
    """Whether the norms around an MLP run in its tiles. `parallelize` turns this off for a family
    whose verification holds only without it."""

    def resolved(self, model_dtype: torch.dtype) -> ParallelOptions:
        """The same with the dtypes that None stands for, for a model of this dtype."""
        param_dtype = self.param_dtype or model_dtype
        wide = torch.promote_types(param_dtype, torch.float32)
        return replace(self, param_dtype=param_dtype, reduce_dtype=self.reduce_dtype or wide)


def options_of(config: Config, core: Core) -> ParallelOptions:
    """The options that a config asks for."""
    checkpoint, memory, training = config.activation_checkpoint, config.memory, config.training
    return ParallelOptions(
        attention=core,
        loss_tile_tokens=memory.loss_tile_tokens,
        mlp_tile_tokens=memory.mlp_tile_tokens,
        checkpoint_every=checkpoint.every if checkpoint.mode == "full" else 0,
        offload=checkpoint.offload,
        offload_folder=checkpoint.offload_folder or None,
        parameter_offload=memory.parameter_offload,
        compile=config.compile.enable,
        z_loss=training.z_loss,
        param_dtype=getattr(torch, training.param_dtype),
        reduce_dtype=getattr(torch, training.reduce_dtype),
    )


def select_core(
    name: str, model_config: PreTrainedConfig, *, device_type: str, dtype: torch.dtype
) -> tuple[Core, str]:
    """The core attention that `name` asks for on this kind of device, and why, in a sentence.

    UserError where the named core cannot do what the model needs.
    """
    needs = attention_needs(model_config)
    return choose_core(name, needs, device_type=device_type, dtype=dtype)
