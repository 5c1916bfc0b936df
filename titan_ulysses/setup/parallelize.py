"""Turn a transformers causal LM into one that trains sharded: the ordered application of all
wrappers, a line each.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial, reduce
from inspect import signature
from types import MethodType
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.failure import first_failure
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX, Documents
from titan_ulysses.memory.checkpointing import checkpoint_blocks
from titan_ulysses.memory.loss import LossHead
from titan_ulysses.memory.offload import Store, open_store
from titan_ulysses.memory.tiling import Tiled, tile_mlp, tile_norm
from titan_ulysses.model.families import (
    CHECKED_FAMILIES,
    MLPLayout,
    check_family,
    head_of,
    mlp_layout,
)
from titan_ulysses.model.freezing import bits
from titan_ulysses.model.rope import use_document_lengths
from titan_ulysses.model.router import RouterLoss, router_loss_of
from titan_ulysses.model.verification import Tilings, verify_family
from titan_ulysses.setup.guard import guard
from titan_ulysses.setup.options import ParallelOptions, select_core
from titan_ulysses.ulysses.attention import ATTENTION_NAME, Ulysses
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

    The model's forward then takes the batches of `shard` (see `_forward`), in any order with
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


def check_dropout(model: PreTrainedModel) -> None:
    """UserError for dropout of attention weights and of layers, by the many names that families
    have for them.
    """
    remedy = "in the model's config (from_pretrained takes it too)."
    nested = [value for value in vars(model.config).values() if isinstance(value, PreTrainedConfig)]
    holders = [("", vars(config)) for config in (model.config, *nested)]
    holders += [(f" in {name}", vars(module)) for name, module in model.named_modules()]
    for place, settings in holders:
        for key, rate in settings.items():
            if "drop" not in key or not isinstance(rate, float | int) or not rate:
                continue  # in some families it is a module
            if "att" in key:
                raise UserError(
                    f"model: {key} = {rate}{place}: dropped attention weights would depend on the "
                    f"mesh, and no core has them. Set {key} = 0.0 {remedy}"
                )
            if key in ("layerdrop", "decoder_layerdrop"):
                raise UserError(
                    f"model: {key} = {rate}{place}: each rank would skip other layers, and wait "
                    f"for ever for those that do not skip them. Set {key} = 0.0 {remedy}"
                )


def check_same_weights(model: PreTrainedModel) -> None:
    """Collective. UserError, on every rank, where the ranks hold different weights: each keeps a
    piece of its own.
    """
    tensors = {
        name: x for name, x in (*model.named_parameters(), *model.named_buffers()) if not x.is_meta
    }
    if not tensors:
        return
    with torch.no_grad():
        sums = torch.stack([bits(x).sum(dtype=torch.int64).cpu() for x in tensors.values()])
    first = [sums.tolist()]
    dist.broadcast_object_list(first, src=0)
    differing = (
        name
        for name, mine, theirs in zip(tensors, sums.tolist(), first[0], strict=True)
        if mine != theirs
    )
    name = next(differing, None)
    if reason := first_failure(name and f"{name} on rank {dist.get_rank()} is not what rank 0 has"):
        raise UserError(
            f"model: the ranks hold different weights: {reason}. Load the same checkpoint on every "
            "rank, or set the same seed before a random initialisation."
        )


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder and its list of layers, found by the classes that transformers itself says not to
    split.

    They may be sharded already, and in checkpoints: their classes then descend from those.
    """
    name, classes = type(model).__name__, {*(model._no_split_modules or ())}
    for module in model.modules():
        for child in module.children():
            if not isinstance(child, nn.ModuleList) or not len(child):
                continue
            if not classes & {kind.__name__ for kind in type(child[0]).__mro__}:
                continue
            if "input_ids" not in signature(module.forward).parameters:
                raise UserError(
                    f"model: {name} keeps its layers in a {type(module).__name__}, which takes no "
                    "token ids: this version trains models whose decoder goes from token ids to "
                    "hidden states."
                )
            return module, child
    raise UserError(f"model: {name} has no list of decoder layers that could be sharded.")


