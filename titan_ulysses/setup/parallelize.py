"""`parallelize`: turn a transformers causal LM into a sharded one, by a fixed order of wrappers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint as checkpointed
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import AUTOMATIC_CHUNK_TOKENS
from titan_ulysses.memory.allocator import warn_of_fragmentation
from titan_ulysses.memory.checkpointing import checkpoint_blocks
from titan_ulysses.memory.loss_head import LossHead
from titan_ulysses.memory.offload import Store, open_store
from titan_ulysses.memory.sequences import ON_DEVICE, Sequences, SequenceStore
from titan_ulysses.memory.tiled import Tiled, tile_norm
from titan_ulysses.model.expert_adapters import use_low_rank_products
from titan_ulysses.model.families import (
    check_family,
    computes_with_embeddings,
    extra_block_outputs,
    head_of,
    is_checked,
    layer_types,
)
from titan_ulysses.model.hf import classifies, has_vision, output_layer
from titan_ulysses.model.prediction import layer_of
from titan_ulysses.model.rope import use_document_lengths
from titan_ulysses.model.router import router_loss_of
from titan_ulysses.model.verification import Prepare, Tilings, Verification
from titan_ulysses.model.vision import Vision, encoder_of, tower_blocks, towers
from titan_ulysses.setup.blocks import compile_blocks, find_blocks, norms_of, tile_blocks
from titan_ulysses.setup.checks import (
    check_dropout,
    check_group,
    check_not_quantized,
    check_same_weights,
    use_one_dtype,
)
from titan_ulysses.setup.forward import Sharding, use_attention
from titan_ulysses.setup.guard import guard
from titan_ulysses.setup.options import ParallelOptions, obstacle_to_streaming, select_core
from titan_ulysses.streaming.block import stream_blocks
from titan_ulysses.streaming.embeddings import offload_embeddings
from titan_ulysses.ulysses.cores import Core
from titan_ulysses.ulysses.indexer import use_indexers
from titan_ulysses.ulysses.linear_attention import (
    check_layers,
    has_untested_layers,
    use_linear_attention,
)

_OFFLOADED_CHUNK_TOKENS = 2**14
"""Tokens of the smallest chunk of the whole sequence where keys come from host memory to a GPU: a
kernel of 600 TFLOP/s and a link of 50 GB/s need some thousand queries (see streaming/keys.py).
"""
_SMALLEST_TILE = 1024
"""Smallest default size of an MLP tile on a CPU, in tokens.

The default there is the model's hidden size, as in ALST: the input of a tile is then no larger than
a weight matrix.
"""
_CUDA_TILE_BYTES = 512 * 2**20
"""Bytes of what is inside a tile on CUDA: enough work to hide the Python that starts its kernels.

