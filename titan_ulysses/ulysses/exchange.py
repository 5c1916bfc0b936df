"""The exchange of Ulysses: from all heads of this rank's tokens to this rank's heads of all tokens,
and back.

One all-to-all carries q, k and v to the ranks of the heads, and a second one carries the output
back. The backward of each is an all-to-all in the opposite direction. For B rows, S tokens (of the
sequence, or of a chunk of it), T = S/P tokens per rank, H heads in total and head size D (in latent
attention the size Dv of v and the output differs from the size D of q and k):

    this rank's tokens    [B, T, H, D], placed `Shard(1)` of [B, S, H, D]
    this rank's heads     local tensors, which the `HeadPlan` describes: k and v [B, S, hkv_p, D],
                          and of the queries a tensor [B, n, h, D] for each part of the plan

Where activations live is a DTensor's placement on the side of the tokens, whatever the heads. On
the side of the heads a DTensor can describe even plans only, as `Shard(2)`, and there the exchange
moves what `redistribute(Shard(1) -> Shard(2))` moves (tests/test_ulysses.py compares them). A KV
head on several ranks, 9 heads on 4 ranks or half of the queries of a head have no placement.

The block that rank r sends to rank p is [T, B, x_rp], token first. The x_rp elements of a token are
those of all its heads of q, then of k, then of v that p gets. The blocks received from ranks 0..P-1
therefore form the whole sequence [S, B, x_p] (of each part of the plan), and q, k and v are views
of it; k and v of several parts are joined by one copy. On the way to heads, sending costs one copy
of the data and receiving costs none. On the way back, receiving costs one copy. Sending the output
costs no copy if its memory is laid out as [S, B, h, D], which at B = 1 includes [B, S, h, D].
Sending the gradients of q, k and v costs one copy, which packs them together. Copies between
[B, T, H, D] and the blocks of all ranks are strided, one per tensor for all equivalent ranks
(`HeadPlan.rank_groups`) instead of one per rank: three for q, k and v if P divides Hkv.

Bytes that rank r sends to other ranks, where rank p has hq_rp query heads of r's tokens and hkv_p
KV heads, with x_rp = D * (hq_rp + hkv_p) + Dv * hkv_p for q, k and v, or Dv * hq_rp for the output:

    tokens to heads    B * T * itemsize * (sum_p x_rp - x_rr)
    heads to tokens    B * T * itemsize * (sum_p x_pr - x_rr)

Forward carries q, k and v to heads and the output back. Backward carries the gradient of the
output to heads and the gradients of q, k and v back. With an even plan q, k and v cost
(P - 1)/P * B * T * (D * (Hq + Hkv) + Dv * Hkv) * itemsize in either direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from titan_ulysses.ulysses.heads import HeadPlan, Part

SEQUENCE = Shard(1)


def sequence_to_heads(
    q: DTensor,
    k: DTensor,
    v: DTensor,
    plan: HeadPlan,
    *,
    known: Sequence[Tensor] | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Send the queries, keys and values of all tokens to the ranks of their heads, in one
    all-to-all.

    q is [B, S, Hq, D], k [B, S, Hkv, D] and v [B, S, Hkv, Dv], all placed `Shard(1)` on a 1-D mesh
    of P ranks. Returns this rank's queries, [B, n, h, D] for each part of the plan, its keys
    [B, S, hkv, D] and its values [B, S, hkv, Dv]. ValueError for any other placement.

    known: this rank's keys and values, if it has them already. They are returned, and only the
    queries travel; the gradients of all three travel back.
    """
    _expect_sequence(q=q, k=k, v=v)
    load = _Load(plan, "qkv", tuple(x.shape[3] for x in (q, k, v)))
    local = (x.to_local() for x in (q, k, v))
    *queries, keys, values = _SequenceToHeads.apply(q.device_mesh, load, known, *local)
    return tuple(queries), keys, values


@torch.no_grad()
def keys_to_heads(k: DTensor, v: DTensor, plan: HeadPlan) -> tuple[Tensor, Tensor]:
    """Send keys and values alone, as `sequence_to_heads` does. They have no gradients."""
    _expect_sequence(k=k, v=v)
    load = _Load(plan, "kv", (k.shape[3], v.shape[3]))
    keys, values = _scatter_heads((k.to_local(), v.to_local()), load, k.device_mesh)
    return keys, values


def heads_to_sequence(outputs: Sequence[Tensor], plan: HeadPlan, mesh: DeviceMesh) -> DTensor:
    """Send the output of attention back to the ranks of its tokens, in one all-to-all.

    outputs: [B, n, h, Dv] for each part of this rank's queries. Returns [B, S, Hq, Dv] placed
    `Shard(1)`.
    """
    load = _Load(plan, "q", (outputs[0].shape[3],))
    (local,) = _HeadsToSequence.apply(mesh, load, *outputs)
    return DTensor.from_local(local, mesh, (SEQUENCE,), run_check=False)


