"""The forward of a sharded model: Ulysses attention, and the loss computed inside the head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import ModelOutput

from titan_ulysses.data.images import Pixels, Visuals
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX, Documents, chunk_length, computing
from titan_ulysses.memory.losses import LossFunction
from titan_ulysses.model.families import layer_types
from titan_ulysses.model.hf import output_layer
from titan_ulysses.model.prediction import layer_of
from titan_ulysses.model.rope import DocumentRoPE
from titan_ulysses.model.router import RouterLoss
from titan_ulysses.model.vision import Vision
from titan_ulysses.ulysses.attention import ATTENTION_NAME, Ulysses
from titan_ulysses.ulysses.cores import Core
from titan_ulysses.ulysses.indexer import INDEXED, Indexer


def use_attention(model: PreTrainedModel, decoder: nn.Module) -> None:
    """Make the attention layers of the model's text call Ulysses attention."""
    # Other models may share these config objects, so this model gets copies of its own.
    shared, text = model.config, decoder.config
    own = copy.deepcopy(shared)
    own_text = own.get_text_config()
    own_text._attn_implementation = ATTENTION_NAME
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
        elif getattr(module, "config", None) is text:
            module.config = own_text
    if layer := layer_of(model):  # it has a config of its own, which its modules share
        layer.config._attn_implementation = ATTENTION_NAME


class Prediction(NamedTuple):
    """What a prediction layer is trained on."""

    weight: float
    """that of its loss"""
    labels_of_step: Tensor
    """the number of `next_labels` of the whole step"""
    next_ids: Tensor
    """[B, T], see `Batch`"""
    next_labels: Tensor
    """[B, T]"""