At least 256 tokens, and a multiple: the kernels of products compute blocks of rows.
"""
_CUDA_ROWS = 256
_INSIDE = 6
"""Tensors of the MLP's inner width that are alive at once while a tile is in backward: gate, up,
the activation, their product, and gradients of two of them.
"""

_ELSEWHERE = (
    "Call titan_ulysses.save_pretrained(model, folder) on every rank, which writes what "
    "from_pretrained opens"
)
_REFUSED = {
    "save_pretrained": f"model.save_pretrained: each rank has a piece of the model. {_ELSEWHERE}.",
    "push_to_hub": f"model.push_to_hub: each rank has a piece of the model. {_ELSEWHERE}, and "
    "upload that folder.",
    "generate": f"model.generate: the sharded model has no KV cache. {_ELSEWHERE}, and generate "
    "with that model.",
}
"""Methods of transformers models that a sharded model refuses, with the reason."""


def parallelize(
    model: PreTrainedModel, mesh: Mesh, options: ParallelOptions | None = None, **keywords: Any
) -> PreTrainedModel:
    """Wrap model in place: Ulysses attention, tiling, loss head, activation checkpointing, FSDP2.

    The keywords are settings under the names that they have in a config file: the sections
    `activation_checkpoint`, `memory` and `compile` as tables, and `attention`, `z_loss`,
    `label_smoothing`, `param_dtype` and `reduce_dtype` (see `ParallelOptions`, which may be given):

        parallelize(model, mesh, memory={"mlp_tile_tokens": 512}, param_dtype=torch.bfloat16)

    The model's forward then takes the batches of `shard` (see `forward.py`). Forward, backward,
    step and evaluation may follow in any order (see `guard`). Parameter names do not change. Save
    the model with `save_pretrained` and `save_checkpoint` of this package. The model may be on the
    meta device. If it is not, its weights must be the same on all ranks, and each rank keeps its
    shard of them.

    Collective. UserError for a model or a core that would train wrongly.
    """
    options = (options or ParallelOptions()).changed(**keywords)
    if "memory" in keywords and options.memory.optimizer_offload:
        raise UserError(
            "memory.optimizer_offload = true: it is about the optimizer that train.py makes, and "
            "has no effect here. Leave it out."
        )
    options = options.resolved(model.dtype)
    check_family(model.config)
    check_not_quantized(model)
    check_dropout(model)
    check_group(mesh, parameter_offload=options.memory.parameter_offload)
    check_same_weights(model)
    checked = is_checked(model.config)
    text = model.config.get_text_config()
    if (types := layer_types(text)) or model._is_stateful:
        blocks = find_blocks(model)[1]
        check_layers(blocks, types, is_stateful=model._is_stateful, device_type=mesh.device.type)
        checked = checked and not has_untested_layers(blocks)
    if mesh.device.type == "cuda":
        warn_of_fragmentation()
    if isinstance(options.attention, str):
        where = {"device_type": mesh.device.type, "dtype": options.param_dtype}
        core, _ = select_core(options.attention, text, **where)
        options = options.changed(attention=core)
    folder, store = options.activation_checkpoint.offload_folder, None
    if options.store != "none":
        own = options.activation_checkpoint.offload != "none"
        setting = "activation_checkpoint.offload" if own else "memory.stream_offload"
        store = open_store(options.store, folder, mesh.device, setting=setting)
    if not checked:
        options = verified_options(model.config, mesh, options, store=store)
    return wrap(model, mesh, options, store=store, device_type=mesh.device.type)


def verified_options(
    config: PreTrainedConfig,
    mesh: Mesh,
    options: ParallelOptions,
    *,
    store: Store | None = None,
    prepare: Prepare | None = None,
) -> ParallelOptions:
    """Return the options with which an unchecked family of models trains exactly. Collective.

    `Verification` tries them on a tiny model of the family, to which `prepare` may add adapters.
    UserError if there are none.
    """
    # Verification runs in fp64 and is about the family's code, so unrelated options are left out.
    checkpoint = options.activation_checkpoint.model_copy(update={"keep_attention": "none"})
    tiles = options.memory.model_dump(include={"loss_tile_tokens", "mlp_tile_tokens"})
    memory = tiles | {"stream_chunk_tokens": -1}
    plain = ParallelOptions(activation_checkpoint=checkpoint, memory=memory).resolved(torch.float64)

    def shard(tiny: PreTrainedModel, core: Core, tiling: dict[str, Any]) -> None:
        options = plain.changed(attention=core, **tiling)
        wrap(tiny, mesh, options, store=store, device_type=mesh.device.type)

    tilings: Tilings = {"not tiled": {"memory": {"mlp_tile_tokens": -1}}}  # the best one first
    if _tiles_mlp(options):
        without_norms = {"tile_norms_with_mlp": False}
        tilings = {"tiled with its norms": {}, "tiled without its norms": without_norms} | tilings
    verification = Verification(config, mesh, shard, prepare)
    tiling = verification.tiling(tilings)
    options = options.changed(**tiling)
    if obstacle_to_streaming(config.get_text_config(), options, mesh.device.type):
        return options
    reason = verification.reason_against_streaming(tiling)
    if reason is None:
        return options
    if options.memory.stream_chunk_tokens > 0 or options.memory.stream_offload != "none":
        raise UserError(
            f'memory.stream_chunk_tokens: "{config.model_type}" does not train exactly chunk by '
            f'chunk: {reason.rstrip(".")}. Set it to "off", and memory.stream_offload to "none".'
        )
    return options.changed(
        memory={"stream_chunk_tokens": -1}, activation_checkpoint={"keep_attention": "none"}
    )


def open_sequence_store(
    offload: Literal["host", "disk"], folder: str | None, device: torch.device
) -> SequenceStore:
    """Return the store for the hidden states of a run on this device."""
    setting = "memory.stream_offload"
    return SequenceStore(open_store(offload, folder, device, setting=setting), device)


def wrap(
    model: PreTrainedModel,
    mesh: Mesh,
    options: ParallelOptions,
    *,
    store: Store | None,
    device_type: str | None = None,
    open_sequences: Callable[..., SequenceStore] = open_sequence_store,
) -> PreTrainedModel:
    """Apply all wrappers to a model that has passed the checks of `parallelize`, in their order.

    options must have a core and concrete dtypes. store keeps inputs of checkpoints off the device;
    None leaves them there. The planner has its own device_type and open_sequences.
    """
    assert callable(options.attention)
    device_type = device_type or mesh.device.type
    decoder, blocks = find_blocks(model)
    stacks = [(decoder, blocks), *_prediction_stack(model)]
    config = model.config.get_text_config()
    check_layers(blocks, layer_types(config), is_stateful=model._is_stateful)
    streams = obstacle_to_streaming(config, options, device_type) is None
    where = (model, mesh, options, device_type, open_sequences)
    sequences = _open_sequences(*where) if streams else ON_DEVICE
    shard = partial(_shard, mesh, options)
    # All that is changed, in its order: forwards of this instance's modules, and classes of some.
    use_attention(model, decoder)  # a config of its own, which names Ulysses attention
    use_linear_attention(blocks)  # the forward of layers that carry a state
    indexers = use_indexers(model, blocks, options.indexer)  # that of indexers; a hook on layers
    ropes = use_document_lengths(model, blocks)  # that of rotary embeddings that read the length
    router_loss = router_loss_of(model, decoder)  # hooks on routers
    use_low_rank_products(model)  # the forward of experts' adapters
    for owner, own in stacks:  # the forward of MLPs and norms, and of blocks
        _divide(model, owner, own, options, device_type, sequences if streams else None, store)
    body = encoder_of(model) if has_vision(model.config) else decoder
    use_loss_head(model, body, options, device_type)  # lm_head, by a module of the same weight
    if isinstance(sequences, SequenceStore):  # that of embedding, rotary embeddings, final norms
        offload_sequences(model, decoder, sequences)
        store = None  # the inputs of segments are off the device already
    vision = Vision(model) if body is not decoder else None
    shard_towers(model, shard, options)
    shard_blocks(model, blocks, shard)
    for owner, own in stacks[1:]:
        shard(*own)
        shard(owner)
    if every := options.checkpoint_every:  # the class of blocks
        extra = extra_block_outputs(config)
        how = {"every": every, "store": store, "extra_outputs": extra, "device": mesh.device}
        for _, own in stacks:
            checkpoint_blocks(own, **how)
    shard_root(model, shard)
    chunk_tokens = _chunk_tokens(options, mesh.sp.size(), device_type) if streams else -1
    model.sharding = Sharding(
        body, mesh, options.attention, router_loss, ropes, chunk_tokens, indexers, vision
    )
    model.forward = partial(model.sharding.forward, model)
    guard(model)  # a hook, and a forward around that one
    vars(model).update({name: partial(_refuse, reason) for name, reason in _REFUSED.items()})
    return model


def _prediction_stack(model: PreTrainedModel) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Return the prediction layer and the block in it, if there is one."""
    layer = layer_of(model)
    return [] if layer is None else [(layer, nn.ModuleList([layer.mtp_block]))]


