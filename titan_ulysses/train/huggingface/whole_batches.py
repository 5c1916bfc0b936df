"""A sharded model whose forward takes the batches of trainers: whole sequences, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial, wraps
from itertools import islice
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast

from titan_ulysses.data.adapter import (
    BORDER_KEYS,
    TOKEN_KEYS,
    check_same_rows,
    read_documents,
    read_rows,
    slice_rows,
    with_kinds_of_all,
)
from titan_ulysses.data.loader import Batch
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX
from titan_ulysses.memory.losses import smoothed_cross_entropies
from titan_ulysses.model.hf import classifies
from titan_ulysses.model.vision import Vision
from titan_ulysses.setup.forward import StatisticsOutput
from titan_ulysses.train.evaluation import whole_statistics


@dataclass
class WholeOutput(StatisticsOutput):
    """What TRL's trainers read of a model's output, for whole sequences [B, S - 1]."""

    loss: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


def take_whole_batches(
    model: PreTrainedModel, mesh: Mesh, *, temperature: float = 1.0, label_smoothing: float = 0.0
) -> None:
    """Let a sharded model's forward take the batches of trainers: whole sequences, on every rank.

    With `fused_lm_head = True`, as TRL's trainers call it, it returns a WholeOutput, at this
    temperature, else the loss of all ranks' labels over `num_items_in_batch` times the
    data-parallel ranks, with labels smoothed as transformers' Trainer does it. UserError if ranks
    that share a sequence have other batches.
    """
    sharded, own = model.forward, {}
    if label_smoothing:
        own["loss_function"] = partial(smoothed_cross_entropies, smoothing=label_smoothing)

    @wraps(type(model).forward)  # trainers read which columns it takes
    def forward(
        _: PreTrainedModel,
        input_ids: Tensor,
        *,
        fused_lm_head: bool = False,
        num_items_in_batch: Tensor | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithPast | SequenceClassifierOutputWithPast | WholeOutput:
        inputs = {"input_ids": input_ids, **inputs}
        if classifies(model):
            return _classified(sharded, model, mesh, inputs)
        if inputs.get("labels") is None:
            raise UserError(
                "model: a batch without labels: the logits of whole sequences are never "
                "materialized. Give it labels, or score its rows with titan_ulysses.score."
            )
        rows = rows_of(inputs, model.sharding.vision)
        if rows.visuals is not None and mesh.batch.size() > 1:
            (rows,) = with_kinds_of_all([rows], 1, mesh)
        # Each time, because trainers pad each batch to a length of its own: ranks whose lengths
        # differ would wait for each other.
        check_same_rows([rows], mesh)
        batch = slice_rows(rows, mesh, model.sharding.stream_chunk_tokens).to(mesh.device)
        fields = batch.inputs()
        if not fused_lm_head:
            labels = _count(batch.labels, num_items_in_batch, mesh)
            return sharded(**fields, num_items_in_batch=labels, **own)
        local = sharded(**fields, reduction="statistics", temperature=temperature)
        # Trainers expect the mean over data-parallel ranks, and FSDP sums.
        scale = 1 / mesh.batch.size()
        whole = whole_statistics(local, mesh, batch.chunk_tokens, scale=scale)
        tokens = rows.labels.shape[1] - 1
        mask = (rows.labels[:, :tokens] != IGNORE_INDEX).to(mesh.device)
        # Not views, of which FSDP warns.
        kept = {name: x[:, :tokens].clone() for name, x in whole._asdict().items()}
        return WholeOutput(**kept, label_mask=mask)

    model.forward = MethodType(forward, model)


def _classified(
    sharded: Callable[..., Any], model: PreTrainedModel, mesh: Mesh, inputs: dict[str, Any]
) -> SequenceClassifierOutputWithPast:
    """Return the scores of a classifier for whole rows, and the mean loss of this rank's labels."""
    # RewardTrainer subtracts the margin itself.
    rows = read_documents({k: x for k, x in set_ones(inputs).items() if k != "margin"})
    check_same_rows([rows], mesh)
    batch = slice_rows(rows, mesh, model.sharding.stream_chunk_tokens).to(mesh.device)
    scores = sharded(**replace(batch, targets=None).inputs()).logits
    # Trainers expect the mean over data-parallel ranks, and FSDP sums.
    whole = scores.detach()
    scores = whole + (scores - whole) / mesh.batch.size()
    loss = None
    if batch.targets is not None:
        of_scores = {"logits": scores, "pooled_logits": scores, "config": model.config}
        loss = model.loss_function(labels=batch.targets, **of_scores)
    return SequenceClassifierOutputWithPast(loss=loss, logits=scores)


def _count(labels: Tensor, of_step: Tensor | None, mesh: Mesh) -> Tensor:
    """Return the labels of the step, or where that is not known, of this batch on all ranks."""
    if of_step is not None:
        return of_step * mesh.batch.size()
    here = (labels != IGNORE_INDEX).sum()
    dist.all_reduce(here, group=mesh.loss.get_group())
    return here


def rows_of(inputs: Mapping[str, Any], vision: Vision | None = None) -> Batch:
    """Return the rows of a trainer's batch. UserError for an input that the model does not take."""
    of_images = () if vision is None else vision.batch_keys
    return read_rows(set_ones(inputs, of_images), vision)


def set_ones(inputs: Mapping[str, Any], of_images: Iterable[str] = ()) -> dict[str, Any]:
    """Return the inputs that say something: what is off or unset does not, nor does a cache."""
    read, ignored = (*TOKEN_KEYS, *BORDER_KEYS, *of_images), ("use_cache", "return_dict")
    return {
        key: x
        for key, x in inputs.items()
        if key in read or ((isinstance(x, Tensor) or x) and key not in ignored)
    }


class EachRowOnce:
    """A batch sampler of one of the data-parallel ranks that evaluate each row once.

    A step has a batch of each rank, in the order of the data. All ranks make the last step too: the
    last rank with rows may have fewer, and those without get one that must not count.
    """

    def __init__(self, batches: BatchSampler, ranks: int, rank: int) -> None:
        self.batches, self.num_processes, self.rank = batches, ranks, rank
        self.batch_size, self.drop_last = batches.batch_size, batches.drop_last

    def __len__(self) -> int:
        steps, rest = divmod(len(self.batches), self.num_processes)
        return steps + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self.batches)
        for _ in range(len(self)):
            step = [*islice(batches, self.num_processes)]
            yield step[self.rank] if self.rank < len(step) else step[0][:1]

    def has_rows(self, rows: int) -> bool:
        """Return whether this rank has some of so many rows of a step."""
        return self.rank * self.batch_size < rows


def gather(group: dist.ProcessGroup, data: Any, *, own: bool | None = None) -> Any:
    """Return tensors of the data-parallel ranks, joined along their first dimension.

    own: whether this rank's count; None: all do, and are of the same size.
    """
    from accelerate.utils import recursively_apply

    def join(x: Tensor) -> Tensor:
        x = (x[None] if x.ndim == 0 else x).contiguous()
        if own is None:
            return join_even(x)
        sizes = join_even(torch.tensor([len(x) if own else 0], device=x.device)).tolist()
        space = x.new_zeros(max(sizes), *x.shape[1:])
        space[: sizes[dist.get_rank(group)]] = x if own else 0
        parts = join_even(space).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def join_even(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts)

    return recursively_apply(join, data, error_on_other_type=True)
