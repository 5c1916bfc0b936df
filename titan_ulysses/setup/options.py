"""The options of `parallelize`, and the choice of core attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from titan_ulysses.config.schema import CORES, Config
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.failure import one_line
from titan_ulysses.memory.offload import Offload
from titan_ulysses.model.families import attention_needs
from titan_ulysses.ulysses.cores import Core, choose_core

if TYPE_CHECKING:  # importing transformers first is noisy, see model/__init__.py
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ParallelOptions:
    """Options of `parallelize`. The defaults suit long sequences on one node."""

    attention: str | Core = "auto"
    """A core attention function, or the name of one (see `ulysses/cores.py`)."""
    loss_tile_tokens: int = 0
    """Tokens per tile of the loss head; 0: as many as give 64 MiB of fp32 logits; -1: no tiling."""
    mlp_tile_tokens: int = 0
    """Tokens per tile of MLPs and norms; -1: no tiling.

    0 takes as many tokens as the model's hidden size, but at least 1,024, if there are activation
    checkpoints, and does not tile if there are none.
    """
    checkpoint_every: int = 1
    """Blocks per activation checkpoint, which keeps only its input for backward; 0: none."""
    offload: Offload = "none"
    """Where these inputs are kept: "none" (the device), "host" (host memory) or "disk" (files)."""
    offload_folder: str | None = None
    """Folder for offload = "disk"; None: the system's temporary folder."""
    parameter_offload: bool = False
    """Keep sharded parameters and gradients in host memory, where the optimizer then steps."""
    compile: bool = False
    """Compile the MLP and the norms of each block with torch.compile."""
    z_loss: float = 0.0
    """Weight of the squared log-normalizer of the logits (see `memory/loss.py`)."""
    param_dtype: torch.dtype | None = None
    """Dtype in which the model computes; None: the model's dtype. Stored parameters keep theirs."""
    reduce_dtype: torch.dtype | None = None
    """Dtype in which gradients are summed; None: fp32, or param_dtype if that is wider."""
    tile_norms_with_mlp: bool = True
    """Whether the norms around an MLP run in the MLP's tiles.

    `parallelize` turns this off for a model family whose verification succeeds only without it.
    """

    def resolved(self, model_dtype: torch.dtype) -> ParallelOptions:
        """Return these options with concrete dtypes in place of None, for a model of this dtype."""
        param_dtype = self.param_dtype or model_dtype
        wide = torch.promote_types(param_dtype, torch.float32)
        return replace(self, param_dtype=param_dtype, reduce_dtype=self.reduce_dtype or wide)


def options_of(config: Config, core: Core) -> ParallelOptions:
    """Return the options that a config asks for, with core as the core attention."""
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
    """Return the core attention that `name` asks for on this device type, and the reason for it.

    The reason is a sentence for the log. UserError if the named core cannot do what the model
    needs.
    """
    needs = attention_needs(model_config)
    try:
        return choose_core(name, needs, device_type=device_type, dtype=dtype)
    except UserError:
        raise
    except Exception as error:  # a module of the user's may raise anything, or hold something else
        raise UserError(
            f'model.attention = "{name}": cannot be used ({type(error).__name__}: '
            f"{one_line(error)}). Give a function of package.module:function, or one of "
            f"{', '.join(CORES)}."
        ) from error