@dataclass
class Sharding:
    """What makes a model a sharded one, and its forward: `model.sharding`.

    It is the one attribute that `parallelize` adds to a model.
    """

    decoder: nn.Module
    """Takes tokens to hidden states; of a model of images and text, features too."""
    mesh: Mesh
    """The mesh on which it runs; another one within `whole_sequences`."""
    core: Core
    router_loss: RouterLoss | None
    ropes: list[DocumentRoPE]
    """Rotary embeddings that need the lengths of documents."""
    stream_chunk_tokens: int = -1
    """The setting for which batches must be cut; -1: its blocks do not stream."""
    indexers: list[Indexer] = field(default_factory=list)
    vision: Vision | None = None
    """None: a model of text."""
    own_loss: Tensor | None = None
    """This rank's part of the last loss, which tells which rank a NaN came from."""
    prediction_loss: Tensor | None = None
    """That of the prediction layer in the last loss, of all ranks and without its weight."""

    def forward(
        self,
        model: PreTrainedModel,
        *others: Any,
        documents: Documents | None = None,
        position_limits: Documents | None = None,
        chunk_tokens: int | None = None,
        visuals: Visuals | None = None,
        pixels: Sequence[Pixels] = (),
        **inputs: Any,
    ) -> CausalLMOutputWithPast | StatisticsOutput | BaseModelOutput:
        """Run the model on a batch of `shard`. The attention layers get what they need of it."""
        if others or documents is None:
            raise UserError(
                "model: the sharded model takes the batches of `titan_ulysses.shard(loader, "
                "model)`, as in model(**batch): each rank needs its slice of a sequence, and the "
                "documents of the whole."
            )
        sp = self.mesh.sp
        chunk_tokens = self._chunk_tokens(sum(documents[0]), chunk_tokens)
        # Some RoPE frequencies depend on document lengths, or on how far positions go.
        for rope in self.ropes:
            rope.begin(documents, position_limits or documents, sp.get_local_rank(), chunk_tokens)
        share = self._label_share(**inputs)
        positions = inputs["position_ids"]
        positions = positions if positions.ndim == 2 else positions[0]
        ulysses = Ulysses(sp, self.core, documents, positions, chunk_tokens, share)
        with computing(ulysses.chunks):
            if self.vision is not None:
                inputs["mm_encoder_outputs"] = self.vision.encode(
                    visuals or Visuals(),
                    pixels,
                    self.mesh,
                    seq_len=sum(documents[0]),
                    chunk_tokens=chunk_tokens,
                )
            run = self._classify if "num_documents" in inputs else self._forward
            return run(model, ulysses=ulysses, **inputs)

    def _label_share(
        self, labels: Tensor | None = None, num_items_in_batch: Tensor | None = None, **_: Any
    ) -> Tensor | None:
        """Return what each token counts in the loss of trained indexers (see `Ulysses`)."""
        if not any(indexer.training != "frozen" for indexer in self.indexers):
            return None
        if labels is None or num_items_in_batch is None:
            return None  # nothing is trained without labels
        return (labels != IGNORE_INDEX) / num_items_in_batch.double().clamp(min=1)

    def take_indexer_losses(self) -> Tensor | None:
        """Return the loss of each indexer since the last call, of this rank's tokens: [indexers]
        fp64. None if none has been trained.
        """
        totals = [x.total for x in self.indexers if x.total is not None]
        if not totals:
            return None
        losses = torch.cat(totals)
        for total in totals:
            total.zero_()
        return losses

    def _chunk_tokens(self, seq_len: int, of_batch: int | None) -> int | None:
        """Return the chunks in which blocks stream a batch that was cut into chunks `of_batch`.

        UserError if the model cannot take this batch.
        """
        setting, degree = self.stream_chunk_tokens, self.mesh.sp.size()
        wanted = chunk_length(setting, seq_len, degree)
        if degree == 1 and of_batch is None:  # all chunks of a whole sequence are this rank's
            return wanted
        if setting == -1 and of_batch is not None and degree > 1:
            raise UserError(
                f"model: the batch is cut into chunks of {of_batch} tokens, and this model does "
                "not stream. Let it cut its own batches: shard(loader, model)."
            )
        if setting > 0 and wanted is not None and of_batch is None:
            raise UserError(
                f"memory.stream_chunk_tokens = {setting}: the batch is not cut into chunks. Give "
                "`shard` the model: shard(loader, model)."
            )
        return None if setting == -1 else of_batch

    def _forward(
        self,
        model: PreTrainedModel,
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
        prediction: Prediction | None = None,
        **of_images: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast | StatisticsOutput | BaseModelOutput:
        """Run a causal LM, with the loss computed from hidden states inside the head.

        input_ids, position_ids and labels (already shifted) are this rank's [B, T];
        num_items_in_batch is the number of valid labels in the whole step. `.loss` is the sum over
        all ranks, but its gradient is that of this rank's part, because gradients are summed later.
        With reduction = "none", `.loss` is the cross-entropy of each of this rank's labels [B, T],
        with gradients. Without labels, `.logits` are those of this rank's tokens. "hidden" gives
        `.last_hidden_state`, what the head is given, [B, T, h]. "statistics" gives the
        TokenStatistics of this rank's labels, [B, T] each, with gradients. loss_function and its
        loss_inputs [B, T, ...] replace the cross-entropy: see `memory/losses.py`. `.loss` has that
        of `prediction` too, and `.aux_loss`, that of routers, which attention_mask is for.
        """
        sums = labels is not None and reduction == "sum"
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "ulysses": ulysses}
        inputs |= of_images
        hidden, aux_loss, count = self._decode(inputs, attention_mask, labels if sums else None)
        head = output_layer(model)
        if (loss_function is not None or not sums) and torch.is_grad_enabled():
            # The backward of logits needs the weight, and may run after later forwards.
            head.set_unshard_in_backward(True)
        if reduction == "hidden":
            # By the head: FSDP counts on a call of each module of a forward.
            return BaseModelOutput(last_hidden_state=head(hidden, reduction=reduction))
        if labels is None:
            return CausalLMOutputWithPast(logits=head(hidden))
        if reduction == "statistics":
            statistics = head(hidden, labels, reduction=reduction, temperature=temperature)
            return StatisticsOutput(**statistics._asdict())
        own = {"loss_function": loss_function, "loss_inputs": loss_inputs} if loss_function else {}
        ahead = prediction and self._predict(model, hidden, inputs, prediction)
        loss = head(hidden, labels, num_items_in_batch, reduction=reduction, **own)
        if not sums:
            return CausalLMOutputWithPast(loss=loss)
        loss = loss if ahead is None else loss + ahead
        self.own_loss = loss.detach()
        wide, group = torch.promote_types(hidden.dtype, torch.float32), self.mesh.loss.get_group()
        loss = SumOverRanks.apply(loss, wide, group)
        if aux_loss is None:
            return CausalLMOutputWithPast(loss=loss)
        # That of a micro-batch is weighted by its share of the labels of the step.
        share = count.to(aux_loss.dtype) / num_items_in_batch.clamp(min=1)
        loss = loss + self.router_loss.coefficient * share * aux_loss
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss)

    def _predict(
        self, model: PreTrainedModel, hidden: Tensor, inputs: dict[str, Any], prediction: Prediction
    ) -> Tensor:
        """Return this rank's part of the loss of the prediction layer, with its weight, from the
        model's hidden states [B, T, h]. Positions are those of the tokens after them.
        """
        embeddings = model.get_input_embeddings()(prediction.next_ids)
        positions = inputs["position_ids"] + 1
        ahead = layer_of(model)(
            embeddings,
            hidden,
            position_embeddings=self.decoder.rotary_emb(embeddings, positions),
            attention_mask=None,
            position_ids=positions,
            cache=None,
            ulysses=inputs["ulysses"],
        )
        loss = output_layer(model)(ahead, prediction.next_labels, prediction.labels_of_step)
        self.prediction_loss = loss.detach().clone()
        dist.all_reduce(self.prediction_loss, group=self.mesh.loss.get_group())
        return prediction.weight * loss

    def _scores(self, logits: Tensor, ends: Tensor, count: int) -> Tensor:
        """Return the scores [count, C] of documents, from logits [B, T, C] of this rank's tokens.

        ends [B, T]: the number of the document that ends at a token, or -100. Each of the ranks
        that share the rows gets all scores, and the gradient of those of its own tokens.
        """
        logits, ends = logits.flatten(0, 1), ends.flatten()
        own = logits.where((ends != IGNORE_INDEX)[:, None], 0).double()
        place = ends.where(ends != IGNORE_INDEX, count)
        scores = own.new_zeros(count + 1, own.shape[1]).index_add(0, place, own)
        wide = torch.promote_types(logits.dtype, torch.float32)
        # Not a view, of which FSDP warns.
        return SumOverRanks.apply(scores, wide, self.mesh.sp.get_group())[:count].clone()

    def _classify(
        self,
        model: PreTrainedModel,
        *,
        labels: Tensor,
        num_documents: int,
        attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Run a model for sequence classification, which scores the last token of each document.

        labels [B, T] say which of num_documents = N ends at a token; num_items_in_batch is their
        number in the step. `.logits` are the scores [N, C], and with targets `.loss` is that of
        transformers, the mean over the step. A loss of one's own that each of the ranks that share
        the rows computes from the scores has its gradient once.
        """
        hidden, *_ = self._decode(inputs, attention_mask, None)
        head = output_layer(model)
        if torch.is_grad_enabled():
            head.set_unshard_in_backward(True)  # see `_forward`
        scores = self._scores(head(hidden), labels, num_documents)
        if targets is None:
            return SequenceClassifierOutputWithPast(logits=scores)
        mean = model.loss_function(
            logits=scores, labels=targets, pooled_logits=scores, config=model.config
        )
        part = mean.double() * num_documents / num_items_in_batch
        self.own_loss = part.detach() / self.mesh.sp.size()
        loss = SumOverRanks.apply(part, scores.dtype, self.mesh.batch.get_group())
        return SequenceClassifierOutputWithPast(loss=loss, logits=scores)

    def _decode(
        self, inputs: dict[str, Any], mask: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the hidden states [B, T, h]; and the router loss and the number of labels on all
        ranks, if there is such a loss, and labels whose batch it belongs to.
        """
        if INDEXED in (layer_types(self.decoder.config.get_text_config()) or ()):
            # In place of a mask [B, 1, S, S], which the decoder would build.
            stand_in = inputs["position_ids"].new_zeros((1, 1, 1, 1), dtype=torch.float32)
            inputs["attention_mask"] = {INDEXED: stand_in}
        if self.router_loss is None:
            return self.decoder(**inputs, use_cache=False).last_hidden_state, None, None
        inputs["output_router_logits"] = False  # hooks read them, so the decoder keeps none
        with self.router_loss.forward_pass(count=labels is not None, mask=mask) as routers:
            hidden = self.decoder(**inputs, use_cache=False).last_hidden_state
        if labels is None:
            return hidden, None, None
        return routers.reduce(hidden, (labels != IGNORE_INDEX).sum(), self.mesh.loss.get_group())


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
