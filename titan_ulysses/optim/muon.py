"""Muon for hidden matrices, and AdamW for all other parameters.

The update is that of torch.optim.Muon: the momentum of a matrix is replaced by the nearest matrix
with orthogonal rows or columns, approximately, by five Newton-Schulz iterations
(https://kellerjordan.github.io/posts/muon/). It is scaled as in arXiv 2502.16982, so that learning
rate and weight decay of AdamW serve for both.

The iterations need the whole matrix. Where FSDP2 has sharded it, the ranks gather one matrix at a
time, in the dtype of the iterations, and each of them computes all of it and keeps its own rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.tensors import local_box, local_shard
from titan_ulysses.model.hf import output_layer
from titan_ulysses.optim.adamw import ShardwiseAdamW

MOMENTUM = 0.95
_COEFFICIENTS, _ITERATIONS, _EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
_BUFFER = "momentum_buffer"


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained matrices of the model, without those of embeddings and of the head.

    Stacked matrices of experts, which have three dimensions, are not among them, as in torch.
    """
    outside = {module for module in model.modules() if isinstance(module, nn.Embedding)}
    outside |= {model.get_input_embeddings(), output_layer(model)}
    others = {p for module in outside if module is not None for p in module.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and p not in others]


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the groups of parameters for `Muon`. UserError if the model has no matrix for it."""
    matrices = hidden_matrices(model)
    if not matrices:
        raise UserError(
            'optimizer.name = "muon": no trained parameter is a hidden matrix. Set optimizer.name '
            '= "adamw"'
        )
    chosen = {*matrices}
    others = [p for p in model.parameters() if p.requires_grad and p not in chosen]
    groups = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
    return [group for group in groups if group["params"]]


class Muon(ShardwiseAdamW):
    """Muon with Nesterov momentum for groups with "muon" = True, and AdamW for the others.

    The iterations are in bf16, as in torch, and in fp64 for parameters in fp64. offload and
    found_inf are as in `ShardwiseAdamW`. Every rank must step the same parameters in the same
    order: gathering is collective.
    """

    def _step_shard(self, p: nn.Parameter, group: dict[str, Any], index: int) -> None:
        if not group["muon"]:
            super()._step_shard(p, group, index)
            return
        state = self.state[p]
        if not state:
            state[_BUFFER] = self._zero_moment(p, signed=True)
        kept = local_shard(state[_BUFFER])
        momentum = kept.to(p.device, non_blocking=True, copy=True) if self.offload else kept
        shard, grad = local_shard(p.detach()), local_shard(p.grad).to(momentum.dtype)
        with self._unless_skipped(shard, momentum):
            momentum.lerp_(grad, 1 - MOMENTUM)
            update = orthogonal(grad.lerp(momentum, MOMENTUM), p)
            shard.mul_(1 - group["lr"] * group["weight_decay"])
            shard.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))
        if self.offload:
            kept.copy_(momentum, non_blocking=True)


def orthogonal(update: Tensor, p: Tensor) -> Tensor:
    """Return this rank's shard of the orthogonalized matrix whose shard `update` is.

    p: the parameter, a DTensor if it is sharded. Collective then.
    """
    dtype = torch.float64 if update.dtype == torch.float64 else torch.bfloat16
    if not isinstance(p, DTensor):
        return newton_schulz(update.to(dtype)).to(update.dtype)
    mesh, placements = p.device_mesh, p.placements
    layout = {"shape": p.shape, "stride": p.stride()}
    sharded = DTensor.from_local(update.to(dtype), mesh, placements, run_check=False, **layout)
    whole = newton_schulz(sharded.full_tensor())
    shape, offset = local_box(p)
    for dim, (begin, size) in enumerate(zip(offset, shape, strict=True)):
        # The offset of an empty shard can be beyond the end, and that of a simulation is a guess.
        whole = whole.narrow(dim, min(begin, whole.shape[dim] - size), size)
    return whole.to(update.device, update.dtype)


def newton_schulz(matrix: Tensor) -> Tensor:
    """Return about U V^T of a matrix U S V^T, in its dtype.

    Singular values become numbers between about 0.5 and 1.5. The operations are those of
    torch.optim.Muon in their order, so that results are equal to the bit.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
