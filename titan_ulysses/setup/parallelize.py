"""Turn a transformers causal LM into one that trains sharded: the ordered application of all
wrappers, a line each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from transformers import PreTrainedConfig, PreTrainedModel

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.memory.checkpointing import checkpoint_blocks
from titan_ulysses.memory.loss import LossHead
from titan_ulysses.memory.offload import Store, open_store
from titan_ulysses.model.families import (
    CHECKED_FAMILIES,
    check_family,
    head_of,
)
from titan_ulysses.model.verification import Tilings, verify_family
from titan_ulysses.setup.blocks import compile_blocks, find_blocks, tile_blocks
from titan_ulysses.setup.checks import check_dropout, check_same_weights, use_one_dtype
from titan_ulysses.setup.forward import use_ulysses
from titan_ulysses.setup.guard import guard
from titan_ulysses.setup.options import ParallelOptions, select_core
from titan_ulysses.ulysses.cores import Core

_SMALLEST_TILE = 1024
"""Tokens. Otherwise as many as the model is wide, as in ALST: a tile's input is then no larger than
a weight.
"""

_ELSEWHERE = (
    "Call titan_ulysses.save_pretrained(model, folder) on every rank, which writes what "
    "from_pretrained opens"
)
_REFUSED = {
    "save_pretrained": f"model.save_pretrained: each rank has a piece of the model. {_ELSEWHERE}.",
    "push_to_hub": f"model.push_to_hub: each rank has a piece of the model. {_ELSEWHERE}, and "
    "upload that folder.",
    "generate": "model.generate: the sharded model keeps no keys and values of tokens before. "
    f"{_ELSEWHERE}, and generate with that model.",
}
"""What transformers' models can do and the sharded one cannot."""


def parallelize(
    model: PreTrainedModel, mesh: Mesh, options: ParallelOptions | None = None, **fields: Any
) -> PreTrainedModel:
    """Wrap model in place: Ulysses attention, tiling, loss head, activation checkpointing, FSDP2.

    options, or its fields as keywords: `parallelize(model, mesh, offload="host")`.

    The model's forward then takes the batches of `shard` (see `forward.py`), in any order with
    backward, step and evaluation (see `guard`). Names stay as they are; `save_pretrained` and
    `save_checkpoint` of this package save it. The model may be on meta. One that is not must be the
    same on all ranks, and each keeps its shard of it.

    Collective. UserError for a model or a core that would train wrongly.
    """
    options = replace(options or ParallelOptions(), **fields).resolved(model.dtype)
    check_family(model.config)
    check_dropout(model)
    check_same_weights(model)
    if isinstance(options.attention, str):
        core, _ = select_core(
            options.attention,
            model.config,
            device_type=mesh.device.type,
            dtype=options.param_dtype,
        )
        options = replace(options, attention=core)
    store = open_store(options.offload, options.offload_folder, mesh.device)
    if model.config.model_type not in CHECKED_FAMILIES:
        options = _verified(model.config, mesh, options, store)
    return wrap(model, mesh, options, store=store)


def _verified(
    config: PreTrainedConfig, mesh: Mesh, options: ParallelOptions, store: Store | None
) -> ParallelOptions:
    """Collective. The options with which a family that nobody has checked trains exactly."""
    # Verification is about the family, in fp64: what has nothing to do with that is left out.
    plain = replace(
        options,
        compile=False,
        z_loss=0.0,
        parameter_offload=False,
        param_dtype=None,
        reduce_dtype=None,
    )

    def shard(tiny: PreTrainedModel, core: Core, tiling: dict[str, Any]) -> None:
        wrap(tiny, mesh, replace(plain, attention=core, **tiling), store=store)

    return replace(options, **verify_family(config, mesh, shard, _tilings(options)))


def _tilings(options: ParallelOptions) -> Tilings:
    """How the blocks of a family that nobody has checked may be tiled, the best way first."""
    whole = {"not tiled": {"mlp_tile_tokens": -1}}
    if _mlp_tile_tokens(options, hidden_size=1) == -1:
        return whole
    with_norms = {"tiled with its norms": {}}
    without_norms = {"tiled without its norms": {"tile_norms_with_mlp": False}}
    return with_norms | without_norms | whole


