"""Megatron-style tensor and sequence parallelism of a llama (arXiv 1909.08053, 2205.05198), made of
torch's own parts, for comparison with Ulysses.

Products are `ColwiseParallel` and `RowwiseParallel`, norms `SequenceParallel`, and the loss is
`loss_parallel`: all of `torch.distributed.tensor.parallel`. FSDP2 over one data-parallel rank keeps
fp32 weights and casts them.

Everything else is what this project's own run has: model, core attention, activation checkpoints,
batches, `train_step` and optimizer. So both are trained, counted and planned by the same code.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX, Documents
from titan_ulysses.memory.checkpointing import checkpoint_blocks
from titan_ulysses.memory.offload import Store
from titan_ulysses.setup.blocks import find_blocks
from titan_ulysses.setup.options import ParallelOptions
from titan_ulysses.ulysses.attention import ATTENTION_NAME, Ulysses
from titan_ulysses.ulysses.cores import Core


def tensor_parallelize(
    model: PreTrainedModel,
    mesh: Mesh,
    options: ParallelOptions | None = None,
    *,
    store: Store | None = None,
    **keywords: Any,
) -> PreTrainedModel:
    """Cut an untied llama over all ranks of mesh.sp in place, as `parallelize` wraps one.

    The model takes the same batches. Run its steps in `loss_parallel()`. Of options, or of keywords
    that override them, it has the core attention (a function), `memory.loss_tile_tokens` (below 1:
    all at once; else each tile is a checkpoint), `activation_checkpoint`, `param_dtype` and
    `reduce_dtype`. store keeps inputs of checkpoints off the device. Other arguments, which the
    planner gives `wrap`, have no meaning here. UserError for a model or a mesh that cannot be cut.
    """
    known = {key: keywords[key] for key in ParallelOptions.model_fields if key in keywords}
    options = (options or ParallelOptions()).changed(**known).resolved(model.dtype)
    _check(model, mesh)
    decoder, blocks = find_blocks(model)
    model.config._attn_implementation = ATTENTION_NAME
    parallelize_module(model, mesh.sp, _plan(), src_data_rank=None)
    policy = MixedPrecisionPolicy(
        options.param_dtype, options.reduce_dtype, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh.world["dp_shard"], mp_policy=policy)
    if options.checkpoint_every:
        checkpoint_blocks(blocks, every=options.checkpoint_every, store=store)
    fully_shard(model, mesh=mesh.world["dp_shard"], mp_policy=policy)
    own = {"decoder": decoder, "mesh": mesh, "core": options.attention}
    model.forward = MethodType(
        partial(_forward, **own, tile=options.memory.loss_tile_tokens), model
    )
    model.stream_chunk_tokens = -1
    return model


def _check(model: PreTrainedModel, mesh: Mesh) -> None:
    config, degree = model.config, mesh.sp.size()
    if config.model_type != "llama" or config.tie_word_embeddings:
        raise UserError(f'megatron: the plan is that of an untied llama, not "{config.model_type}"')
    if mesh.batch.size() > 1:
        raise UserError(f"megatron: {mesh.batch.size()} data-parallel ranks: give all to mesh.sp")
    if config.num_key_value_heads % degree:
        raise UserError(
            f"megatron: {degree} ranks do not divide {config.num_key_value_heads} KV heads"
        )


def _plan() -> dict[str, Any]:
    """Return torch's plan of a llama: hidden states [B, S, h] are `Shard(1)` between blocks."""
    rows, whole = Shard(1), Replicate()
    block = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": rows},
            desired_input_kwarg_layouts={"hidden_states": whole},
        ),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(output_layouts=rows),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=rows, desired_input_layouts=whole),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=rows),
    }
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=rows),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(
            input_layouts=whole, output_layouts=Shard(-1), use_local_output=False
        ),
        **{f"model.layers.*.{name}": style for name, style in block.items()},
    }


def _forward(
    model: PreTrainedModel,
    *,
    decoder: nn.Module,
    mesh: Mesh,
    core: Core,
    tile: int,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor,
    documents: Documents,
    num_items_in_batch: Tensor,
    **_: None,
) -> CausalLMOutputWithPast:
    """Return the loss of a batch [B, T] of this rank's tokens, summed over all ranks.

    Each rank needs the ids of all tokens: they are gathered once.
    """
    mine = torch.stack([input_ids, labels, position_ids])
    every = [torch.empty_like(mine) for _ in range(mesh.sp.size())]
    dist.all_gather(every, mine, group=mesh.sp.get_group())
    ids, labels, positions = torch.cat(every, dim=2)
    # Heads are cut, the sequence is not: attention runs as on a mesh of one rank.
    here = Ulysses(mesh.world["dp_shard"], core, documents, positions)
    hidden = decoder(
        input_ids=ids, position_ids=positions, use_cache=False, ulysses=here
    ).last_hidden_state
    hidden = hidden.redistribute(placements=[Replicate()])
    if tile < 1:
        loss = _tile_loss(model.lm_head, hidden, labels)
    else:
        loss = sum(
            checkpoint(_tile_loss, model.lm_head, *part, use_reentrant=False)
            for part in zip(hidden.split(tile, dim=1), labels.split(tile, dim=1), strict=True)
        )
    loss = loss.to_local() / num_items_in_batch.clamp(min=1)
    model.own_loss = loss.detach().double()
    return CausalLMOutputWithPast(loss=loss)


def _tile_loss(head: nn.Module, hidden: DTensor, labels: Tensor) -> DTensor:
    """Return the sum of cross-entropies of labels [B, t]. Logits are cut along the vocabulary."""
    logits = head(hidden).flatten(0, 1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
