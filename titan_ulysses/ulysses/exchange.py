"""The exchange of Ulysses: from a shard of the sequence with all heads to the whole sequence with a shard of the heads.

One all-to-all brings q, k and v together, one takes the output back; each has its autograd, which is the other's
direction. Layouts (B rows, S tokens in all, T = S/P a rank, H heads in all, h_p heads of rank p, D head size):

    sequence-sharded  [B, T, H, D]    placed Shard(1) of [B, S, H, D]
    heads-sharded     [B, S, h, D]    placed Shard(2) of [B, S, H, D] where the plan is even

On the wire each rank's block is [T, B, h_p, D], token first: the blocks received from ranks 0..P-1 then already are
the whole sequence, [S, B, h, D], and q, k and v are views of it. So sending costs one copy and receiving none; on the
way back receiving costs one, and sending none where the attention kernel wrote [S, B, h, D] (all do at B = 1).

Bytes that rank r sends to others, where x_p counts rank p's heads: hq_p + 2 hkv_p of q, k, v, or hq_p of the output:

    sequence to heads    B * T * D * itemsize * (sum_p x_p - x_r)
    heads to sequence    B * T * D * itemsize * (P - 1) * x_r

Forward goes to the heads with q, k, v and back with the output; backward to the heads with the output's gradient and
back with those of q, k, v. An even plan sends (P - 1)/P * B * T * (Hq + 2 Hkv) * D * itemsize of q, k and v either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from titan_ulysses.ulysses.heads import HeadPlan

SEQUENCE = Shard(1)
HEADS = Shard(2)

_Ranges = Sequence[Sequence[range]]
"""`ranges[i][p]`: the heads of the i-th tensor that rank p computes."""


def sequence_to_heads(q: DTensor, k: DTensor, v: DTensor, plan: HeadPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Bring whole sequences to the rank of each head, in one all-to-all.

    q is [B, S, Hq, D], k and v [B, S, Hkv, D], all placed `Shard(1)` on a 1-D mesh of P ranks. Returns [B, S, heads, D]
    placed `Shard(2)` where the plan is even; otherwise the local tensors [B, S, h_p, D], whose heads the plan names.
    ValueError for any other placement.
    """
    _expect(SEQUENCE, q=q, k=k, v=v)
    mesh = q.device_mesh
    ranges = (plan.query, plan.key_value, plan.key_value)
    local = _SequenceToHeads.apply(mesh, ranges, q.to_local(), k.to_local(), v.to_local())
    return tuple(_placed(x, mesh) for x in local) if plan.is_even else local


def heads_to_sequence(output: Tensor, plan: HeadPlan, mesh: DeviceMesh) -> DTensor:
    """Take attention's output back to the rank of each token, in one all-to-all.

    output is [B, S, Hq, D] placed `Shard(2)` where the plan is even, otherwise the local [B, S, h_p, D]. Returns
    [B, S, Hq, D] placed `Shard(1)`. ValueError for any other placement.
    """
    if plan.is_even:
        _expect(HEADS, output=output)
        output = output.to_local()
    elif isinstance(output, DTensor):
        raise ValueError(f"output must be a local tensor under an uneven plan, but has {output.placements}")
    (local,) = _HeadsToSequence.apply(mesh, (plan.query,), output)
    return DTensor.from_local(local, mesh, (SEQUENCE,), run_check=False)


def _placed(x: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(x, mesh, (HEADS,), run_check=False)


def _expect(placement: Shard, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        found = tensor.placements if isinstance(tensor, DTensor) else "no placement"
        if found != (placement,):
            raise ValueError(f"{name} must be placed ({placement},) on the sequence-parallel mesh, but has {found}")


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mesh: DeviceMesh, ranges: _Ranges, *tensors: Tensor):
        ctx.mesh, ctx.ranges = mesh, ranges
        return _scatter_heads(tensors, ranges, mesh)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, None, *_gather_heads(grads, ctx.ranges, ctx.mesh)


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mesh: DeviceMesh, ranges: _Ranges, *tensors: Tensor):
        ctx.mesh, ctx.ranges = mesh, ranges
        return _gather_heads(tensors, ranges, mesh)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, None, *_scatter_heads(grads, ctx.ranges, ctx.mesh)


def _scatter_heads(tensors: Sequence[Tensor], ranges: _Ranges, mesh: DeviceMesh) -> tuple[Tensor, ...]:
    """[B, T, H_i, D] each, to [B, S, h_i, D] each (views of one buffer)."""
    rank, degree = mesh.get_local_rank(), mesh.size()
    batch, tokens, _, size = tensors[0].shape
    widths = [sum(len(r[p]) for r in ranges) * tokens * batch * size for p in range(degree)]
    sent = tensors[0].new_empty(sum(widths))
    for p, block in enumerate(sent.split(widths)):
        parts = block.view(tokens, batch, -1, size).split([len(r[p]) for r in ranges], dim=2) if widths[p] else ()
        for part, tensor, heads in zip(parts, tensors, ranges, strict=False):
            part.copy_(tensor[:, :, heads[p].start : heads[p].stop].transpose(0, 1))
    mine = [len(r[rank]) for r in ranges]
    received = _all_to_all(sent, [widths[rank]] * degree, widths, mesh).view(degree * tokens, batch, sum(mine), size)
    return tuple(part.transpose(0, 1) for part in received.split(mine, dim=2))


def _gather_heads(tensors: Sequence[Tensor], ranges: _Ranges, mesh: DeviceMesh) -> tuple[Tensor, ...]:
    """[B, S, h_i, D] each, to [B, T, H_i, D] each. A head that several ranks hold (KV heads) gets their sum."""
    rank, degree = mesh.get_local_rank(), mesh.size()
    batch, sequence, _, size = tensors[0].shape
    tokens = sequence // degree
    mine = [len(r[rank]) for r in ranges]
    if len(tensors) == 1:
        sent = tensors[0].transpose(0, 1).contiguous()
    else:
        sent = tensors[0].new_empty(sequence, batch, sum(mine), size)
        for part, tensor in zip(sent.split(mine, dim=2), tensors, strict=True):
            part.copy_(tensor.transpose(0, 1))
    widths = [sum(len(r[p]) for r in ranges) * tokens * batch * size for p in range(degree)]
    received = _all_to_all(sent.view(-1), widths, [widths[rank]] * degree, mesh)
    gathered = [x.new_empty(batch, tokens, r[-1].stop, size) for x, r in zip(tensors, ranges, strict=True)]
    for p, block in enumerate(received.split(widths)):
        parts = block.view(tokens, batch, -1, size).split([len(r[p]) for r in ranges], dim=2) if widths[p] else ()
        for part, whole, heads in zip(parts, gathered, ranges, strict=False):
            _accumulate(whole, part.transpose(0, 1), heads[p], filled=heads[p - 1].stop if p else 0)
    return tuple(gathered)


def _accumulate(whole: Tensor, part: Tensor, heads: range, *, filled: int) -> None:
    """Write part into whole's heads, adding where an earlier rank has written: heads below `filled`."""
    shared = max(0, min(filled, heads.stop) - heads.start)
    whole[:, :, heads.start : heads.start + shared].add_(part[:, :, :shared])
    whole[:, :, heads.start + shared : heads.stop].copy_(part[:, :, shared:])


def _all_to_all(sent: Tensor, received: list[int], split: list[int], mesh: DeviceMesh) -> Tensor:
    return funcol.wait_tensor(funcol.all_to_all_single(sent, received, split, mesh.get_group()))
