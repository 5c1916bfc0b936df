"""The forward of a sharded model: Ulysses attention, and the loss computed inside the head."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
)
from transformers.utils import ModelOutput

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX, Documents, chunk_length, computing
from titan_ulysses.memory.losses import LossFunction
from titan_ulysses.model.families import layer_types
from titan_ulysses.model.rope import use_document_lengths
from titan_ulysses.model.router import RouterLoss, router_loss_of
from titan_ulysses.ulysses.attention import ATTENTION_NAME, Ulysses
from titan_ulysses.ulysses.cores import Core
from titan_ulysses.ulysses.linear_attention import check_layers, use_linear_attention


def use_ulysses(
    model: PreTrainedModel, decoder: nn.Module, blocks: nn.ModuleList, mesh: Mesh, core: Core
) -> None:
    """Make the model's attention layers call Ulysses attention, and replace the model's forward.

    The new forward passes the mesh, the core and the documents of the batch down to them.
    """
    # Other models may share this config object, so this model gets a copy of its own.
    shared = model.config
    own = copy.deepcopy(model.config)
    own._attn_implementation = ATTENTION_NAME
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    check_layers(blocks, layer_types(model.config), is_stateful=model._is_stateful)
    use_linear_attention(blocks)
    model.ulysses_mesh = mesh
    router_loss, ropes = router_loss_of(model, decoder), use_document_lengths(model, blocks)

    def forward(
        model: PreTrainedModel,
        *others: Any,
        documents: Documents | None = None,
        position_limits: Documents | None = None,
        chunk_tokens: int | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        if others or documents is None:
            raise UserError(
                "model: the sharded model takes the batches of `titan_ulysses.shard(loader, "
                "model)`, as in model(**batch): each rank needs its slice of a sequence, and the "
                "documents of the whole."
            )
        mesh = model.ulysses_mesh
        chunk_tokens = _chunk_tokens(model, sum(documents[0]), chunk_tokens)
        # Some RoPE frequencies depend on document lengths, or on how far positions go.
        for rope in ropes:
            rope.begin(
                documents, position_limits or documents, mesh.sp.get_local_rank(), chunk_tokens
            )
        ulysses = Ulysses(mesh.sp, core, documents, inputs["position_ids"], chunk_tokens)
        with computing(ulysses.chunks):
            return _forward(
                model, decoder, mesh.loss.get_group(), router_loss, ulysses=ulysses, **inputs
            )

    model.forward = MethodType(forward, model)


def _chunk_tokens(model: PreTrainedModel, seq_len: int, of_batch: int | None) -> int | None:
    """Return the chunks in which the blocks stream a batch that was cut into chunks `of_batch`.

    UserError if the model cannot take this batch.
    """
    setting, degree = model.stream_chunk_tokens, model.ulysses_mesh.sp.size()
    wanted = chunk_length(setting, seq_len, degree)
    if degree == 1 and of_batch is None:  # all chunks of a whole sequence are this rank's
        return wanted
    if setting == -1 and of_batch is not None and degree > 1:
        raise UserError(
            f"model: the batch is cut into chunks of {of_batch} tokens, and this model does not "
            "stream. Let it cut its own batches: shard(loader, model)."
        )
    if setting > 0 and wanted is not None and of_batch is None:
        raise UserError(
            f"memory.stream_chunk_tokens = {setting}: the batch is not cut into chunks. Give "
            "`shard` the model: shard(loader, model)."
        )
    return None if setting == -1 else of_batch


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
    reduction: Literal["sum", "none", "statistics", "hidden"] = "sum",
    temperature: float = 1.0,
    loss_function: LossFunction | None = None,
    loss_inputs: dict[str, Tensor] | None = None,
) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast | StatisticsOutput | BaseModelOutput:
    """Run a causal LM, with the loss computed from hidden states inside the head.

    input_ids, position_ids and labels (already shifted) are this rank's [B, T]. num_items_in_batch
    is the number of valid labels in the whole step. `.loss` is the sum over all ranks of group, the
    same on each of them, but its gradient is that of this rank's part, because gradients are summed
    over the mesh later. With reduction = "none", `.loss` is the cross-entropy of each of this
    rank's labels [B, T], with gradients. Without labels, `.logits` are those of this rank's tokens.
    With reduction = "hidden", `.last_hidden_state` is what the head is given, [B, T, h]. With
    reduction = "statistics", the output has the TokenStatistics of this rank's labels, [B, T] each,
    with gradients. loss_function and its loss_inputs [B, T, ...] replace the cross-entropy: see
    `memory/losses.py`.

    `.aux_loss` is the router loss, if there is one, and `.loss` includes it. attention_mask [B, T]
    is 0 at padding, which the router loss does not count; it has no other effect.
    """
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "ulysses": ulysses}
    sums = labels is not None and reduction == "sum"
    own_labels = labels if sums else None
    hidden, *of_routers = _decode(decoder, inputs, router_loss, attention_mask, own_labels, group)
    head = model.get_output_embeddings()
    needs_weight = labels is None or loss_function is not None or not sums
    if needs_weight and torch.is_grad_enabled():
        # Unlike that of the loss, the backward of logits needs the weight: FSDP has to gather it.
        # This is not turned off again, because that backward may run after later forwards.
        head.set_unshard_in_backward(True)
    if reduction == "hidden":
        # By the head, because FSDP counts on a call of each module of a forward.
        return BaseModelOutput(last_hidden_state=head(hidden, reduction=reduction))
    if labels is None:
        return CausalLMOutputWithPast(logits=head(hidden))
    if reduction == "statistics":
        statistics = head(hidden, labels, reduction=reduction, temperature=temperature)
        return StatisticsOutput(**statistics._asdict())
    own = {"loss_function": loss_function, "loss_inputs": loss_inputs} if loss_function else {}
    loss = head(hidden, labels, num_items_in_batch, reduction=reduction, **own)
    if not sums:
        return CausalLMOutputWithPast(loss=loss)
    model.own_loss = loss.detach()  # this rank's part, for who asks where a NaN came from
    loss = SumOverRanks.apply(loss, torch.promote_types(hidden.dtype, torch.float32), group)
    if router_loss is None:
        return CausalLMOutputWithPast(loss=loss)
    aux_loss, count = of_routers
    return _with_router_loss(loss, aux_loss, count, num_items_in_batch, router_loss.coefficient)


def _with_router_loss(
    loss: Tensor, aux_loss: Tensor, num_labels: Tensor, num_items: Tensor, coefficient: float
) -> MoeCausalLMOutputWithPast:
    """Add the router loss of a micro-batch, weighted by its share of the labels of the step."""
    share = num_labels.to(aux_loss.dtype) / num_items.clamp(min=1)
    return MoeCausalLMOutputWithPast(loss=loss + coefficient * share * aux_loss, aux_loss=aux_loss)


def _decode(
    decoder: nn.Module,
    inputs: dict[str, Any],
    router_loss: RouterLoss | None,
    mask: Tensor | None,
    labels: Tensor | None,
    group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:
    """Return the hidden states [B, T, h]; and the router loss and the number of labels on all
    ranks, if there is such a loss, and labels whose batch it belongs to.
    """
    if router_loss is None:
        return (decoder(**inputs, use_cache=False).last_hidden_state,)
    with router_loss.forward_pass(count=labels is not None, mask=mask) as routers:
        # Hooks read the logits of routers, so the decoder keeps none.
        hidden = decoder(**inputs, use_cache=False, output_router_logits=False).last_hidden_state
    if labels is None:
        return (hidden,)
    return routers.reduce(hidden, (labels != IGNORE_INDEX).sum(), group)


@dataclass
class StatisticsOutput(ModelOutput):
    """The fields of `TokenStatistics`."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logits: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


class SumOverRanks(torch.autograd.Function):
    """The sum over all ranks of a scalar in fp64, converted to dtype.

    Backward passes the gradient to this rank's part only, because FSDP sums the gradients of the
    parts over the ranks.
    """

    @staticmethod
    def forward(ctx, part: Tensor, dtype: torch.dtype, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total.to(dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream.to(torch.float64), None, None