def wrap(
    model: PreTrainedModel, mesh: Mesh, options: ParallelOptions, *, store: Store | None
) -> PreTrainedModel:
    """What `parallelize` does to a model once nothing speaks against it: each wrapper in its order.

    options.attention is a core here. store keeps the inputs of activation checkpoints off the
    device.
    """
    assert callable(options.attention)
    decoder, blocks = find_blocks(model)
    use_ulysses(model, decoder, blocks, mesh, options.attention)
    tile_tokens = _mlp_tile_tokens(options, model.config.hidden_size)
    if tile_tokens != -1:
        tile_blocks(model, decoder, blocks, tile_tokens, norms_with_mlp=options.tile_norms_with_mlp)
    if options.compile:
        compile_blocks(blocks)
    use_loss_head(model, decoder, options.loss_tile_tokens, options.z_loss)
    policies = {"mp_policy": _precision(options), "offload_policy": _offloading(options, mesh)}

    def shard(*modules: nn.Module, **how) -> None:
        """Gather these together, as one group of FSDP."""
        use_one_dtype(*modules)
        fully_shard(list(modules), mesh=mesh.fsdp, **policies, **how)

    shard_blocks(model, blocks, shard)
    if options.checkpoint_every:
        checkpoint_blocks(blocks, every=options.checkpoint_every, store=store)
    shard_root(model, shard)
    guard(model)
    for name, reason in _REFUSED.items():
        setattr(model, name, partial(_refuse, reason))
    return model


def _mlp_tile_tokens(options: ParallelOptions, hidden_size: int) -> int:
    if options.mlp_tile_tokens:
        return options.mlp_tile_tokens
    if not options.checkpoint_every:
        return -1  # without checkpoints the tiles would be the only recomputation, and cost time
    return max(_SMALLEST_TILE, hidden_size)


def _precision(options: ParallelOptions) -> MixedPrecisionPolicy:
    """FSDP's policy for the dtypes that are computed with, and in which gradients are summed."""
    return MixedPrecisionPolicy(
        param_dtype=options.param_dtype,
        reduce_dtype=options.reduce_dtype,
        # Nothing is cast: activations have the dtype that parameters give them, also where a
        # checkpoint computes again.
        cast_forward_inputs=False,
    )


def _offloading(options: ParallelOptions, mesh: Mesh) -> OffloadPolicy:
    if not options.parameter_offload:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda")


def _refuse(reason: str, *_, **__) -> NoReturn:
    raise UserError(reason)


def use_loss_head(
    model: PreTrainedModel, decoder: nn.Module, tile_tokens: int, z_loss: float
) -> None:
    """Let `lm_head` compute the loss, with what the family does to its logits."""
    shape, linear = head_of(model, decoder), model.get_output_embeddings()
    model.set_output_embeddings(
        LossHead(
            linear,
            tile_tokens=tile_tokens,
            scale=shape.scale,
            softcap=shape.softcap,
            z_loss=z_loss,
        )
    )


def shard_blocks(model: PreTrainedModel, blocks: nn.ModuleList, shard: Callable[..., Any]) -> None:
    """FSDP2 over dp_shard x sp, replicated over dp_replicate, of each block, the embedding and the
    head.
    """
    for block in blocks:
        shard(block)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # Tied they are one group, gathered from the first to the last: FSDP refuses a parameter that
    # two groups hold.
    for group in [[embedding, head]] if embedding.weight is head.weight else [[embedding], [head]]:
        shard(*group)
        group[0].set_unshard_in_backward(not all(_rests_in_backward(module) for module in group))


def _rests_in_backward(module: nn.Module) -> bool:
    """Whether its backward needs no weight: a loss head has computed its gradients in forward, a
    look-up's is a sum.
    """
    is_look_up = type(module).forward is nn.Embedding.forward or type(module).__name__.endswith(
        "ScaledWordEmbedding"
    )
    return isinstance(module, LossHead) or is_look_up


def shard_root(model: PreTrainedModel, shard: Callable[..., Any]) -> None:
    """FSDP2 of what is left; and gradients are summed over the mesh, never averaged."""
    # Nothing stays gathered behind a forward, which FSDP would let the root do: a backward may
    # never come, and then the model would show gathered parameters without gradients, and compute
    # with them after the next step.
    shard(model, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Factor 1 and a plain SUM: the loss is divided by the step's tokens already, and gloo
            # has no PREMUL_SUM.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
