"""Attention of pieces by tiles of queries and keys, for kernels that take one document at a time:
the flash kernel of a CPU, and explicit scores (see pieces.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from titan_ulysses.distributed.parts import visited
from titan_ulysses.ulysses.scores import PieceKernels, Scores, of_one_size

BLOCK = 2048
"""Queries of a tile, and keys of a tile that expands or packs its keys.

The backward of the CPU's flash kernel allocates dK and dV of all keys that it is given, once for
each query head, and its bf16 forward packs all keys.
"""
SMALLEST_BLOCK = 256
"""Queries of a tile if the window is shorter; larger tiles would mostly compute hidden scores."""


class Tile(NamedTuple):
    """A part of a document's scores. Every query sees at least one of its keys."""

    queries: slice
    keys: slice
    seen: Literal["all", "causal", "band"]
    """all the scores; of as many queries as keys, the lower triangle; what the window leaves"""
    first: int
    """the place of the first query among the document's keys"""
    scores: Scores

    def mask(self, device: torch.device) -> Tensor | None:
        """Return which scores are seen: bool [queries, keys]; None: all."""
        if self.seen == "all":
            return None
        count = self.queries.stop - self.queries.start
        if self.seen == "causal":
            return torch.ones(count, count, dtype=torch.bool, device=device).tril_()
        places = torch.arange(self.first, self.first + count, device=device)
        distance = places[:, None] - torch.arange(self.keys.start, self.keys.stop, device=device)
        return (distance >= 0) & (distance < self.scores.window)


def _tiles(queries: int, keys: int, scores: Scores, most_keys: int) -> Iterator[Tile]:
    """Cut the scores of a document into tiles of at most most_keys keys (more in a short band)."""
    window, offset = scores.window, keys - queries + scores.ahead
    size = BLOCK if window is None else min(BLOCK, max(SMALLEST_BLOCK, window))
    for start in range(offset, offset + queries, size):
        stop = min(offset + queries, start + size)
        rows = slice(start - offset, stop - offset)
        tile = partial(Tile, rows, first=start, scores=scores)
        # The first key that any query of the tile sees, and the first that all of them see.
        first = 0 if window is None else max(0, start - window + 1)
        shared = 0 if window is None else max(0, stop - window)
        if shared >= start and shared > first:
            yield tile(slice(first, stop), "band")
            continue
        if shared > first:
            # One key that all see is in the band, so that its last query sees one too.
            shared += 1
            yield tile(slice(first, shared), "band")
        end = min(start, keys)
        for left in visited([*range(shared, end, most_keys)]):
            yield tile(slice(left, min(end, left + most_keys)), "all")
        if not scores.ahead:
            yield tile(slice(start, stop), "causal")


class _TileKernel(NamedTuple):
    """Attention of one tile: q is its [Hq, queries, D] and k its [Hkv, keys, D]."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    """forward(q, k, v, tile) -> output [Hq, queries, Dv], lse [Hq, queries]"""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """backward(grad, q, k, v, output, lse, tile) -> dq, dk, dv"""
    most_keys: Callable[[torch.dtype], int]
    """the most keys of a tile of forward"""


def _by_tiles(kernel: _TileKernel) -> PieceKernels:
    """Return the pieces of a kernel that attends in tiles."""
    return PieceKernels(partial(_forward_by_tiles, kernel), partial(_backward_by_tiles, kernel))


def _forward_by_tiles(
    kernel: _TileKernel, q: Tensor, k: Tensor, v: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    output = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide)
    for rows, columns in scores.documents():
        q_, k_, v_ = (x.transpose(0, 1) for x in (q[rows], k[columns], v[columns]))
        merged = Merged(output[rows].transpose(0, 1), lse[:, rows])
        for tile in _tiles(q_.shape[1], k_.shape[1], scores, kernel.most_keys(q.dtype)):
            part = kernel.forward(q_[:, tile.queries], k_[:, tile.keys], v_[:, tile.keys], tile)
            merged.add(tile.queries, *part)
        merged.end()
    return output, lse


def _backward_by_tiles(
    kernel: _TileKernel,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    scores: Scores,
    *,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    dq = torch.empty_like(q)
    for rows, columns in scores.documents():
        of_queries = [x[rows].transpose(0, 1) for x in (grad, q, output)]
        of_keys = [x[columns].transpose(0, 1) for x in (k, v, dk, dv)]
        total = torch.zeros(of_queries[1].shape, dtype=lse.dtype, device=q.device)
        for tile in _tiles(total.shape[1], of_keys[0].shape[1], scores, BLOCK):
            grad_, q_, output_ = (x[:, tile.queries] for x in of_queries)
            k_, v_, dk_, dv_ = (x[:, tile.keys] for x in of_keys)
            lse_ = lse[:, rows][:, tile.queries]
            parts = kernel.backward(grad_, q_, k_, v_, output_, lse_, tile)
            for sum_, part in zip((total[:, tile.queries], dk_, dv_), parts, strict=True):
                sum_.add_(part)
        dq[rows] = total.transpose(0, 1)
    return dq


class Merged:
    """Results of queries with different keys, merged as they come.

    output [Hq, queries, Dv] and lse [Hq, queries] are written. The sum is held in lse's dtype.
    """

    def __init__(self, output: Tensor, lse: Tensor):
        self._output, self._lse = output, lse.fill_(-torch.inf)
        self._sum = (
            output if output.dtype == lse.dtype else torch.empty_like(output, dtype=lse.dtype)
        )
        self._sum.zero_()

    def add(self, queries: slice, output: Tensor, lse: Tensor) -> None:
        before, sum_ = (x.narrow(1, queries.start, lse.shape[1]) for x in (self._lse, self._sum))
        total = torch.logaddexp(before, lse)
        # Queries that have seen no key yet have a sum of -inf; what is subtracted must be finite.
        finite = total.clamp(min=torch.finfo(total.dtype).min)
        sum_.mul_((before - finite).exp_().unsqueeze(-1))
        sum_.add_(output * (lse - finite).exp_().unsqueeze(-1))
        before.copy_(total)

    def end(self) -> None:
        if self._sum is not self._output:
            self._output.copy_(self._sum)


# --- explicit scores ------------------------------------------------------------------------------


def _explicit_scores(
    q: Tensor, k: Tensor, mask: Tensor | None, how: Scores
) -> tuple[Tensor, Tensor | None]:
    """Return the scores [group, queries, keys] of a KV head and their derivative by q k, or None
    where that is the scale.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q, k.t()).to(wide).mul_(how.scale)
    slope = None
    if how.softcap is not None:
        scores = scores.div_(how.softcap).tanh_()
        slope = (1 - scores.square()).mul_(how.scale)
        scores.mul_(how.softcap)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return scores, slope


