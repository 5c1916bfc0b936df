"""Log-probabilities of whole sequences, with gradient: for losses of whole completions, as DPO's.

Each rank of a sequence-parallel group gets the statistics of all tokens of its sequences, and
computes the same loss of them. The gradient of a token flows only on the rank that holds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import join_slices
from titan_ulysses.memory.losses import TokenStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def log_probs(
    model: PreTrainedModel, batch: dict[str, Any], *, temperature: float = 1.0
) -> TokenStatistics:
    """Return the statistics of each label of a batch of `shard`, [B, S], on all its ranks.

    S is the whole sequence, padded to a multiple of P. Entry t is about token t + 1. With gradient
    if gradients are on: let every rank compute the same loss from its sequences, divided by what
    all ranks count in the step (pairs, say), and call backward on it; gradients are summed over the
    mesh. Collective.
    """
    inputs = {key: value for key, value in batch.items() if key != "num_items_in_batch"}
    local = model(**inputs, reduction="statistics", temperature=temperature)
    return whole_statistics(local, model.sharding.mesh, batch.get("chunk_tokens"))


def whole_statistics(
    local: dict[str, Tensor], mesh: Mesh, chunk_tokens: int | None, *, scale: float = 1.0
) -> TokenStatistics:
    """Return the statistics [B, S] of whole sequences, from those [B, T] of each rank's slice.

    Their gradients are multiplied by scale on the way back. Collective.
    """
    fields = [local[name] for name in TokenStatistics._fields]
    whole = _Join.apply(mesh, chunk_tokens, scale, *fields)
    return TokenStatistics(*whole)


class _Join(torch.autograd.Function):
    """Joins the slices of tensors [B, T]; backward takes the slice of this rank."""

    @staticmethod
    def forward(ctx, mesh: Mesh, chunk_tokens: int | None, scale: float, *local: Tensor):
        ctx.mesh, ctx.chunk_tokens, ctx.scale = mesh, chunk_tokens, scale
        mine = torch.stack([x.to(local[0].dtype) for x in local])
        slices = [torch.empty_like(mine) for _ in range(mesh.sp.size())]
        dist.all_gather(slices, mine, group=mesh.sp.get_group())
        whole = join_slices(slices, chunk_tokens=chunk_tokens, dim=2)
        parts = tuple(w.to(x.dtype) for w, x in zip(whole.unbind(), local, strict=True))
        flows = zip(parts, local, strict=True)
        ctx.mark_non_differentiable(*(p for p, x in flows if not x.requires_grad))
        ctx.set_materialize_grads(False)
        return parts

    @staticmethod
    def backward(ctx, *upstream: Tensor | None):
        grads = (
            None
            if g is None
            else ctx.scale * ctx.mesh.local_slice(g, chunk_tokens=ctx.chunk_tokens)
            for g in upstream
        )
        return None, None, None, *grads