def use_ulysses(
    model: PreTrainedModel, decoder: nn.Module, blocks: nn.ModuleList, mesh: Mesh, core: Core
) -> None:
    """Let the model's attention layers call Ulysses, and its forward tell them the mesh, the core
    and the documents.
    """
    # Another model may have been made from the same config.
    shared = model.config
    own = copy.deepcopy(model.config)
    own._attn_implementation = ATTENTION_NAME
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    model.ulysses_mesh = mesh
    router_loss, ropes = router_loss_of(model, decoder), use_document_lengths(model, blocks)

    def forward(
        model: PreTrainedModel,
        *others: Any,
        documents: Documents | None = None,
        reaches: Documents | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        if others or documents is None:
            raise UserError(
                "model: the sharded model takes the batches of `titan_ulysses.shard(loader, "
                "mesh)`, as in model(**batch): each rank needs its slice of a sequence, and the "
                "documents of the whole."
            )
        mesh = model.ulysses_mesh
        for rope in ropes:
            rope.begin(documents, reaches or documents, mesh.sp.get_local_rank())
        ulysses = Ulysses(mesh.sp, core, documents, inputs["position_ids"])
        return _forward(
            model, decoder, mesh.loss.get_group(), router_loss, ulysses=ulysses, **inputs
        )

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

    input_ids, position_ids and labels (shifted already) are this rank's [B, T]; num_items_in_batch
    counts the valid labels of the whole step. `.loss` is then that of all ranks of group, on each
    of them, while its gradient is of this rank's part: gradients are summed over the mesh. With
    reduction = "none": the cross-entropy of each label, of this rank [B, T]. Without labels:
    `.logits` of this rank's tokens.

    Where the model has a router loss (see model/router.py), `.aux_loss` is it and `.loss` includes
    it; attention_mask [B, T], 0 at padding, tells it what not to count and means nothing else.
    """
    inputs = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "use_cache": False,
        "ulysses": ulysses,
    }
    sums = labels is not None and reduction == "sum"
    if router_loss is None:
        hidden = decoder(**inputs).last_hidden_state
    else:
        with router_loss.forward_pass(count=sums, mask=attention_mask) as routers:
            # They are kept nowhere.
            hidden = decoder(**inputs, output_router_logits=False).last_hidden_state
        if sums:
            hidden, aux_loss, num_labels = routers.reduce(
                hidden, (labels != IGNORE_INDEX).sum(), group
            )
    head = model.get_output_embeddings()
    if labels is None:
        if torch.is_grad_enabled():
            head.set_unshard_in_backward(True)  # these have a gradient that needs the weight
        return CausalLMOutputWithPast(logits=head(hidden))
    loss = head(hidden, labels, num_items_in_batch, reduction=reduction)
    if not sums:
        return CausalLMOutputWithPast(loss=loss)
    loss = _SumOverRanks.apply(loss, torch.promote_types(hidden.dtype, torch.float32), group)
    if router_loss is None:
        return CausalLMOutputWithPast(loss=loss)
    share = num_labels.to(aux_loss.dtype) / num_items_in_batch.clamp(min=1)
    return MoeCausalLMOutputWithPast(
        loss=loss + router_loss.coefficient * share * aux_loss, aux_loss=aux_loss
    )


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks of a scalar in fp64, as dtype.

    Its gradient is that of this rank's part: FSDP sums the gradients of the parts.
    """

    @staticmethod
    def forward(ctx, part: Tensor, dtype: torch.dtype, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total.to(dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream.to(torch.float64), None, None


def tile_blocks(
    model: PreTrainedModel,
    decoder: nn.Module,
    blocks: nn.ModuleList,
    tile_tokens: int,
    *,
    norms_with_mlp: bool = True,
) -> None:
    """Tile what works on each token by itself: the MLP of each block with the norms around it, and
    all other norms.

    norms_with_mlp = False: for a family whose blocks are not built as `mlp_layout` reads them. The
    MLP is tiled by itself, and computed when its block is computed again.
    """
    for block in blocks:
        layout = mlp_layout(block)
        if layout is None:
            parts = ", ".join(dict(block.named_children()))
            warnings.warn(
                f'model: "{model.config.model_type}": no MLP was found in {type(block).__name__} '
                f"(which has {parts}). It is not tiled, and takes memory for all tokens at once.",
                stacklevel=2,
            )
        else:
            if not norms_with_mlp:
                layout = MLPLayout(layout.mlp)
            tile_mlp(
                layout.mlp,
                layout.before,
                layout.after,
                tile_tokens=tile_tokens,
                ends_block=layout.ends_block,
            )
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
    """Compile what each block does to tokens by themselves, each part as one graph; returns the
    number of parts.

    That is its MLP and its norms, tiled or not; what counts for a router loss breaks its graph in
    two. Attention stays as it is: what it sees of the documents changes from step to step, and each
    change would compile it anew.
    """
    parts = []
    for block in blocks:
        layout = mlp_layout(block)
        modules = [*_norms(block), *([layout.mlp] if layout else [])]
        tiled = [module.forward.fn for module in modules if isinstance(module.forward, Tiled)]
        parts += tiled or modules
    for part in parts:
        # Not `part.compile()`: where the class is one of torch's own, as nn.LayerNorm, Dynamo skips
        # all that it calls.
        whole = not any(module._forward_hooks for module in part.modules())
        part.forward = torch.compile(part.forward, fullgraph=whole)
    return len(parts)


def use_loss_head(
    model: PreTrainedModel, decoder: nn.Module, tile_tokens: int, z_loss: float
) -> None:
    """Let `lm_head` compute the loss, with what the family does to its logits."""
    shape, linear = head_of(model, decoder), model.get_output_embeddings()
    shaping = {"scale": shape.scale, "softcap": shape.softcap, "z_loss": z_loss}
    model.set_output_embeddings(LossHead(linear, tile_tokens=tile_tokens, **shaping))


def use_one_dtype(*modules: nn.Module) -> None:
    """Store what is trained in modules, and not sharded yet, in the dtype that most of it has: FSDP
    takes only one.

    transformers keeps routers in fp32 when it loads a mixture of experts in bf16.
    """
    trained = {
        name: parameter
        for module in modules
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not isinstance(parameter, DTensor)
    }
    elements: Counter[torch.dtype] = Counter()
    for parameter in trained.values():
        elements[parameter.dtype] += parameter.numel()
    if len(elements) < 2:
        return
    dtype = elements.most_common(1)[0][0]
    widest = reduce(torch.promote_types, elements)
    odd = {name: p for name, p in trained.items() if p.dtype != dtype}
    for parameter in odd.values():
        parameter.data = parameter.data.to(dtype)
    if widest != dtype:
        warnings.warn(
            f"model: {', '.join(odd)} of {type(modules[0]).__name__} is now stored in {dtype}, as "
            "most of it is: FSDP shards parameters of one dtype. To keep more, load the model in "
            f"{widest} and give param_dtype={dtype}.",
            stacklevel=2,
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