def send_to_heads(
    tensors: Sequence[Tensor], of_keys: Sequence[bool], plan: HeadPlan, mesh: DeviceMesh
) -> tuple[Tensor, ...]:
    """Send any number of local tensors [B, T, H_i, D_i] of one dtype, in one all-to-all.

    of_keys says which of them have key-value heads; the others have query heads. plan must be one
    of whole heads. Returns the local tensors [B, S, h_i, D_i] with the heads that it gives this
    rank.
    """
    load = _Load(plan, "".join("qk"[x] for x in of_keys), tuple(x.shape[3] for x in tensors))
    return _SequenceToHeads.apply(mesh, load, None, *tensors)


def send_to_sequence(output: Tensor, plan: HeadPlan, mesh: DeviceMesh) -> Tensor:
    """Send a local tensor [B, S, h_p, D] of query heads back: -> [B, T, Hq, D]."""
    load = _Load(plan, "q", (output.shape[3],))
    (local,) = _HeadsToSequence.apply(mesh, load, output)
    return local


def _expect_sequence(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        found = tensor.placements if isinstance(tensor, DTensor) else "no placement"
        if found != (SEQUENCE,):
            raise ValueError(
                f"{name} must be placed ({SEQUENCE},) on the sequence-parallel mesh, but has "
                f"{found}"
            )


class _Load(NamedTuple):
    """What one all-to-all carries: tensors that have the heads of q, k or v, q first."""

    plan: HeadPlan
    tensors: str
    """"q", "k" or "v" for each tensor. The output has the heads of q."""
    sizes: tuple[int, ...]
    """The head size of each tensor."""

    def widths(self, rank: int, part: Part) -> list[int]:
        """Return, for each tensor, the elements of a token that rank gets, in a part of `parts`."""
        keys = len(self.plan.key_value[rank])
        heads = (len(part.heads) if tensor == "q" else keys for tensor in self.tensors)
        return [number * size for number, size in zip(heads, self.sizes, strict=True)]

    def parts(self, rank: int) -> tuple[Part, ...]:
        """Return the parts of what rank has: the tokens of a part have equally many heads."""
        whole = (Part(range(self.plan.degree), range(0)),)
        return self.plan.parts[rank] if "q" in self.tensors else whole

    def views(self, flat: Tensor, rank: int, tokens: int, batch: int) -> list[list[Tensor]]:
        """View what rank has, as it lies on the wire, as [n, B, h, D] for each part and tensor.

        tokens, batch: T and B.
        """
        views, stop = [], 0
        for part in self.parts(rank):
            widths, n = self.widths(rank, part), len(part.sources) * tokens
            start, stop = stop, stop + n * batch * sum(widths)
            views.append(self.split(flat[start:stop].view(n, batch, sum(widths)), widths))
        return views

    def split(self, block: Tensor, widths: list[int]) -> list[Tensor]:
        """Split a block [..., x] into views [..., h_i, D_i], one per tensor."""
        parts = zip(block.split(widths, dim=-1), self.sizes, strict=True)
        return [part.unflatten(-1, (part.shape[-1] // size, size)) for part, size in parts]


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, mesh: DeviceMesh, load: _Load, known: tuple[Tensor, Tensor] | None, *tensors: Tensor
    ):
        ctx.mesh, ctx.load = mesh, load
        if known is None:
            return _scatter_heads(tensors, load, mesh)
        queries = _Load(load.plan, "q", load.sizes[:1])
        return *_scatter_heads(tensors[:1], queries, mesh), *known

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, None, None, *_gather_heads(grads, ctx.load, ctx.mesh)


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mesh: DeviceMesh, load: _Load, *outputs: Tensor):
        ctx.mesh, ctx.load = mesh, load
        return _gather_heads(outputs, load, mesh)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, *_scatter_heads((grad,), ctx.load, ctx.mesh)


def _scatter_heads(tensors: Sequence[Tensor], load: _Load, mesh: DeviceMesh) -> tuple[Tensor, ...]:
    """Exchange tensors [B, T, H_i, D_i] to [B, n, h, D] for each part of q and [B, S, h_i, D_i] of
    the others.
    """
    rank = mesh.get_local_rank()
    batch, tokens = tensors[0].shape[:2]
    sent_sizes, received_sizes = _wire_sizes(load, rank, batch * tokens)
    sent = tensors[0].new_empty(sum(sent_sizes))
    for windows, places, _ in _copies(tensors, sent, load, rank):
        places.copy_(windows[:, None])
    received = _all_to_all(sent, received_sizes, sent_sizes, mesh)
    # The queries of each part, and the keys and values of all parts [S, B, h, D].
    parts = load.views(received, rank, tokens, batch)
    queries = [part[0] for part in parts] if load.tensors[0] == "q" else []
    others = [*zip(*parts, strict=True)][bool(queries) :]
    views = [*queries, *(x[0] if len(x) == 1 else torch.cat(x) for x in others)]
    return tuple(x.transpose(0, 1) for x in views)


def _gather_heads(tensors: Sequence[Tensor], load: _Load, mesh: DeviceMesh) -> tuple[Tensor, ...]:
    """Do the reverse of `_scatter_heads`, summing a head of several ranks.

    Only KV heads can belong to several ranks; what is summed are their gradients.
    """
    rank, degree = mesh.get_local_rank(), mesh.size()
    batch = tensors[0].shape[0]
    tokens = sum(x.shape[1] for x in tensors[: len(load.parts(rank))]) // degree
    received_sizes, sent_sizes = _wire_sizes(load, rank, batch * tokens)
    sent = _packed(tensors, load, rank, tokens, batch, sum(sent_sizes))
    received = _all_to_all(sent, received_sizes, sent_sizes, mesh)
    # The heads that all ranks have together of each tensor.
    heads = [of_ranks[-1].stop for of_ranks in load.plan.heads_of(load.tensors, 0)]
    shapes = zip(heads, load.sizes, strict=True)
    gathered = [tensors[0].new_empty(batch, tokens, *shape) for shape in shapes]
    for windows, places, shared in _copies(gathered, received, load, rank):
        _accumulate(windows, places, shared=shared)
    return tuple(gathered)


def _wire_sizes(load: _Load, rank: int, tokens: int) -> tuple[list[int], list[int]]:
    """Return the elements that rank sends to each rank on the way to heads, and those it receives.

    tokens: B * T.
    """
    ranks = range(load.plan.degree)
    to_ranks = zip(*load.plan.heads_of(load.tensors, rank), strict=True)
    sent = [
        tokens * sum(len(x) * size for x, size in zip(heads, load.sizes, strict=True))
        for heads in to_ranks
    ]
    received = [0] * len(ranks)
    for part in load.parts(rank):
        width = tokens * sum(load.widths(rank, part))
        received[part.sources.start : part.sources.stop] = [width] * len(part.sources)
    return sent, received


def _packed(
    tensors: Sequence[Tensor], load: _Load, rank: int, tokens: int, batch: int, size: int
) -> Tensor:
    """Pack what a rank has into a flat tensor, as it goes on the wire.

    A single tensor whose memory already has this layout is not copied.
    """
    views = [x.transpose(0, 1) for x in tensors]
    if len(views) == 1:
        return views[0].contiguous().view(-1)
    packed, start = tensors[0].new_empty(size), 0
    parts = load.views(packed, rank, tokens, batch)
    queries, others = views[: len(parts)], views[len(parts) :]
    for query, part in zip(queries, parts, strict=True):
        stop = start + len(query)
        for place, x in zip(part, (query, *(x[start:stop] for x in others)), strict=True):
            place.copy_(x)
        start = stop
    return packed


def _copies(
    tensors: Sequence[Tensor], buffer: Tensor, load: _Load, source: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield the copies between source's tensors [B, T, H_i, D_i] and the buffer of what it sends to
    heads: of each tensor, what the equivalent ranks of a group have of it.

    That is the windows [w, T, B, h, D] of the tensor, their places [w, ranks, T, B, h, D] in the
    buffer, and how many of the first heads of a window are in windows before as well.
    """
    batch, tokens = tensors[0].shape[:2]
    heads, stop = load.plan.heads_of(load.tensors, source), 0
    for group in load.plan.rank_groups(load.tensors, source):
        cycle, cycles = group.ranks[: group.period], len(group.ranks) // group.period
        widths = [
            [len(x[rank]) * size for x, size in zip(heads, load.sizes, strict=True)]
            for rank in cycle
        ]
        sizes = [tokens * batch * sum(of_rank) for of_rank in widths]
        start, stop = stop, stop + cycles * sum(sizes)
        blocks = buffer[start:stop].view(cycles, sum(sizes)).split(sizes, dim=1)
        for rank, block, of_rank in zip(cycle, blocks, widths, strict=True):
            of_tensors = load.split(block.unflatten(1, (tokens, batch, sum(of_rank))), of_rank)
            for x, ranges, places in zip(tensors, heads, of_tensors, strict=True):
                if places.numel():
                    windows = _windows(x, ranges[rank], *group.windows(ranges))
                    filled = ranges[rank - 1].stop if rank else 0
                    shared = max(0, filled - ranges[rank].start)
                    yield windows, places.unflatten(0, (len(windows), -1)), shared


def _windows(x: Tensor, heads: range, first: range, count: int) -> Tensor:
    """View x [B, T, H, D] as [count, T, B, h, D]: some heads of the first window, and the same of
    those that follow it.
    """
    windows = x.narrow(2, first.start, count * len(first)).unflatten(2, (count, len(first)))
    if heads != first:
        windows = windows.narrow(3, heads.start - first.start, len(heads))
    return windows.permute(2, 1, 0, 3, 4)


def _accumulate(windows: Tensor, places: Tensor, *, shared: int) -> None:
    """Write places into windows, but add to their first `shared` heads, filled before.

    What several ranks have for a window is summed.
    """
    values = places.sum(dim=1) if places.shape[1] > 1 else places.select(1, 0)
    if shared:
        windows[..., :shared, :].add_(values[..., :shared, :])
        windows, values = windows[..., shared:, :], values[..., shared:, :]
    if values.numel():
        windows.copy_(values)


def _all_to_all(sent: Tensor, received: list[int], split: list[int], mesh: DeviceMesh) -> Tensor:
    return funcol.wait_tensor(funcol.all_to_all_single(sent, received, split, mesh.get_group()))
