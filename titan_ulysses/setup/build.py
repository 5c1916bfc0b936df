"""The model of a run, built on the meta device, wrapped and sharded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.model import hf
from titan_ulysses.model.float8 import use_float8
from titan_ulysses.model.freezing import cast_frozen_params, freeze
from titan_ulysses.model.lora import add_adapters
from titan_ulysses.model.nf4 import NF4, quantize_base
from titan_ulysses.model.released import Release
from titan_ulysses.model.vision import freeze_towers
from titan_ulysses.optim.adamw import check_shards
from titan_ulysses.setup.blocks import find_blocks
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.setup.resolve import RunSpec
from titan_ulysses.ulysses.indexer import unfreeze_indexers

if TYPE_CHECKING:  # importing transformers first is noisy, see model/__init__.py
    from transformers import PreTrainedModel


def build_frozen(
    spec: RunSpec, mesh: Mesh, *, wrap: Callable[..., Any] = parallelize
) -> PreTrainedModel:
    """Build a second model on the meta device that is only read, wrapped and sharded as the first.

    All of it is frozen, in the dtype of the computation. See `build_model`.
    """
    model = hf.build_on_meta(spec.whole_config, getattr(torch, spec.config.training.param_dtype))
    model.requires_grad_(False)
    wrap(model, mesh, spec.options)
    return model.eval()


def build_model(
    spec: RunSpec, mesh: Mesh, *, wrap: Callable[..., Any] = parallelize
) -> tuple[PreTrainedModel, int]:
    """Build the model on the meta device, wrap and shard it, and count its float8 layers.

    Returns the model and the number of linear layers that compute in float8. `hf.allocate` later
    allocates this rank's shards. wrap(model, mesh, options) parallelizes the model in place; the
    planner passes one that runs no collectives.
    """
    config = spec.config
    compute = getattr(torch, config.training.param_dtype)
    wide = torch.promote_types(compute, torch.float32)
    dtype = compute if config.optimizer.stochastic_rounding else wide
    model = hf.build_on_meta(spec.whole_config, dtype, **spec.kind)
    float8_layers = 0
    if config.quantize.float8:
        # A matrix product has the tokens of a rank, of its part of a chunk, or of a tile.
        tokens = math.gcd(*spec.chunk_rows, max(0, config.memory.mlp_tile_tokens))
        float8_layers = use_float8(find_blocks(model)[1], tokens=tokens)
    if config.lora.rank:
        add_adapters(model, config.lora)
        if config.loss.indexer != "frozen":  # before what is frozen gets another dtype
            unfreeze_indexers(find_blocks(model)[1])
    freeze(model, config.model.freeze)
    if config.model.vision == "frozen":
        freeze_towers(model)
    cast_frozen_params(model, compute)
    if (form := config.lora.quantize_base) != "none":
        settings = getattr(spec.model_config, "quantization_config", None)
        otherwise = NF4() if form == "nf4" else None
        quantize_base(find_blocks(model)[1], Release(model, settings, otherwise))
    wrap(model, mesh, spec.options)
    check_shards(model.parameters(), config.optimizer)
    return model.train(), float8_layers
