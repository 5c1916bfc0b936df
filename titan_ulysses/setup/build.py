"""The model that a config describes: built on meta, wrapped and sharded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from titan_ulysses.config.schema import Config
from titan_ulysses.data.tokenizer import load_tokenizer, num_token_ids
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.model import hf
from titan_ulysses.model.embeddings import grow_vocabulary
from titan_ulysses.model.float8 import use_float8
from titan_ulysses.model.freezing import freeze, narrow_frozen
from titan_ulysses.model.lora import add_adapters
from titan_ulysses.model.rope_scaling import scale_rope
from titan_ulysses.optim.adamw import check_shards
from titan_ulysses.setup.parallelize import find_blocks, parallelize
from titan_ulysses.ulysses.cores import Core

if TYPE_CHECKING:  # importing transformers first is noisy, see model/__init__.py
    from transformers import PreTrainedConfig, PreTrainedModel


def load_model_config(config: Config) -> PreTrainedConfig:
    """The transformers config of the model: loaded or written out, with the RoPE and the tokens that a run wants."""
    model_config = hf.load_model_config(config.model.path, config.model.config)
    if config.model.rope_scaling:
        scale_rope(model_config, config.model.rope_scaling)
    if multiple := config.model.resize_embeddings:
        tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
        grow_vocabulary(model_config, num_token_ids=num_token_ids(tokenizer), multiple=multiple)
    return model_config


def build_model(
    config: Config, model_config: PreTrainedConfig, mesh: Mesh, core: Core, *, wrap: Callable[..., Any] = parallelize
) -> tuple[PreTrainedModel, int]:
    """On the meta device, wrapped and sharded; and how many of its layers compute in float8.

    `hf.allocate` gives it memory for this rank's shards. wrap: what parallelizes the model, in place; the planner has
    one that makes no collective.
    """
    checkpoint, compute = config.activation_checkpoint, getattr(torch, config.training.param_dtype)
    master = compute if config.optimizer.stochastic_rounding else torch.promote_types(compute, torch.float32)
    model = hf.build_on_meta(model_config, dtype=master)
    float8_layers = 0
    if config.quantize.float8:
        tokens = config.training.local_batch_size * config.training.seq_len // mesh.sp.size()
        tokens = math.gcd(tokens, max(0, config.memory.mlp_tile_tokens))  # of a call: all, or a tile
        float8_layers = use_float8(find_blocks(model)[1], tokens=tokens)
    if config.lora.rank:
        add_adapters(model, config.lora)
    freeze(model, config.model.freeze)
    narrow_frozen(model, compute)
    wrap(
        model,
        mesh,
        attention=core,
        loss_tile_tokens=config.memory.loss_tile_tokens,
        mlp_tile_tokens=config.memory.mlp_tile_tokens,
        checkpoint_every=checkpoint.every if checkpoint.mode == "full" else 0,
        offload=checkpoint.offload,
        offload_folder=checkpoint.offload_folder or None,
        parameter_offload=config.memory.parameter_offload,
        compile=config.compile.enable,
        z_loss=config.training.z_loss,
        param_dtype=compute,
        reduce_dtype=getattr(torch, config.training.reduce_dtype),
    )
    check_shards(model.parameters(), config.optimizer)
    return model.train(), float8_layers