def _divide(
    model: PreTrainedModel,
    owner: nn.Module,
    blocks: nn.ModuleList,
    options: ParallelOptions,
    device_type: str,
    sequences: Sequences | None,
    store: Store | None,
) -> None:
    """Let blocks, and the norms beside them in owner, compute by tiles and chunks, as options say.

    sequences: where those of streamed blocks are; None: they do not stream.
    """
    if _tiles_mlp(options):
        tile = options.memory.mlp_tile_tokens or automatic_mlp_tile(
            model.config.get_text_config(), options.param_dtype, device_type
        )
        tile_blocks(model, owner, blocks, tile, norms_with_mlp=options.tile_norms_with_mlp)
    if options.compile.enable:  # the same, or what a tile computes
        compile_blocks(blocks)
    if sequences is not None:
        kept = options.activation_checkpoint.keep_attention
        stream_blocks(blocks, sequences, keep_attention=kept, store=store)


def _open_sequences(
    model: PreTrainedModel,
    mesh: Mesh,
    options: ParallelOptions,
    device_type: str,
    open_sequences: Callable[..., SequenceStore],
) -> Sequences:
    """Return where the hidden states are, as options ask. UserError if the model cannot."""
    offload, folder = options.memory.stream_offload, options.activation_checkpoint.offload_folder
    if offload == "none":
        return ON_DEVICE
    check_stream_offload(model, offload, device_type)
    sequences = open_sequences(offload, folder, mesh.device)
    sequences.host_reads = computes_with_embeddings(model.config.get_text_config())
    return sequences


