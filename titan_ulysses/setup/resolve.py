"""`resolve`: derive what follows from a config, once, before a process group or a weight exists.

The trainer, the planner, the scripts and the benchmarks all start here, so that a config means the
same run to each of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from titan_ulysses.config.schema import REFERRING, Config
from titan_ulysses.config.validate import MeshDegrees, check, check_frozen
from titan_ulysses.data.processor import VisionProcessor, open_vision
from titan_ulysses.data.tokenizer import load_tokenizer, num_token_ids
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import chunk_length
from titan_ulysses.launch.host import visible_gpus
from titan_ulysses.memory.offload import check_room
from titan_ulysses.model import hf
from titan_ulysses.model.families import check_family, largest_head, text_part
from titan_ulysses.model.float8 import check_float8
from titan_ulysses.model.lora import check_lora
from titan_ulysses.model.prediction import check_layer
from titan_ulysses.model.resize_embeddings import grow_vocabulary
from titan_ulysses.model.rope_scaling import scale_rope
from titan_ulysses.model.vision import check_vision_setting
from titan_ulysses.observability.profiling import check_profiling
from titan_ulysses.observability.wandb import check_wandb
from titan_ulysses.optim.adamw import check_optimizer
from titan_ulysses.setup.options import ParallelOptions, options_of, select_core
from titan_ulysses.ulysses.cores import Core

if TYPE_CHECKING:  # importing transformers first is noisy, see model/__init__.py
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SelectCore = Callable[..., tuple[Core, str]]
"""A function like `select_core`: (name, model config, device_type=, dtype=, seq_len=) -> (core,
reason)."""


@dataclass(frozen=True)
class RunSpec:
    """A config and what follows from it. It needs no process group, GPU or weight."""

    config: Config
    model_config: PreTrainedConfig
    """The model's config, with the RoPE scaling and the vocabulary size that `config` asks for; of
    a model of images and text, that of its text."""
    whole_config: PreTrainedConfig
    """The config that the model is built of: the same, or that of a model of images and text."""
    part_of: str | None
    """The type of the multi-modal model whose text part it is; None: of none."""
    degrees: MeshDegrees
    device_type: str
    """The device type of the run: "cpu" or "cuda"."""
    core: Core
    """The core attention function."""
    core_reason: str
    """Which core was chosen and why, as a sentence for the log."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """None if the caller did not ask for it and resize_embeddings does not need it."""
    vision: VisionProcessor | None = None
    """What reads images for the model, with the tokenizer; None: it has none."""
    frozen: RunSpec | None = None
    """The second model, which the loss reads: a reference or a teacher. None if there is none."""

    @property
    def options(self) -> ParallelOptions:
        """What the config means for `parallelize`."""
        return options_of(self.config, self.core)

    @property
    def scores(self) -> bool:
        """Whether it is a model that scores whole documents, not one that predicts tokens."""
        return self.config.loss.name == "reward"

    @property
    def kind(self) -> dict[str, bool]:
        """What `hf.build_on_meta` is told of the model besides its config."""
        return {"classifier": self.scores, "predicts": self.config.loss.prediction_weight > 0}

    @property
    def local_tokens(self) -> int:
        """Tokens of a micro-batch on one rank: rows times S / P."""
        training = self.config.training
        return training.local_batch_size * training.seq_len // self.degrees.sequence

    @property
    def chunk_rows(self) -> tuple[int, int]:
        """Tokens of a micro-batch on one rank in a full chunk, and in the last one (0: full)."""
        training, degree = self.config.training, self.degrees.sequence
        setting, length = self.config.memory.stream_chunk_tokens, training.seq_len
        chunk = chunk_length(setting, length, degree) or length
        rows = training.local_batch_size
        return rows * chunk // degree, rows * (length % chunk) // degree

    def with_config(self, config: Config, degrees: MeshDegrees) -> RunSpec:
        """Return a spec of the same model with other settings of memory, parallelism or length.

        The settings are not checked again. This is for the planner's search, which also tries
        settings that a run must not have.
        """
        frozen = self.frozen and self.frozen.with_config(config, degrees)
        return replace(self, config=config, degrees=degrees, frozen=frozen)


def resolve(
    config: Config,
    *,
    world_size: int,
    device_type: str,
    with_tokenizer: bool = False,
    select: SelectCore = select_core,
) -> RunSpec:
    """Return what config means on world_size ranks of this device type.

    with_tokenizer: also load the tokenizer, and check it against the model. `select` chooses the
    core attention. UserError with exit code 2 for settings that contradict each other, the model or
    the number of ranks, and with exit code 1 for a model, core or tokenizer that cannot be used.
    """
    whole = hf.load_model_config(config.model.path, config.model.config)
    built = whole
    if config.model.vision == "off":
        built = whole if config.model.config else text_part(whole)
    check_vision_setting(config.model.vision, built)
    check_family(built)
    if config.loss.name == "reward":
        hf.make_reward_model(built)
    if config.loss.prediction_weight:
        check_layer(built)
    model_config = built.get_text_config() if hf.has_vision(built) else built
    if config.model.rope_scaling:
        scale_rope(model_config, config.model.rope_scaling)
    core, core_reason = _core_of(config, model_config, device_type, select)
    tokenizer, vision, token_ids = None, None, 0
    if with_tokenizer or config.model.resize_embeddings:
        tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
        if config.model.vision != "off":
            vision = open_vision(config, built)
        if vision and not tokenizer.chat_template:
            tokenizer.chat_template = vision.processor.chat_template
        token_ids = num_token_ids(tokenizer)
    # The vocabulary grows first, because the settings are checked against the resulting model.
    if multiple := config.model.resize_embeddings:
        grow_vocabulary(model_config, num_token_ids=token_ids, multiple=multiple)
    degrees = check(
        config, world_size=world_size, model_config=model_config, num_token_ids=token_ids
    )
    spec = RunSpec(
        config=config,
        model_config=model_config,
        whole_config=built,
        part_of=None if built is whole else whole.model_type,
        degrees=degrees,
        device_type=device_type,
        core=core,
        core_reason=core_reason,
        tokenizer=tokenizer,
        vision=vision,
    )
    return replace(spec, frozen=_frozen_spec(spec, select))


def _frozen_spec(spec: RunSpec, select: SelectCore) -> RunSpec | None:
    """Return the spec of the second model, which [loss] asks for, or None.

    It is computed as the first one is. UserError if it has another vocabulary, or not the
    positions for these sequences.
    """
    config, loss = spec.config, spec.config.loss
    refers = loss.name in REFERRING
    if not refers and loss.name != "distillation":
        return None
    setting = "loss.reference" if refers else "loss.teacher"
    path = loss.reference if refers else loss.teacher
    if not path:  # of a teacher: its log-probabilities come with the data
        return spec if refers and not config.lora.rank else None
    own = hf.load_model_config(path, None, setting=setting)
    check_family(own)
    if config.model.rope_scaling and refers:
        scale_rope(own, config.model.rope_scaling)  # it is the same model, of another time
    check_frozen(config, own, spec.model_config, setting=f'{setting} = "{path}"')
    core, reason = _core_of(config, own, spec.device_type, select)
    return replace(spec, model_config=own, whole_config=own, core=core, core_reason=reason)


def _core_of(
    config: Config, model_config: PreTrainedConfig, device_type: str, select: SelectCore
) -> tuple[Core, str]:
    return select(
        config.model.attention,
        model_config,
        device_type=device_type,
        dtype=getattr(torch, config.training.param_dtype),
        seq_len=config.training.seq_len,
    )


def resolve_model(
    model: str | dict[str, Any],
    *,
    world_size: int = 1,
    device_type: str = "cpu",
    param_dtype: str = "float32",
) -> RunSpec:
    """Return the spec of a model alone: a folder, a hub name, or a table as in [model.config]."""
    key = "path" if isinstance(model, str) else "config"
    training = {"seq_len": 1, "param_dtype": param_dtype}  # a placeholder: no length is known here
    config = Config.model_validate({"model": {key: model}, "training": training})
    return resolve(config, world_size=world_size, device_type=device_type)


def check_machine(spec: RunSpec) -> None:
    """Raise UserError if this machine lacks something that the run needs.

    This can be a package, a compiler, or room for offloaded checkpoints.
    """
    config, checkpoint = spec.config, spec.config.activation_checkpoint
    if spec.device_type == "cpu":
        visible_gpus()  # refuses GPUs that torch cannot use
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
        attention=_bytes_of_kept_attention(spec),
    )


def _bytes_of_kept_attention(spec: RunSpec) -> int:
    """Return the most bytes of outputs of attention and log-sum-exps that a rank must keep."""
    config, model = spec.config, spec.model_config
    is_streamed = spec.chunk_rows[0] < spec.local_tokens
    if config.activation_checkpoint.keep_attention != "all" or not is_streamed:
        return 0
    itemsize = getattr(torch, config.training.param_dtype).itemsize
    heads, size = model.num_attention_heads, largest_head(model) or model.hidden_size
    a_token = heads * (size * itemsize + max(4, itemsize))
    return model.num_hidden_layers * spec.local_tokens * a_token
