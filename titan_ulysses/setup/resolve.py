"""`resolve`: everything that follows from a config, once, before a process group or a weight
exists.

The trainer, the planner, the scripts and the benchmarks all begin here, so that one config means
the same run to each of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from titan_ulysses.config.schema import Config
from titan_ulysses.config.validate import MeshDegrees, check
from titan_ulysses.data.tokenizer import load_tokenizer, num_token_ids
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.memory.offload import check_room
from titan_ulysses.model import hf
from titan_ulysses.model.embeddings import grow_vocabulary
from titan_ulysses.model.families import check_family
from titan_ulysses.model.float8 import check_float8
from titan_ulysses.model.lora import check_lora
from titan_ulysses.model.rope_scaling import scale_rope
from titan_ulysses.observability.profiling import check_profiling
from titan_ulysses.observability.wandb import check_wandb
from titan_ulysses.optim.adamw import check_optimizer
from titan_ulysses.setup.options import ParallelOptions, options_of, select_core
from titan_ulysses.ulysses.cores import Core

if TYPE_CHECKING:  # importing transformers first is noisy, see model/__init__.py
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SelectCore = Callable[..., tuple[Core, str]]
"""As `select_core`: (name, model config, device_type=, dtype=) -> (core, why)."""


@dataclass(frozen=True)
class RunSpec:
    """A config and what follows from it. Nothing here needs a process group, a GPU or a weight."""

    config: Config
    model_config: PreTrainedConfig
    """With the RoPE scaling and the vocabulary that the config asks for."""
    degrees: MeshDegrees
    device_type: str
    """What the run computes on: "cpu" or "cuda"."""
    core: Core
    """Core attention."""
    core_reason: str
    """Which core that is, and why, in a sentence."""
    options: ParallelOptions
    tokenizer: PreTrainedTokenizerBase | None = None
    """None where the caller has no text to read."""

    @property
    def local_tokens(self) -> int:
        """Tokens that a rank holds of a micro-batch: rows times S / P."""
        training = self.config.training
        return training.local_batch_size * training.seq_len // self.degrees.sequence

    def with_config(self, config: Config, degrees: MeshDegrees) -> RunSpec:
        """The same model with other settings of memory, parallelism or length, not checked again.

        For the planner's search, which goes beyond what a run may do.
        """
        options = options_of(config, self.core)
        return replace(self, config=config, degrees=degrees, options=options)


def resolve(
    config: Config,
    *,
    world_size: int,
    device_type: str,
    with_tokenizer: bool = False,
    select: SelectCore = select_core,
) -> RunSpec:
    """What config means on so many ranks of this kind of device.

    with_tokenizer: load the tokenizer too, and check it against the model. `select` chooses the
    core attention. UserError, with exit code 2, for settings that contradict each other, the model
    or the ranks.
    """
    model_config = hf.load_model_config(config.model.path, config.model.config)
    check_family(model_config)
    if config.model.rope_scaling:
        scale_rope(model_config, config.model.rope_scaling)
    core, core_reason = select(
        config.model.attention,
        model_config,
        device_type=device_type,
        dtype=getattr(torch, config.training.param_dtype),
    )
    tokenizer, token_ids = None, 0
    if with_tokenizer or config.model.resize_embeddings:
        tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
        token_ids = num_token_ids(tokenizer)
    if multiple := config.model.resize_embeddings:
        grow_vocabulary(model_config, num_token_ids=token_ids, multiple=multiple)
    degrees = check(
        config,
        world_size=world_size,
        model_config=model_config,
        num_token_ids=token_ids,
    )
    return RunSpec(
        config=config,
        model_config=model_config,
        degrees=degrees,
        device_type=device_type,
        core=core,
        core_reason=core_reason,
        options=options_of(config, core),
        tokenizer=tokenizer,
    )


def resolve_model(
    model: str | dict[str, Any],
    *,
    world_size: int = 1,
    device_type: str = "cpu",
    param_dtype: str = "float32",
) -> RunSpec:
    """The spec of a model alone: a folder or hub name, or a table as in [model.config]."""
    key = "path" if isinstance(model, str) else "config"
    training = {"seq_len": 1, "param_dtype": param_dtype}  # whatever length the caller gives it
    config = Config.model_validate({"model": {key: model}, "training": training})
    return resolve(config, world_size=world_size, device_type=device_type)


def check_machine(spec: RunSpec) -> None:
    """UserError where this machine lacks what the run needs: a package, a compiler, room on the
    node.
    """
    config, checkpoint = spec.config, spec.config.activation_checkpoint
    check_optimizer(config.optimizer)
    check_lora(config.lora)
    if config.quantize.float8:
        check_float8(spec.device_type)
    check_profiling(config.profiling, spec.device_type)
    if config.metrics.enable_wandb:
        check_wandb()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if config.compile.enable and spec.device_type == "cpu" and not compiler:
        raise UserError(
            "compile.enable = true needs a C++ compiler on a CPU: install g++, or set it to false."
        )
    tokens = config.training.seq_len // spec.degrees.sequence
    check_room(
        checkpoint.offload,
        checkpoint.offload_folder,
        shape=(config.training.local_batch_size, tokens, spec.model_config.hidden_size),
        itemsize=getattr(torch, config.training.param_dtype).itemsize,
        segments=-(-spec.model_config.num_hidden_layers // checkpoint.every),
        processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
