"""The options of `parallelize`, and the choice of core attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from titan_ulysses.config.fields import CORES, Section
from titan_ulysses.config.load import explained
from titan_ulysses.config.rules import broken_rule
from titan_ulysses.config.schema import ActivationCheckpoint, Compile, Config, Memory
from titan_ulysses.distributed.errors import UserError, one_line
from titan_ulysses.memory.offload import Offload
from titan_ulysses.model.families import attention_needs, largest_head
from titan_ulysses.ulysses.cores import Core, CoreRequirements, choose_core
from titan_ulysses.ulysses.indexer import Training
from titan_ulysses.ulysses.pieces import pieces_of

if TYPE_CHECKING:  # importing transformers first is noisy, see model/__init__.py
    from transformers import PreTrainedConfig


def _dtype(name: Any) -> Any:
    return getattr(torch, name, name) if isinstance(name, str) else name


class ParallelOptions(BaseModel):
    """The keywords of `parallelize`: sections of a config, and keys of [model], [training], [loss].

    They have the names, defaults and meaning that they have there (see `config/schema.py`), except
    for the dtypes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    attention: str | Callable[..., Any] = "auto"
    """A core attention function, or what model.attention can be (see `ulysses/cores.py`)."""
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    memory: Memory = Memory()
    """Without optimizer_offload, which is about the optimizer of train.py."""
    compile: Compile = Compile()
    z_loss: float = 0.0
    indexer: Training = "frozen"
    """How the indexers of sparse attention are trained, as loss.indexer."""
    label_smoothing: float = 0.0
    """Of the cross-entropy."""
    param_dtype: Annotated[torch.dtype | None, BeforeValidator(_dtype)] = None
    """Dtype in which the model computes; None: the model's dtype. Stored parameters keep theirs."""
    reduce_dtype: Annotated[torch.dtype | None, BeforeValidator(_dtype)] = None
    """Dtype in which gradients are summed; None: fp32, or param_dtype if that is wider."""
    tile_norms_with_mlp: bool = True
    """Whether the norms around an MLP run in the MLP's tiles.

    `parallelize` turns this off for a model family whose verification succeeds only without it.
    """

    @model_validator(mode="after")
    def _moves_checkpoints_that_it_makes(self) -> ParallelOptions:
        table = self.activation_checkpoint
        if problem := broken_rule(self, "activation_checkpoint", table, "offload"):
            raise UserError(problem)
        return self

    def changed(self, **keywords: Any) -> ParallelOptions:
        """Return these options with others; a table changes only the keys that it has.

        UserError for what `parallelize` does not take.
        """
        for name, value in keywords.items():
            before = getattr(self, name, None)
            if isinstance(value, dict) and isinstance(before, Section):
                keywords[name] = dict(before) | value
        try:
            return ParallelOptions.model_validate(dict(self) | keywords)
        except ValidationError as error:
            raise UserError("\n".join(explained(error))) from None

    @property
    def checkpoint_every(self) -> int:
        """Blocks per activation checkpoint, which keeps only its input for backward; 0: none."""
        checkpoint = self.activation_checkpoint
        return checkpoint.every if checkpoint.mode == "full" else 0

    @property
    def store(self) -> Offload:
        """Where inputs of blocks and outputs of attention are kept."""
        offload = self.activation_checkpoint.offload
        return offload if offload != "none" else self.memory.stream_offload

    def resolved(self, model_dtype: torch.dtype) -> ParallelOptions:
        """Return these options with concrete dtypes in place of None, for a model of this dtype."""
        param_dtype = self.param_dtype or model_dtype
        wide = torch.promote_types(param_dtype, torch.float32)
        return self.changed(param_dtype=param_dtype, reduce_dtype=self.reduce_dtype or wide)


def options_of(config: Config, core: Core) -> ParallelOptions:
    """Return the options that a config asks for, with core as the core attention."""
    training, loss = config.training, config.loss
    return ParallelOptions(
        attention=core,
        activation_checkpoint=config.activation_checkpoint,
        memory=config.memory,
        compile=config.compile,
        z_loss=training.z_loss,
        indexer=loss.indexer,
        label_smoothing=loss.label_smoothing if loss.name == "cross_entropy" else 0.0,
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
    memory, kept = options.memory, options.activation_checkpoint.keep_attention
    reason = None
    needs = 'needs layers that are streamed: {}. Set it to "none".'
    if memory.stream_chunk_tokens == -1:
        reason = "memory.stream_chunk_tokens is off"
        if kept != "none":
            setting = f'activation_checkpoint.keep_attention = "{kept}"'
            raise UserError(f"{setting} {needs.format(reason)}")
    elif not options.checkpoint_every:
        reason = "it keeps only the inputs of blocks, and there are no activation checkpoints"
    elif pieces_of(options.attention) is None:
        name = getattr(options.attention, "__name__", "model.attention")
        reason = f"the core {name} has no `pieces` (see titan_ulysses/ulysses/scores.py)"
    elif getattr(model_config, "num_kv_shared_layers", 0):
        reason = "layers of this model read the keys of another layer (num_kv_shared_layers)"
    if reason and memory.stream_chunk_tokens > 0:
        raise UserError(
            f"memory.stream_chunk_tokens = {memory.stream_chunk_tokens}: {reason}. Set it to "
            '"auto" or "off".'
        )
    if reason and memory.stream_offload != "none":
        setting = f'memory.stream_offload = "{memory.stream_offload}"'
        raise UserError(f"{setting} {needs.format(reason)}")
    wanted = memory.stream_chunk_tokens > 0 or memory.stream_offload != "none"
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

    The reason is a sentence for the log. packages: whether packages must be here (see
    `CoreRequirements`).
    UserError if the named core cannot do what the model needs.
    """
    requirements = CoreRequirements(
        frozenset(attention_needs(model_config)),
        device_type,
        dtype,
        seq_len=seq_len,
        head_size=largest_head(model_config),
        packages=packages,
    )
    try:
        return choose_core(name, requirements)
    except UserError:
        raise
    except Exception as error:  # a module of the user's may raise anything, or hold something else
        raise UserError(
            f'model.attention = "{name}": cannot be used ({type(error).__name__}: '
            f"{one_line(error)}). Give a function of package.module:function, or one of "
            f"{', '.join(CORES)}."
        ) from error
