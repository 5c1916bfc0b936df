"""The exchange of Ulysses: sequence-sharded with all heads <-> head-sharded with all tokens.

One all-to-all carries q, k and v to the ranks of the heads, and a second one carries the output
back. The backward of each is an all-to-all in the opposite direction. Layouts, for B rows, S tokens
in total, T = S/P tokens per rank, H heads in total, h_p heads on rank p and head size D (in latent
attention the size Dv of v and the output differs from the size Dq of q and k):

    sequence-sharded  [B, T, H, D]    placed Shard(1) of [B, S, H, D]
    head-sharded      [B, S, h, D]    placed Shard(2) of [B, S, H, D] if the plan is even

The block sent to rank p is [T, B, x_p], token first. The x_p elements of a token are those of all
its heads of q, then of k, then of v. The blocks received from ranks 0..P-1 therefore form the whole
sequence [S, B, x], and q, k and v are views of it. On the way to heads, sending costs one copy of
the data and receiving costs none. On the way back, receiving costs one copy. Sending the output
costs no copy if its memory is laid out as [S, B, h, D], which at B = 1 includes [B, S, h, D].
Sending the gradients of q, k and v costs one copy, which packs them together. Copies between
[B, T, H, D] and the blocks of all ranks are strided, one per tensor and rank group
(`HeadPlan.rank_groups`) instead of one per rank: three for q, k and v if P divides Hkv.

Bytes that rank r sends to other ranks, with x_p = Dq * (hq_p + hkv_p) + Dv * hkv_p for q, k and v,
or Dv * hq_p for the output:

    sequence to heads    B * T * itemsize * (sum_p x_p - x_r)
    heads to sequence    B * T * itemsize * (P - 1) * x_r

Forward carries q, k and v to heads and the output back. Backward carries the gradient of the
output to heads and the gradients of q, k and v back. With an even plan q, k and v cost
(P - 1)/P * B * T * (Dq * (Hq + Hkv) + Dv * Hkv) * itemsize in either direction.
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
    """Which heads of which tensors one all-to-all carries."""

    ranges: tuple[tuple[range, ...], ...]
    """`ranges[i][p]`: the heads of the i-th tensor that belong to rank p."""
    rank_groups: tuple[range, ...]
    """Groups of ranks that one copy per tensor serves, see `HeadPlan.rank_groups`."""
    sizes: tuple[int, ...]
    """The head size of each tensor."""

    def widths(self, rank: int) -> list[int]:
        """Return, for each tensor, the elements per token that belong to rank: heads times size."""
        pairs = zip(self.ranges, self.sizes, strict=True)
        return [len(ranges[rank]) * size for ranges, size in pairs]

    def split(self, block: Tensor, rank: int) -> list[Tensor]:
        """Split a block [..., x] of rank into views [..., h_i, D_i], one per tensor."""
        parts = zip(block.split(self.widths(rank), dim=-1), self.sizes, strict=True)
        return [part.unflatten(-1, (part.shape[-1] // size, size)) for part, size in parts]


def sequence_to_heads(
    q: DTensor, k: DTensor, v: DTensor, plan: HeadPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Send the whole sequence of each head to the rank of that head, in one all-to-all.

    q is [B, S, Hq, Dq], k [B, S, Hkv, Dq] and v [B, S, Hkv, Dv], all placed `Shard(1)` on a 1-D
    mesh of P ranks. Returns [B, S, heads, D] placed `Shard(2)` if the plan is even. Otherwise
    returns the local tensors [B, S, h_p, D] with the heads that the plan gives this rank.
    ValueError for any other placement.
    """
    _expect(SEQUENCE, q=q, k=k, v=v)
    mesh = q.device_mesh
    local = send_to_heads([x.to_local() for x in (q, k, v)], (False, True, True), plan, mesh)
    return tuple(_placed(x, mesh) for x in local) if plan.is_even else local


def heads_to_sequence(output: Tensor, plan: HeadPlan, mesh: DeviceMesh) -> DTensor:
    """Send the output of attention back to the rank of each token, in one all-to-all.

    output is [B, S, Hq, D] placed `Shard(2)` if the plan is even, and otherwise the local tensor
    [B, S, h_p, D]. Returns [B, S, Hq, D] placed `Shard(1)`. ValueError for any other placement.
    """
    if plan.is_even:
        _expect(HEADS, output=output)
        output = output.to_local()
    elif isinstance(output, DTensor):
        raise ValueError(
            f"output must be a local tensor under an uneven plan, but has {output.placements}"
        )
    local = send_to_sequence(output, plan, mesh)
    return DTensor.from_local(local, mesh, (SEQUENCE,), run_check=False)


