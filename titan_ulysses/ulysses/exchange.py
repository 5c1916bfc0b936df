"""The exchange of Ulysses: from a shard of the sequence with all heads to the whole sequence with a
shard of the heads.

One all-to-all brings q, k and v together, one takes the output back; each has its autograd, which
is the other's direction. Layouts (B rows, S tokens in all, T = S/P a rank, H heads in all, h_p
heads of rank p, D head size, which in latent attention is another one in v and the output, Dv, than
in q and k, Dq):

    sequence-sharded  [B, T, H, D]    placed Shard(1) of [B, S, H, D]
    heads-sharded     [B, S, h, D]    placed Shard(2) of [B, S, H, D] where the plan is even

On the wire each rank's block is [T, B, x_p], token first, where the x_p numbers of a token are all
heads of q, then of k, then of v. The blocks received from ranks 0..P-1 then already are the whole
sequence, [S, B, x], and q, k and v are views of it. So sending costs one copy and receiving none;
on the way back receiving costs one, and sending none where the attention kernel wrote [S, B, h, D]
(all do at B = 1). A copy is a strided one a tensor and stretch of ranks (`HeadPlan.rank_groups`),
not one a rank: three in all where P divides Hkv.

Bytes that rank r sends to others, with x_p = Dq * (hq_p + hkv_p) + Dv * hkv_p for q, k, v, or Dv *
hq_p for the output:

    sequence to heads    B * T * itemsize * (sum_p x_p - x_r)
    heads to sequence    B * T * itemsize * (P - 1) * x_r

Forward goes to the heads with q, k, v and back with the output; backward to the heads with the
output's gradient and back with those of q, k, v. An even plan sends, of q, k and v and either way,
(P - 1)/P * B * T * (Dq * (Hq + Hkv) + Dv * Hkv) * itemsize.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from titan_ulysses.ulysses.heads import HeadPlan

SEQUENCE = Shard(1)
HEADS = Shard(2)


class _ExchangeSpec(NamedTuple):
    """What one all-to-all carries."""

    ranges: tuple[tuple[range, ...], ...]
    """`ranges[i][p]`: the heads of the i-th tensor that rank p computes."""
    rank_groups: tuple[range, ...]
    """Ranks that one copy a tensor serves, see `HeadPlan.rank_groups`."""
    sizes: tuple[int, ...]
    """The head size of each tensor."""

    def widths(self, rank: int) -> list[int]:
        """Numbers a token that rank computes with, of each tensor: heads times their size."""
        pairs = zip(self.ranges, self.sizes, strict=True)
        return [len(ranges[rank]) * size for ranges, size in pairs]

    def split(self, block: Tensor, rank: int) -> list[Tensor]:
        """[..., x] as each tensor's [..., h_i, D_i] for rank: views."""
        parts = zip(block.split(self.widths(rank), dim=-1), self.sizes, strict=True)
        return [part.unflatten(-1, (part.shape[-1] // size, size)) for part, size in parts]


def sequence_to_heads(
    q: DTensor, k: DTensor, v: DTensor, plan: HeadPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring whole sequences to the rank of each head, in one all-to-all.

    q is [B, S, Hq, Dq], k [B, S, Hkv, Dq], v [B, S, Hkv, Dv], all placed `Shard(1)` on a 1-D mesh
    of P ranks. Returns [B, S, heads, D] placed `Shard(2)` where the plan is even; otherwise the
    local tensors [B, S, h_p, D], whose heads the plan names. ValueError for any other placement.
    """
    _expect(SEQUENCE, q=q, k=k, v=v)
    mesh = q.device_mesh
    sizes = tuple(x.shape[3] for x in (q, k, v))
    load = _ExchangeSpec((plan.query, plan.key_value, plan.key_value), plan.rank_groups, sizes)
    local = _SequenceToHeads.apply(mesh, load, q.to_local(), k.to_local(), v.to_local())
    return tuple(_placed(x, mesh) for x in local) if plan.is_even else local


def heads_to_sequence(output: Tensor, plan: HeadPlan, mesh: DeviceMesh) -> DTensor:
    """Take attention's output back to the rank of each token, in one all-to-all.

    output is [B, S, Hq, D] placed `Shard(2)` where the plan is even, otherwise the local [B, S,
    h_p, D]. Returns [B, S, Hq, D] placed `Shard(1)`. ValueError for any other placement.
    """
    if plan.is_even:
        _expect(HEADS, output=output)
        output = output.to_local()
    elif isinstance(output, DTensor):
        raise ValueError(
            f"output must be a local tensor under an uneven plan, but has {output.placements}"
        )
    load = _ExchangeSpec((plan.query,), plan.query_rank_groups, (output.shape[3],))
    (local,) = _HeadsToSequence.apply(mesh, load, output)
    return DTensor.from_local(local, mesh, (SEQUENCE,), run_check=False)


def _placed(x: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(x, mesh, (HEADS,), run_check=False)


def _expect(placement: Shard, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        found = tensor.placements if isinstance(tensor, DTensor) else "no placement"
        if found != (placement,):
            raise ValueError(
                f"{name} must be placed ({placement},) on the sequence-parallel mesh, but has "
                f"{found}"
            )


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mesh: DeviceMesh, load: _ExchangeSpec, *tensors: Tensor):
        ctx.mesh, ctx.load = mesh, load
        return _scatter_heads(tensors, load, mesh)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, None, *_gather_heads(grads, ctx.load, ctx.mesh)


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mesh: DeviceMesh, load: _ExchangeSpec, *tensors: Tensor):
        ctx.mesh, ctx.load = mesh, load
        return _gather_heads(tensors, load, mesh)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, None, *_scatter_heads(grads, ctx.load, ctx.mesh)


def _scatter_heads(
    tensors: Sequence[Tensor], load: _ExchangeSpec, mesh: DeviceMesh
) -> tuple[Tensor, ...]:
    """[B, T, H_i, D_i] each, to [B, S, h_i, D_i] each (views of one buffer)."""
    rank, degree = mesh.get_local_rank(), mesh.size()
    batch, tokens = tensors[0].shape[:2]
    split = [batch * tokens * sum(load.widths(p)) for p in range(degree)]
    sent = tensors[0].new_empty(sum(split))
    for ranks, blocks in _blocks(sent, load, tokens, batch):
        for block, tensor, ranges in zip(blocks, tensors, load.ranges, strict=True):
            block.copy_(_windows(tensor, ranges, ranks))
    received = _all_to_all(sent, [split[rank]] * degree, split, mesh)
    received = received.view(degree * tokens, batch, sum(load.widths(rank)))
    return tuple(part.transpose(0, 1) for part in load.split(received, rank))


def _gather_heads(
    tensors: Sequence[Tensor], load: _ExchangeSpec, mesh: DeviceMesh
) -> tuple[Tensor, ...]:
    """[B, S, h_i, D_i] each, to [B, T, H_i, D_i]. A KV head of several ranks gets their sum."""
    rank, degree = mesh.get_local_rank(), mesh.size()
    batch, sequence = tensors[0].shape[:2]
    tokens = sequence // degree
    split = [batch * tokens * sum(load.widths(p)) for p in range(degree)]
    received = _all_to_all(_token_first(tensors, load, rank), split, [split[rank]] * degree, mesh)
    shapes = [(r[-1].stop, size) for r, size in zip(load.ranges, load.sizes, strict=True)]
    gathered = [tensors[0].new_empty(batch, tokens, *shape) for shape in shapes]
    for ranks, blocks in _blocks(received, load, tokens, batch):
        for block, whole, ranges in zip(blocks, gathered, load.ranges, strict=True):
            filled = ranges[ranks.start - 1].stop if ranks.start else 0
            _accumulate(
                _windows(whole, ranges, ranks), block, shared=filled - ranges[ranks.start].start
            )
    return tuple(gathered)


def _token_first(tensors: Sequence[Tensor], load: _ExchangeSpec, rank: int) -> Tensor:
    """[B, S, h_i, D_i] each, to one flat [S, B, x]: a view where a single tensor lies like that."""
    views = [x.transpose(0, 1) for x in tensors]
    if len(views) == 1:
        return views[0].contiguous().view(-1)
    packed = tensors[0].new_empty(*views[0].shape[:2], sum(load.widths(rank)))
    for part, view in zip(load.split(packed, rank), views, strict=True):
        part.copy_(view)
    return packed.view(-1)


def _blocks(
    buffer: Tensor, load: _ExchangeSpec, tokens: int, batch: int
) -> Iterator[tuple[range, list[Tensor]]]:
    """Each stretch of ranks, and their [ranks, T, B, h_i, D_i] in the buffer of an all-to-all."""
    stop = 0
    for ranks in load.rank_groups:
        width = sum(load.widths(ranks.start))
        start, stop = stop, stop + len(ranks) * tokens * batch * width
        block = buffer[start:stop].view(len(ranks), tokens, batch, width)
        yield ranks, load.split(block, ranks.start)


def _windows(x: Tensor, ranges: tuple[range, ...], ranks: range) -> Tensor:
    """[B, T, H, D] seen as [ranks, T, B, h, D]: a view. Where all have the same heads the first
    dimension is 1.
    """
    first, last = ranges[ranks.start], ranges[ranks[-1]]
    windows = x[:, :, first.start : last.stop].unflatten(2, (-1, len(first)))
    return windows.permute(2, 1, 0, 3, 4)


def _accumulate(windows: Tensor, block: Tensor, *, shared: int) -> None:
    """Write block into windows, adding to the first `shared` heads, which earlier ranks have
    written.
    """
    if len(windows) < len(block):
        block = block.sum(dim=0, keepdim=True)
    if shared:
        windows[..., :shared, :].add_(block[..., :shared, :])
        windows, block = windows[..., shared:, :], block[..., shared:, :]
    windows.copy_(block)


def _all_to_all(sent: Tensor, received: list[int], split: list[int], mesh: DeviceMesh) -> Tensor:
    return funcol.wait_tensor(funcol.all_to_all_single(sent, received, split, mesh.get_group()))