def _chunk_tokens(options: ParallelOptions, degree: int, device_type: str) -> int:
    """Return the setting of the tokens of a chunk; 0: as `chunk_length` chooses.

    With `stream_offload` on a GPU, copies of keys hide behind the attention of a chunk only if it
    has enough queries.
    """
    chosen = options.memory.stream_chunk_tokens
    if chosen == 0 and options.memory.stream_offload != "none" and device_type == "cuda":
        return max(AUTOMATIC_CHUNK_TOKENS * degree, _OFFLOADED_CHUNK_TOKENS)
    return chosen


def _tiles_mlp(options: ParallelOptions) -> bool:
    """Return whether MLPs and norms work in tiles.

    By default not without checkpoints: tiles would add a recomputation, which costs time.
    """
    tokens = options.memory.mlp_tile_tokens
    return tokens > 0 or (tokens == 0 and options.checkpoint_every > 0)


def automatic_mlp_tile(config: PreTrainedConfig, dtype: torch.dtype, device_type: str) -> int:
    """Return the tokens of a tile of the model's MLPs that compute in dtype."""
    if device_type == "cpu":
        return max(_SMALLEST_TILE, config.hidden_size)

    def value(*names: str) -> int:
        found = (getattr(config, name, None) for name in names)
        return next((number for number in found if isinstance(number, int)), 0)

    dense = value("intermediate_size", "ffn_dim", "n_inner") or 4 * config.hidden_size
    experts = value("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")
    # How many numbers a token has between the two products: in a mixture of experts, those of all
    # experts that the token goes to.
    width = max(dense, experts * (value("moe_intermediate_size") or dense))
    tokens = _CUDA_TILE_BYTES // (_INSIDE * width * dtype.itemsize)
    return max(1, tokens // _CUDA_ROWS) * _CUDA_ROWS


def check_stream_offload(model: PreTrainedModel, offload: str, device_type: str) -> None:
    """Raise UserError if the decoder does more with hidden states than to call its parts."""
    why = None
    if classifies(model):
        why = "the scores of a classifier need the hidden states on the device"
    elif has_vision(model.config) and device_type != "cpu":
        why = (
            "a model of images and text writes features into hidden states between its layers, and "
            "on a GPU would not wait until those are in host memory"
        )
    elif getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        why = (
            "this model's layers take inputs besides the hidden states, which its decoder computes "
            "from the whole sequence"
        )
    elif not _needs_no_weight_in_backward(model.get_input_embeddings()):
        why = "the embedding of this model is not a look-up"
    if why:
        raise UserError(f'memory.stream_offload = "{offload}": {why}. Set it to "none".')


def offload_sequences(model: PreTrainedModel, decoder: nn.Module, sequences: SequenceStore) -> None:
    """Let all parts of the model around the blocks read and write hidden states off the device."""
    parts = list(decoder.children())
    rotaries = [x for x in parts if "rotary" in type(x).__name__.lower()]
    offload_embeddings(model.get_input_embeddings(), rotaries, sequences)
    for norm in norms_of(decoder):
        if not isinstance(norm.forward, Tiled):
            tile_norm(norm, tile_tokens=_SMALLEST_TILE)
        norm.forward.sequences = sequences
    model.get_output_embeddings().sequences = sequences


def _shard(mesh: Mesh, options: ParallelOptions, *modules: nn.Module, **how: Any) -> None:
    """Make modules one FSDP group, whose parameters are gathered together."""
    use_one_dtype(*modules)
    offload = OffloadPolicy()
    if options.memory.parameter_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device.type != "cpu")
    # Inputs are not cast, because a recomputation would not cast its inputs. Activations get their
    # dtype from the parameters.
    precision = MixedPrecisionPolicy(
        options.param_dtype, options.reduce_dtype, cast_forward_inputs=False
    )
    fully_shard(list(modules), mesh=mesh.fsdp, mp_policy=precision, offload_policy=offload, **how)