def send_to_heads(
    tensors: Sequence[Tensor], of_keys: Sequence[bool], plan: HeadPlan, mesh: DeviceMesh
) -> tuple[Tensor, ...]:
    """Send any number of local tensors [B, T, H_i, D_i] of one dtype, in one all-to-all.

    of_keys says which of them have key-value heads; the others have query heads. Returns the local
    tensors [B, S, h_i, D_i] with the heads that the plan gives this rank.
    """
    ranges = tuple(plan.key_value if keys else plan.query for keys in of_keys)
    load = _ExchangeSpec(ranges, plan.rank_groups, tuple(x.shape[3] for x in tensors))
    return _SequenceToHeads.apply(mesh, load, *tensors)


def send_to_sequence(output: Tensor, plan: HeadPlan, mesh: DeviceMesh) -> Tensor:
    """Send a local tensor [B, S, h_p, D] of query heads back: -> [B, T, Hq, D]."""
    load = _ExchangeSpec((plan.query,), plan.query_rank_groups, (output.shape[3],))
    (local,) = _HeadsToSequence.apply(mesh, load, output)
    return local


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
    """Exchange tensors [B, T, H_i, D_i] to [B, S, h_i, D_i], which are views of one buffer."""
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
    """Exchange tensors [B, S, h_i, D_i] to [B, T, H_i, D_i], summing a head of several ranks.

    Only KV heads can belong to several ranks; what is summed are their gradients.
    """
    rank, degree = mesh.get_local_rank(), mesh.size()
    batch, sequence = tensors[0].shape[:2]
    tokens = sequence // degree
    split = [batch * tokens * sum(load.widths(p)) for p in range(degree)]
    received = _all_to_all(
        _pack_token_first(tensors, load, rank), split, [split[rank]] * degree, mesh
    )
    shapes = [(r[-1].stop, size) for r, size in zip(load.ranges, load.sizes, strict=True)]
    gathered = [tensors[0].new_empty(batch, tokens, *shape) for shape in shapes]
    for ranks, blocks in _blocks(received, load, tokens, batch):
        for block, whole, ranges in zip(blocks, gathered, load.ranges, strict=True):
            # Heads before `filled` hold the values of earlier rank groups already.
            filled = ranges[ranks.start - 1].stop if ranks.start else 0
            _accumulate(
                _windows(whole, ranges, ranks), block, shared=filled - ranges[ranks.start].start
            )
    return tuple(gathered)


def _pack_token_first(tensors: Sequence[Tensor], load: _ExchangeSpec, rank: int) -> Tensor:
    """Pack tensors [B, S, h_i, D_i] into a flat [S, B, x].

    A single tensor whose memory already has this layout is not copied.
    """
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
    """Yield each rank group with its views [ranks, T, B, h_i, D_i] of an all-to-all's buffer."""
    stop = 0
    for ranks in load.rank_groups:
        width = sum(load.widths(ranks.start))
        start, stop = stop, stop + len(ranks) * tokens * batch * width
        block = buffer[start:stop].view(len(ranks), tokens, batch, width)
        yield ranks, load.split(block, ranks.start)


def _windows(x: Tensor, ranges: tuple[range, ...], ranks: range) -> Tensor:
    """View x [B, T, H, D] as [ranks, T, B, h, D], the heads of each rank of a group.

    If all ranks of the group have the same heads, the first dimension is 1.
    """
    first, last = ranges[ranks.start], ranges[ranks[-1]]
    windows = x[:, :, first.start : last.stop].unflatten(2, (-1, len(first)))
    return windows.permute(2, 1, 0, 3, 4)


def _accumulate(windows: Tensor, block: Tensor, *, shared: int) -> None:
    """Write block into windows, but add it to their first `shared` heads, filled before."""
    # All ranks of the group have the same heads, so what they send is summed.
    if len(windows) < len(block):
        block = block.sum(dim=0, keepdim=True)
    if shared:
        windows[..., :shared, :].add_(block[..., :shared, :])
        windows, block = windows[..., shared:, :], block[..., shared:, :]
    windows.copy_(block)


def _all_to_all(sent: Tensor, received: list[int], split: list[int], mesh: DeviceMesh) -> Tensor:
    return funcol.wait_tensor(funcol.all_to_all_single(sent, received, split, mesh.get_group()))
