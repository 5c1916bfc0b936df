"""Turn a transformers causal LM into one that trains sharded: the ordered application of all wrappers, a line each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from titan_ulysses.data.packing import IGNORE_INDEX
from titan_ulysses.errors import UserError
from titan_ulysses.failure import first_failure
from titan_ulysses.memory.checkpointing import checkpoint_blocks
from titan_ulysses.memory.loss import LossHead
from titan_ulysses.memory.offload import Offload, Store, open_store
from titan_ulysses.memory.tiling import Tiled, tile_mlp, tile_norm
from titan_ulysses.mesh import Mesh
from titan_ulysses.model.families import CHECKED_FAMILIES, attention_needs, check_family, head_of, mlp_layout
from titan_ulysses.model.freezing import bits
from titan_ulysses.model.proof import prove
from titan_ulysses.model.rope import use_document_lengths
from titan_ulysses.model.router import RouterLoss, router_loss_of
from titan_ulysses.ulysses.attention import ATTENTION_NAME, Ulysses
from titan_ulysses.ulysses.cores import Core, Documents, choose_core

_SMALLEST_TILE = 1024
"""Tokens. Otherwise as many as the model is wide, as in ALST: a tile's input is then no larger than a weight."""


def parallelize(
    model: PreTrainedModel,
    mesh: Mesh,
    *,
    attention: str | Core = "auto",
    loss_tile_tokens: int = 0,
    mlp_tile_tokens: int = 0,
    checkpoint_every: int = 1,
    offload: Offload = "none",
    offload_folder: str | None = None,
    parameter_offload: bool = False,
    compile: bool = False,
    z_loss: float = 0.0,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Wrap model, on meta or not, in place: Ulysses attention, tiling, loss head, activation checkpointing, FSDP2.

    Its forward then takes the batches of `shard` (see `_forward`). A model that is not on meta must be the same on all
    ranks; each keeps its shard of it. Parameters are stored in the dtype they have, computed with in param_dtype (by
    default the model's own) and their gradients summed in reduce_dtype (by default fp32, or wider as param_dtype is).
    attention is a core, or the name of one (see `choose_core`). Tiles are numbers of tokens: 0 chooses (see `LossHead`
    and `wrap`), -1 takes all at once. Of every checkpoint_every blocks (0: no checkpoints) only the input is kept for
    backward: on the device, or as offload says in host memory, or on disk in offload_folder. parameter_offload keeps
    shards and gradients in host memory, where the optimizer then steps. compile: the MLP and the norms of each block.
    z_loss: see `LossHead`. Collective. UserError for a model or a core that would train wrongly.
    """
    param_dtype = param_dtype or model.dtype
    reduce_dtype = reduce_dtype or torch.promote_types(param_dtype, torch.float32)
    check_family(model.config)
    check_dropout(model)
    check_same_weights(model)
    if isinstance(attention, str):
        needs, device_type = attention_needs(model.config), mesh.device.type
        attention, _ = choose_core(attention, needs, device_type=device_type, dtype=param_dtype)
    policy = precision(param_dtype, reduce_dtype)
    options = {
        "loss_tile_tokens": loss_tile_tokens,
        "mlp_tile_tokens": mlp_tile_tokens,
        "checkpoint_every": checkpoint_every,
        "store": open_store(offload, offload_folder, mesh.device),
        "compile": compile,
        "z_loss": z_loss,
    }
    if model.config.model_type not in CHECKED_FAMILIES:
        plain = options | {"compile": False, "z_loss": 0.0}  # the proof is about the family
        prove(model.config, mesh, lambda tiny, core: wrap(tiny, mesh, core, MixedPrecisionPolicy(), **plain))
    kept = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if parameter_offload else OffloadPolicy()
    return wrap(model, mesh, attention, policy, kept, **options)


def precision(param_dtype: torch.dtype, reduce_dtype: torch.dtype) -> MixedPrecisionPolicy:
    """FSDP's policy for the dtypes that are computed with, and in which gradients are summed."""
    # Nothing is cast: activations have the dtype that parameters give them, also where a checkpoint computes again.
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)


def wrap(
    model: PreTrainedModel,
    mesh: Mesh,
    core: Core,
    mp_policy: MixedPrecisionPolicy,
    offload_policy: OffloadPolicy | None = None,
    *,
    loss_tile_tokens: int,
    mlp_tile_tokens: int,
    checkpoint_every: int,
    store: Store | None,
    compile: bool,
    z_loss: float,
) -> PreTrainedModel:
    """What `parallelize` does to a model once nothing speaks against it."""
    decoder, blocks = find_blocks(model)
    use_ulysses(model, decoder, blocks, mesh, core)
    if mlp_tile_tokens == 0 and not checkpoint_every:
        mlp_tile_tokens = -1  # without checkpoints the tiles would be the only recomputation, and cost time
    if mlp_tile_tokens != -1:
        tile_blocks(model, decoder, blocks, mlp_tile_tokens or max(_SMALLEST_TILE, model.config.hidden_size))
    if compile:
        compile_blocks(blocks)
    use_loss_head(model, loss_tile_tokens, z_loss)
    policies = {"mp_policy": mp_policy, "offload_policy": offload_policy or OffloadPolicy()}
    shard = partial(fully_shard, mesh=mesh.fsdp, **policies)
    shard_blocks(model, blocks, shard)
    if checkpoint_every:
        checkpoint_blocks(blocks, every=checkpoint_every, store=store)
    shard_root(model, shard)
    return model


def check_dropout(model: PreTrainedModel) -> None:
    """UserError where attention drops weights: it would draw other ones on every mesh."""
    for name, module in model.named_modules():
        rate = getattr(module, "attention_dropout", 0.0)
        if isinstance(rate, float | int) and rate:  # in some families it is a module
            raise UserError(
                f"model: attention_dropout = {rate} in {name}: dropped attention weights would depend on the mesh, and "
                "no core has them. Set attention_dropout = 0.0 in the model's config (from_pretrained takes it too)."
            )


def check_same_weights(model: PreTrainedModel) -> None:
    """Collective. UserError, on every rank, where the ranks hold different weights: each keeps a piece of its own."""
    tensors = {name: x for name, x in (*model.named_parameters(), *model.named_buffers()) if not x.is_meta}
    if not tensors:
        return
    with torch.no_grad():
        sums = torch.stack([bits(x).sum(dtype=torch.int64).cpu() for x in tensors.values()])
    first = [sums.tolist()]
    dist.broadcast_object_list(first, src=0)
    differing = (name for name, mine, theirs in zip(tensors, sums.tolist(), first[0], strict=True) if mine != theirs)
    name = next(differing, None)
    if reason := first_failure(name and f"{name} on rank {dist.get_rank()} is not what rank 0 has"):
        raise UserError(
            f"model: the ranks hold different weights: {reason}. Load the same checkpoint on every rank, or set the "
            "same seed before a random initialisation."
        )


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder and its list of layers, found by the classes that transformers itself says not to split."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) and type(child[0]).__name__ in model._no_split_modules:
                return module, child
    raise UserError(f"model: {type(model).__name__} has no list of decoder layers that could be sharded.")


def use_ulysses(model: PreTrainedModel, decoder: nn.Module, blocks: nn.ModuleList, mesh: Mesh, core: Core) -> None:
    """Let the model's attention layers call Ulysses, and its forward tell them the mesh, the core and the documents."""
    shared, own = model.config, copy.deepcopy(model.config)  # another model may have been made from the same config
    own._attn_implementation = ATTENTION_NAME
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    model.ulysses_mesh = mesh
    router_loss, ropes = router_loss_of(model, decoder), use_document_lengths(model, blocks)

    def forward(model: PreTrainedModel, *, documents: Documents, **inputs) -> CausalLMOutputWithPast:
        mesh = model.ulysses_mesh
        for rope in ropes:
            rope.begin(documents, mesh.sp.get_local_rank())
        ulysses = Ulysses(mesh.sp, core, documents, inputs["position_ids"])
        return _forward(model, decoder, mesh.loss.get_group(), router_loss, ulysses=ulysses, **inputs)

    model.forward = MethodType(forward, model)


def _forward(
    model: PreTrainedModel,
    decoder: nn.Module,
    group: dist.ProcessGroup,
    router_loss: RouterLoss | None,
    *,
    ulysses: Ulysses,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | None = None,
    reduction: Literal["sum", "none"] = "sum",
) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
    """The forward of a causal LM, with the loss computed inside the head from hidden states.

    input_ids, position_ids and labels (shifted already) are this rank's [B, T]; num_items_in_batch counts the valid
    labels of the whole step. `.loss` is then that of all ranks of group, on each of them, while its gradient is of
    this rank's part: gradients are summed over the mesh. With reduction = "none": the cross-entropy of each label, of
    this rank [B, T]. Without labels: `.logits` of this rank's tokens.

    Where the model has a router loss (see model/router.py), `.aux_loss` is it and `.loss` includes it; attention_mask
    [B, T], 0 at padding, tells it what not to count and means nothing else.
    """
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, "ulysses": ulysses}
    sums = labels is not None and reduction == "sum"
    if router_loss is None:
        hidden = decoder(**inputs).last_hidden_state
    else:
        with router_loss.forward_pass(count=sums, mask=attention_mask) as routers:
            hidden = decoder(**inputs, output_router_logits=False).last_hidden_state  # they are kept nowhere
        if sums:
            hidden, aux_loss, num_labels = routers.close(hidden, (labels != IGNORE_INDEX).sum(), group)
    head = model.get_output_embeddings()
    if labels is None:
        return CausalLMOutputWithPast(logits=head(hidden))
    loss = head(hidden, labels, num_items_in_batch, reduction=reduction)
    if not sums:
        return CausalLMOutputWithPast(loss=loss)
    loss = _SumOverRanks.apply(loss, group)
    if router_loss is None:
        return CausalLMOutputWithPast(loss=loss)
    share = num_labels.to(aux_loss.dtype) / num_items_in_batch.clamp(min=1)
    return MoeCausalLMOutputWithPast(loss=loss + router_loss.coefficient * share * aux_loss, aux_loss=aux_loss)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a scalar over the ranks, whose gradient is this rank's part: FSDP sums the gradients of the parts."""

    @staticmethod
    def forward(ctx, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.to(torch.float64, copy=True)  # so that the number of parts does not show in fp32
        dist.all_reduce(total, group=group)
        return total.to(part.dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


def tile_blocks(model: PreTrainedModel, decoder: nn.Module, blocks: nn.ModuleList, tile_tokens: int) -> None:
    """Tile what works on each token by itself: the MLP of each block with the norms around it, and all other norms."""
    for block in blocks:
        layout = mlp_layout(block)
        if layout is None:
            parts = ", ".join(dict(block.named_children()))
            warnings.warn(
                f'model: "{model.config.model_type}": no MLP was found in {type(block).__name__} (which has {parts}). '
                "It is not tiled, and takes memory for all tokens at once.",
                stacklevel=2,
            )
        else:
            tile_mlp(layout.mlp, layout.before, layout.after, tile_tokens=tile_tokens)
        taken = () if layout is None else (layout.before, layout.after)
        for norm in _norms(block):
            if norm not in taken:
                tile_norm(norm, tile_tokens=tile_tokens)
    for norm in _norms(decoder):
        tile_norm(norm, tile_tokens=tile_tokens)


def _norms(module: nn.Module) -> Iterator[nn.Module]:
    """Its own norms over the hidden state."""
    return (child for child in module.children() if "norm" in type(child).__name__.lower())


def compile_blocks(blocks: nn.ModuleList) -> int:
    """Compile what each block does to tokens by themselves, each part as one graph; returns the number of parts.

    That is its MLP and its norms, tiled or not; what counts for a router loss breaks its graph in two. Attention stays
    as it is: what it sees of the documents changes from step to step, and each change would compile it anew.
    """
    parts = []
    for block in blocks:
        layout = mlp_layout(block)
        modules = [*_norms(block), *([layout.mlp] if layout else [])]
        tiled = [module.forward.fn for module in modules if isinstance(module.forward, Tiled)]
        parts += tiled or modules
    for part in parts:
        # Not `part.compile()`: where the class is one of torch's own, as nn.LayerNorm, Dynamo skips all that it calls.
        whole = not any(module._forward_hooks for module in part.modules())
        part.forward = torch.compile(part.forward, fullgraph=whole)
    return len(parts)


def use_loss_head(model: PreTrainedModel, tile_tokens: int, z_loss: float) -> None:
    """Let `lm_head` compute the loss, with what the family does to its logits."""
    shape, linear = head_of(model.config), model.get_output_embeddings()
    shaping = {"scale": shape.scale, "softcap": shape.softcap, "z_loss": z_loss}
    model.set_output_embeddings(LossHead(linear, tile_tokens=tile_tokens, **shaping))


def shard_blocks(model: PreTrainedModel, blocks: nn.ModuleList, shard: Callable[..., Any]) -> None:
    """FSDP2 over dp_shard x sp, replicated over dp_replicate, of each block, the embedding and the head."""
    for block in blocks:
        shard(block)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is not head.weight:
        shard(embedding)
        # Its backward follows its forward at once: resharding between the two would gather twice.
        shard(head, reshard_after_forward=False)


def shard_root(model: PreTrainedModel, shard: Callable[..., Any]) -> None:
    """FSDP2 of what is left; and gradients are summed over the mesh, never averaged."""
    # Tied embedding and head stay in the root's group: FSDP refuses a parameter that two groups hold.
    shard(model, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Factor 1 and a plain SUM: the loss is divided by the step's tokens already, and gloo has no PREMUL_SUM.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.register_forward_hook(_reshard_without_backward)


def _reshard_without_backward(model: PreTrainedModel, *_) -> None:
    """What stays gathered for a backward that never comes would be the old weights after the next optimizer step."""
    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