def _refuse(reason: str, *_, **__) -> NoReturn:
    raise UserError(reason)


def use_loss_head(
    model: PreTrainedModel, decoder: nn.Module, options: ParallelOptions, device_type: str
) -> None:
    """Replace `lm_head` by a LossHead that scales and caps logits as the model family does, and the
    layer of a classifier by one that does neither.
    """
    if classifies(model):
        model.score = LossHead(model.score, device_type=device_type)
        return
    shape, linear = head_of(model, decoder), model.get_output_embeddings()
    model.set_output_embeddings(
        LossHead(
            linear,
            tile_tokens=options.memory.loss_tile_tokens,
            scale=shape.scale,
            softcap=shape.softcap,
            z_loss=options.z_loss,
            label_smoothing=options.label_smoothing,
            device_type=device_type,
        )
    )


def shard_blocks(model: PreTrainedModel, blocks: nn.ModuleList, shard: Callable[..., Any]) -> None:
    """Apply FSDP2 to each block, the embedding and the head.

    Parameters are sharded over dp_shard x sp and replicated over dp_replicate.
    """
    for block in blocks:
        shard(block)
    embedding, head = model.get_input_embeddings(), output_layer(model)
    # Tied, they form one group, which stays gathered from the embedding to the head: FSDP refuses a
    # parameter that belongs to two groups.
    for group in [[embedding, head]] if embedding.weight is head.weight else [[embedding], [head]]:
        shard(*group)
        group[0].set_unshard_in_backward(not all(map(_needs_no_weight_in_backward, group)))


def _cast_inputs(
    dtype: torch.dtype, _: nn.Module, inputs: tuple, keywords: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Return the inputs of a module, the floating-point ones in dtype."""
    return tree_map_only(
        torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (inputs, keywords)
    )


def shard_towers(
    model: PreTrainedModel, shard: Callable[..., Any], options: ParallelOptions
) -> None:
    """Apply FSDP2 to the blocks of the towers of a vision-language model.

    With activation checkpoints they are computed again in backward, as transformers does it.
    """
    dtype, checkpoint = options.param_dtype, options.checkpoint_every > 0
    for tower in towers(model) if has_vision(model.config) else ():
        for block in tower_blocks(tower):
            shard(block)
        # Not the tower itself, by the name of whose class transformers finds its hidden states:
        # what is outside of its blocks is in the group of the root. The family's own code may
        # cast pixels to the dtype of stored parameters.
        cast = partial(_cast_inputs, dtype)
        tower.register_forward_pre_hook(cast, with_kwargs=True)
        for module in tower.modules():
            if checkpoint and isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(checkpointed, use_reentrant=False)


def _needs_no_weight_in_backward(module: nn.Module) -> bool:
    """Return whether the backward of module does not need its weight.

    A loss head computes its gradients in forward, and the gradient of an embedding look-up is a sum
    of rows.
    """
    kind = type(module)
    is_look_up = kind.forward is nn.Embedding.forward
    is_look_up = is_look_up or kind.__name__.endswith("ScaledWordEmbedding")
    return isinstance(module, LossHead) or is_look_up


def shard_root(model: PreTrainedModel, shard: Callable[..., Any]) -> None:
    """Apply FSDP2 to the remaining parameters, and make FSDP sum gradients instead of averaging."""
    # By default FSDP keeps the root gathered after forward. If no backward followed, the model
    # would then show gathered parameters without gradients, and compute with their outdated values
    # after the next step.
    shard(model, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Factor 1, because the loss is already divided by the labels of the step. A plain SUM,
            # because gloo has no PREMUL_SUM.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
