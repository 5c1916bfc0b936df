"""The options of `parallelize`, and the choice of core attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from titan_ulysses.config.fields import CORES
from titan_ulysses.config.schema import Config
from titan_ulysses.distributed.errors import UserError, one_line
from titan_ulysses.memory.offload import Offload
from titan_ulysses.model.families import attention_needs, largest_head
from titan_ulysses.streaming.block import KeepAttention
from titan_ulysses.ulysses.cores import Core, Demand, choose_core
from titan_ulysses.ulysses.pieces import pieces_of

if TYPE_CHECKING:  # importing transformers first is noisy, see model/__init__.py
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ParallelOptions:
    """Options of `parallelize`. The defaults suit long sequences on one node."""

    attention: str | Core = "auto"
    """A core attention function, or the name of one (see `ulysses/cores.py`)."""
    loss_tile_tokens: int = 0
    """Tokens per tile of the loss head; -1: no tiling.

    0 takes as many tokens as give 64 MiB of fp32 logits on a CPU, and 1 GiB on CUDA.
    """
    mlp_tile_tokens: int = 0
    """Tokens per tile of MLPs and norms; -1: no tiling.

    0 does not tile if there are no activation checkpoints. If there are, it takes as many tokens as
    give 512 MiB of tensors inside an MLP on CUDA. On a CPU it takes as many as the model's hidden
    size, but at least 1,024.
    """
    checkpoint_every: int = 1
    """Blocks per activation checkpoint, which keeps only its input for backward; 0: none."""
    offload: Offload = "none"
    """Where these inputs are kept: "none" (the device), "host" (host memory) or "disk" (files)."""
    keep_attention: KeepAttention = "none"
    """Which outputs of attention are kept in the same place, and not computed again in backward.

    "none", "all", or "auto": as many as there is room for (none on the device). Only streamed
    blocks keep them.
    """
    offload_folder: str | None = None
    """Folder for offload = "disk"; None: the system's temporary folder."""
    stream_chunk_tokens: int = 0
    """Tokens of the whole sequence in a chunk, in which blocks compute it (`streaming/`).

    0 chooses, and computes the whole sequence at once if it is short or the blocks cannot stream;
    -1 always does. Batches must be cut for it, unless P = 1: see `shard`.
    """
    stream_offload: Offload = "none"
    """Where the hidden states of the whole sequence are while blocks stream: "none" (the device),
    "host" or "disk" (see `memory/sequences.py`). offload is not needed then.
    """
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

    @property
    def store(self) -> Offload:
        """Where inputs of blocks and outputs of attention are kept."""
        return self.offload if self.offload != "none" else self.stream_offload

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
        keep_attention=checkpoint.keep_attention,
        offload_folder=checkpoint.offload_folder or None,
        stream_chunk_tokens=memory.stream_chunk_tokens,
        stream_offload=memory.stream_offload,
        parameter_offload=memory.parameter_offload,
        compile=config.compile.enable,
        z_loss=training.z_loss,
        param_dtype=getattr(torch, training.param_dtype),
        reduce_dtype=getattr(torch, training.reduce_dtype),
    )


def obstacle_to_streaming(
    model_config: PreTrainedConfig, options: ParallelOptions, device_type: str
) -> str | None:
    """Return why blocks cannot or should not work through a sequence in chunks, or None.

    options.attention must be a core. UserError if options ask for chunks that cannot be. What
    would only be slow is no obstacle then.
    """
    assert callable(options.attention)
    reason = None
    if options.stream_chunk_tokens == -1:
        reason = "memory.stream_chunk_tokens is off"
        if options.keep_attention != "none":
            raise UserError(
                f'activation_checkpoint.keep_attention = "{options.keep_attention}" needs layers '
                f'that are streamed: {reason}. Set it to "none".'
            )
    elif not options.checkpoint_every:
        reason = "it keeps only the inputs of blocks, and there are no activation checkpoints"
    elif pieces_of(options.attention) is None:
        name = getattr(options.attention, "__name__", "model.attention")
        reason = f"the core {name} has no `pieces` (see titan_ulysses/ulysses/scores.py)"
    elif getattr(model_config, "num_kv_shared_layers", 0):
        reason = "layers of this model read the keys of another layer (num_kv_shared_layers)"
    if reason and options.stream_chunk_tokens > 0:
        raise UserError(
            f"memory.stream_chunk_tokens = {options.stream_chunk_tokens}: {reason}. Set it to "
            '"auto" or "off".'
        )
    if reason and options.stream_offload != "none":
        raise UserError(
            f'memory.stream_offload = "{options.stream_offload}" needs layers that are streamed: '
            f'{reason}. Set it to "none".'
        )
    wanted = options.stream_chunk_tokens > 0 or options.stream_offload != "none"
    if reason is None and not wanted and device_type == "cuda":
        if "softcap" in attention_needs(model_config):
            reason = "on a GPU, soft-capped scores have no fast kernel for chunks"
        elif options.param_dtype is not None and options.param_dtype.itemsize != 2:
            reason = f"on a GPU, {options.param_dtype} has no fast kernel for chunks"
    return reason


def select_core(
    name: str,
    model_config: PreTrainedConfig,
    *,
    device_type: str,
    dtype: torch.dtype,
    seq_len: int | None = None,
    packages: bool = True,
) -> tuple[Core, str]:
    """Return the core attention that `name` asks for on this device type, and the reason for it.

    The reason is a sentence for the log. packages: whether packages must be here (see `Demand`).
    UserError if the named core cannot do what the model needs.
    """
    demand = Demand(
        frozenset(attention_needs(model_config)),
        device_type,
        dtype,
        seq_len=seq_len,
        head_size=largest_head(model_config),
        packages=packages,
    )
    try:
        return choose_core(name, demand)
    except UserError:
        raise
    except Exception as error:  # a module of the user's may raise anything, or hold something else
        raise UserError(
            f'model.attention = "{name}": cannot be used ({type(error).__name__}: '
            f"{one_line(error)}). Give a function of package.module:function, or one of "
            f"{', '.join(CORES)}."
        ) from error