def _explicit_forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Attend a KV head at a time, so that the scores of only its group are held."""
    mask = tile.mask(q.device)
    outputs, sums = [], []
    for q_, k_, v_ in zip(q.unflatten(0, (len(k), -1)), k, v, strict=True):
        scores, _ = _explicit_scores(q_, k_, mask, tile.scores)
        sums.append(scores.logsumexp(dim=-1))
        weights = scores.sub_(sums[-1][..., None]).exp_()
        outputs.append(torch.matmul(weights.to(v.dtype), v_))
    return torch.cat(outputs), torch.cat(sums)


def _explicit_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    mask = tile.mask(q.device)
    dots = (grad.to(lse.dtype) * output.to(lse.dtype)).sum(dim=-1, keepdim=True)
    groups = (x.unflatten(0, (len(k), -1)) for x in (grad, q, lse[..., None], dots))
    gradients = []
    for grad_, q_, lse_, dots_, k_, v_ in zip(*groups, k, v, strict=True):
        scores, slope = _explicit_scores(q_, k_, mask, tile.scores)
        weights = scores.sub_(lse_).exp_()
        dv = torch.einsum("gqk,gqd->kd", weights.to(v.dtype), grad_)
        dscores = torch.matmul(grad_, v_.t()).to(lse.dtype).sub_(dots_).mul_(weights)
        dscores = dscores.mul_(tile.scores.scale if slope is None else slope).to(q.dtype)
        dk = torch.einsum("gqk,gqd->kd", dscores, q_)
        gradients.append((torch.matmul(dscores, k_), dk, dv))
    dq, dk, dv = zip(*gradients, strict=True)
    return torch.cat(dq), torch.stack(dk), torch.stack(dv)


# --- the flash kernel of a CPU --------------------------------------------------------------------


def _cpu_options(tile: Tile, like: Tensor) -> dict[str, Any]:
    """Return how the kernel is told of a tile: it adds attn_mask to the scores."""
    options = {"dropout_p": 0.0, "is_causal": tile.seen == "causal", "scale": tile.scores.scale}
    if tile.seen == "band":
        seen = tile.mask(like.device)
        assert seen is not None
        options["attn_mask"] = like.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    return options


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    size, (q, k, v) = v.shape[-1], of_one_size(q, k, v)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x[None] for x in (q, k, v)), **_cpu_options(tile, q)
    )
    return output[0, ..., :size], lse.reshape(lse.shape[1:])


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = q.shape[-1], k.shape[-1], v.shape[-1]
    q, k, v, grad, output = of_one_size(q, k, v, grad, output)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x[None] for x in (grad, q, k, v, output, lse)), **_cpu_options(tile, q)
    )
    dq, dk, dv = (x[0, ..., :size] for x, size in zip(gradients, sizes, strict=True))
    return dq, dk, dv


def _cpu_most_keys(dtype: torch.dtype) -> int:
    return BLOCK if dtype.itemsize < 4 else 2**31


# --- the pieces -----------------------------------------------------------------------------------

EXPLICIT = _by_tiles(_TileKernel(_explicit_forward, _explicit_backward, lambda _: BLOCK))
"""Explicit scores, tile by tile: exact on every device, with windows and soft-caps, and slow."""
CPU_FLASH = _by_tiles(_TileKernel(_cpu_forward, _cpu_backward, _cpu_most_keys))
"""The flash kernel of a CPU; no soft-cap."""
