"""Attention of pieces of a sequence: some queries against the keys of their documents so far.

A core (cores.py) attends from whole sequences to themselves. Streaming has only a part of the
queries at a time, and sinks change a result after the kernel has computed it. Both need what this
file gives: the log-sum-exp of the scores beside the output, and a backward that is given both.

With scores s_ij = scale q_i k_j over the keys j that query i sees, the log-sum-exp is L_i = log
sum_j exp(s_ij) and the output o_i = sum_j exp(s_ij - L_i) v_j. Two facts carry everything here.

 - Results over different keys merge exactly: L = log(exp(L_1) + exp(L_2)) and o = exp(L_1 - L) o_1
   + exp(L_2 - L) o_2.
 - The gradient with weights p_ij = exp(s_ij - L_i) is dv_j = sum_i p_ij do_i and ds_ij = p_ij (do_i
   v_j - do_i o_i). With the L_i and o_i of *all* keys it can be computed for any part of the keys
   alone, so the backward of a kernel is exact for a part if it is given those of the whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Pieces:
    """What a core can do with some of the queries of each document.

    q is [N, Hq, D], k [M, Hkv, D] and v [M, Hkv, Dv], where Hkv divides Hq and Dv may differ from
    D. Document j has query_lengths[j] of the N queries and key_lengths[j] >= query_lengths[j] of
    the M keys, one document after the other. Its queries stand at the places of its *last* keys:
    attention is causal, aligned at the bottom right. `window` is the number of keys that a query
    sees, including its own, and `softcap` is as in cores.py. All are given by keyword.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    """forward(q, k, v, *, query_lengths, key_lengths, scale, window=None, softcap=None) -> output
    [N, Hq, Dv] in q's dtype, and lse [Hq, N], fp32 or wider.
    """
    backward: Callable[..., Tensor]
    """backward(grad, q, k, v, output, lse, *, dk, dv, query_lengths, key_lengths, scale,
    window=None, softcap=None) -> dq [N, Hq, D] in q's dtype. It *adds* the gradients of k and v to
    dk [M, Hkv, D] and dv [M, Hkv, Dv], fp32 or wider. output and lse are those of all keys that the
    queries see, sinks included. Nothing with the size of all keys times the query heads is
    allocated.
    """


def pieces_of(core: Callable) -> Pieces | None:
    """Return what core can do with pieces, which is its attribute `pieces`.

    None for a user's own core without one.
    """
    return getattr(core, "pieces", None)


def with_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return output [N, Hq, Dv] and lse [Hq, N] as if each head had one more key, with the score
    sinks[head] and the value 0.

    The new key takes the share exp(sink) / (exp(lse) + exp(sink)) of the weights, so that o becomes
    o sigmoid(lse - sink), and lse log(exp(lse) + exp(sink)). The backward for q, k and v is the
    same as without sinks, given these two. output is changed in place, since it can be large.
    """
    sinks = sinks.to(lse.dtype)[:, None]
    output.mul_(torch.sigmoid(lse - sinks).t()[..., None])
    return output, torch.logaddexp(lse, sinks)


def sinks_gradient(grad: Tensor, output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return the gradient of sinks [Hq], given output and lse of `with_sinks` and output's gradient
    grad [N, Hq, Dv]: - sum_i exp(sink - lse_i) grad_i output_i.
    """
    gradient, wide = torch.zeros_like(sinks, dtype=lse.dtype), lse.dtype
    # By blocks of queries, so that no product has the size of the output in a wider dtype.
    for part in zip(
        grad.split(_BLOCK), output.split(_BLOCK), lse.split(_BLOCK, dim=1), strict=True
    ):
        products = (part[0].to(wide) * part[1].to(wide)).sum(dim=-1)
        weights = torch.exp(sinks.to(wide)[:, None] - part[2])
        gradient -= (weights * products.t()).sum(dim=-1)
    return gradient.to(sinks.dtype)


# --- tiles of queries and keys, for kernels that take one document and no window ------------------

_BLOCK = 2048
"""Queries of a tile, and keys of a tile that expands or packs its keys.

The backward of the CPU's flash kernel allocates dK and dV of all keys that it is given, once for
each query head, and its bf16 forward packs all keys.
"""
_SMALLEST_BLOCK = 256
"""Queries of a tile if the window is shorter; larger tiles would mostly compute hidden scores."""


class Tile(NamedTuple):
    """A part of a document's scores."""

    queries: slice
    keys: slice
    seen: str
    """"all" the scores, "causal" (as many queries as keys, the lower triangle), or "band" (what
    `_band` says). Every query sees at least one key of its tile.
    """


def _tiles(queries: int, keys: int, window: int | None, most_keys: int) -> Iterator[Tile]:
    """Cut the scores of a document into tiles of at most most_keys keys (more in a short band)."""
    offset = keys - queries
    size = _BLOCK if window is None else min(_BLOCK, max(_SMALLEST_BLOCK, window))
    for start in range(offset, keys, size):
        stop = min(keys, start + size)
        rows = slice(start - offset, stop - offset)
        # The first key that any query of the tile sees, and the first that all of them see.
        first = 0 if window is None else max(0, start - window + 1)
        shared = 0 if window is None else max(0, stop - window)
        if shared >= start and shared > first:
            yield Tile(rows, slice(first, stop), "band")
            continue
        if shared > first:
            # One key that all see is in the band, so that its last query sees one too.
            shared += 1
            yield Tile(rows, slice(first, shared), "band")
        for left in range(shared, start, most_keys):
            yield Tile(rows, slice(left, min(start, left + most_keys)), "all")
        yield Tile(rows, slice(start, stop), "causal")


def _band(tile: Tile, offset: int, window: int | None, device: torch.device) -> Tensor:
    """Return which scores of the tile are seen: bool [queries, keys].

    offset: the document's keys before its first query.
    """
    places = torch.arange(tile.queries.start, tile.queries.stop, device=device) + offset
    distance = places[:, None] - torch.arange(tile.keys.start, tile.keys.stop, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


class _Kernel(NamedTuple):
    """Attention of one tile.

    q is [Hq, queries, D] and k [Hkv, keys, D]; `seen` is "all", "causal" or the mask of a band.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    """forward(q, k, v, seen, scale, softcap) -> output [Hq, queries, Dv], lse [Hq, queries]"""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """backward(grad, q, k, v, output, lse, seen, scale, softcap) -> dq, dk, dv"""
    most_keys: Callable[[torch.dtype], int]
    """the most keys of a tile of forward"""


def _by_tiles(kernel: _Kernel) -> Pieces:
    """Return the pieces of a kernel that attends in tiles."""
    return Pieces(partial(_forward_by_tiles, kernel), partial(_backward_by_tiles, kernel))


def _forward_by_tiles(
    kernel: _Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_lengths: Lengths,
    key_lengths: Lengths,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    output = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide)
    for rows, columns in _documents(query_lengths, key_lengths):
        q_, k_, v_ = (x.transpose(0, 1) for x in (q[rows], k[columns], v[columns]))
        offset = k_.shape[1] - q_.shape[1]
        merged = _Merged(output[rows].transpose(0, 1), lse[:, rows])
        for tile in _tiles(q_.shape[1], k_.shape[1], window, kernel.most_keys(q.dtype)):
            seen = _seen(tile, offset, window, q.device)
            keys = tile.keys
            part = kernel.forward(
                q_[:, tile.queries], k_[:, keys], v_[:, keys], seen, scale, softcap
            )
            merged.add(tile.queries, *part)
        merged.end()
    return output, lse


def _backward_by_tiles(
    kernel: _Kernel,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    dk: Tensor,
    dv: Tensor,
    query_lengths: Lengths,
    key_lengths: Lengths,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    dq = torch.empty_like(q)
    for rows, columns in _documents(query_lengths, key_lengths):
        of_queries = [x[rows].transpose(0, 1) for x in (grad, q, output)]
        of_keys = [x[columns].transpose(0, 1) for x in (k, v, dk, dv)]
        total = torch.zeros(of_queries[1].shape, dtype=lse.dtype, device=q.device)
        lengths = total.shape[1], of_keys[0].shape[1]
        for tile in _tiles(*lengths, window, _BLOCK):
            seen = _seen(tile, lengths[1] - lengths[0], window, q.device)
            grad_, q_, output_ = (x[:, tile.queries] for x in of_queries)
            k_, v_, dk_, dv_ = (x[:, tile.keys] for x in of_keys)
            lse_ = lse[:, rows][:, tile.queries]
            parts = kernel.backward(grad_, q_, k_, v_, output_, lse_, seen, scale, softcap)
            for sum_, part in zip((total[:, tile.queries], dk_, dv_), parts, strict=True):
                sum_.add_(part)
        dq[rows] = total.transpose(0, 1)
    return dq


def _documents(query_lengths: Lengths, key_lengths: Lengths) -> Iterator[tuple[slice, slice]]:
    """Yield the queries and the keys of each document that has queries."""
    borders = (pairwise(accumulate(lengths, initial=0)) for lengths in (query_lengths, key_lengths))
    for rows, columns in zip(*borders, strict=True):
        if rows[0] < rows[1]:
            yield slice(*rows), slice(*columns)


def _seen(tile: Tile, offset: int, window: int | None, device: torch.device) -> str | Tensor:
    return _band(tile, offset, window, device) if tile.seen == "band" else tile.seen


class _Merged:
    """The results of a document's tiles, merged as they come.

    output [Hq, queries, Dv] and lse [Hq, queries] are written. The sum is held in lse's dtype.
    """

    def __init__(self, output: Tensor, lse: Tensor):
        self._output, self._lse = output, lse.fill_(-torch.inf)
        self._sum = (
            output if output.dtype == lse.dtype else torch.empty_like(output, dtype=lse.dtype)
        )
        self._sum.zero_()

    def add(self, queries: slice, output: Tensor, lse: Tensor) -> None:
        before, sum_ = self._lse[:, queries], self._sum[:, queries]
        total = torch.logaddexp(before, lse)
        sum_.mul_((before - total).exp_()[..., None])
        sum_.add_(output * (lse - total).exp_()[..., None])
        before.copy_(total)

    def end(self) -> None:
        if self._sum is not self._output:
            self._output.copy_(self._sum)


# --- explicit scores ------------------------------------------------------------------------------


def _mask(seen: str | Tensor, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """Return the scores that are seen as a mask, or None for all."""
    if isinstance(seen, Tensor):
        return seen
    if seen == "all":
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_()


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return the scores [group, queries, keys] of a KV head and their derivative by q k, or None
    where that is the scale.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q, k.t()).to(wide).mul_(scale)
    slope = None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        slope = (1 - scores.square()).mul_(scale)
        scores.mul_(softcap)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return scores, slope


def _explicit_forward(
    q: Tensor, k: Tensor, v: Tensor, seen: str | Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attend a KV head at a time, so that the scores of only its group are held."""
    mask = _mask(seen, q.shape[1], k.shape[1], q.device)
    outputs, sums = [], []
    for q_, k_, v_ in zip(q.unflatten(0, (len(k), -1)), k, v, strict=True):
        scores, _ = _scores(q_, k_, mask, scale, softcap)
        sums.append(scores.logsumexp(dim=-1))
        weights = scores.sub_(sums[-1][..., None]).exp_()
        outputs.append(torch.matmul(weights.to(v.dtype), v_))
    return torch.cat(outputs), torch.cat(sums)


def _explicit_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    seen: str | Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _mask(seen, q.shape[1], k.shape[1], q.device)
    dots = (grad.to(lse.dtype) * output.to(lse.dtype)).sum(dim=-1, keepdim=True)
    groups = (x.unflatten(0, (len(k), -1)) for x in (grad, q, lse[..., None], dots))
    gradients = []
    for grad_, q_, lse_, dots_, k_, v_ in zip(*groups, k, v, strict=True):
        scores, slope = _scores(q_, k_, mask, scale, softcap)
        weights = scores.sub_(lse_).exp_()
        dv = torch.einsum("gqk,gqd->kd", weights.to(v.dtype), grad_)
        dscores = torch.matmul(grad_, v_.t()).to(lse.dtype).sub_(dots_).mul_(weights)
        dscores = dscores.mul_(scale if slope is None else slope).to(q.dtype)
        dk = torch.einsum("gqk,gqd->kd", dscores, q_)
        gradients.append((torch.matmul(dscores, k_), dk, dv))
    dq, dk, dv = zip(*gradients, strict=True)
    return torch.cat(dq), torch.stack(dk), torch.stack(dv)


# --- the flash kernel of a CPU --------------------------------------------------------------------


def _cpu_options(seen: str | Tensor, scale: float, dtype: torch.dtype) -> dict:
    options: dict = {"scale": scale}
    if isinstance(seen, Tensor):
        zeros = torch.zeros(seen.shape, dtype=dtype)
        options["attn_mask"] = zeros.masked_fill_(~seen, -torch.inf)
    return options


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, seen: str | Tensor, scale: float, softcap: None
) -> tuple[Tensor, Tensor]:
    size, (q, k, v) = v.shape[-1], _one_size(q, k, v)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x[None] for x in (q, k, v)),
        0.0,
        isinstance(seen, str) and seen == "causal",
        **_cpu_options(seen, scale, q.dtype),
    )
    return output[0, ..., :size], lse.reshape(lse.shape[1:])


def _cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    seen: str | Tensor,
    scale: float,
    softcap: None,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = q.shape[-1], k.shape[-1], v.shape[-1]
    q, k, v, grad, output = _one_size(q, k, v, grad, output)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x[None] for x in (grad, q, k, v, output, lse)),
        0.0,
        isinstance(seen, str) and seen == "causal",
        **_cpu_options(seen, scale, q.dtype),
    )
    dq, dk, dv = (x[0, ..., :size] for x, size in zip(gradients, sizes, strict=True))
    return dq, dk, dv


def _one_size(*tensors: Tensor, multiple: int = 1) -> list[Tensor]:
    """Pad the last dimension with zeros to the largest one, rounded up to a multiple.

    This is exact (see `cores.with_equal_sizes`), also for an output and its gradient.
    """
    size = -(-max(x.shape[-1] for x in tensors) // multiple) * multiple
    return [x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])) for x in tensors]


def _cpu_most_keys(dtype: torch.dtype) -> int:
    return _BLOCK if dtype.itemsize < 4 else 2**31


# --- the flash kernel of CUDA ---------------------------------------------------------------------

CUDA_BLOCK = 2**16
"""Keys of a call of the backward: with grouped heads it allocates dK and dV of all keys that it is
given, once for each query head. This many keys are enough work for a whole GPU.
"""


@lru_cache(maxsize=1024)
def borders(lengths: Lengths, device: torch.device) -> Tensor:
    """Return [documents + 1] int32 on device: where each document begins, and the end.

    Cached, so that all layers of a forward share one tensor, also for each of many chunks.
    """
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def _cuda_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_lengths: Lengths,
    key_lengths: Lengths,
    scale: float,
    window: int | None = None,
    softcap: None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with the flash operators of torch: all documents in one call.

    Needs bf16 or fp16. Whichever of FlashAttention 2, 3 and 4 is active in this process computes
    it. All of them align causal attention at the bottom right, and index with 64 bits.
    """
    size, (q, k, v) = v.shape[-1], _one_size(q, k, v, multiple=8)
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v),
        *_cuda_lengths(query_lengths, key_lengths, q.device),
        0.0,
        window is None,  # is_causal; a window says so by itself
        False,
        scale=scale,
        **_cuda_window(window),
    )
    return output[..., :size], lse


def _cuda_lengths(
    query_lengths: Lengths, key_lengths: Lengths, device: torch.device
) -> tuple[Tensor, Tensor, int, int]:
    return (
        borders(query_lengths, device),
        borders(key_lengths, device),
        max(query_lengths),
        max(key_lengths),
    )


def _cuda_window(window: int | None) -> dict[str, int]:
    """Return the keys left and right of a query that it sees; -1 is all."""
    if window is None:
        return {"window_size_left": -1, "window_size_right": -1}
    return {"window_size_left": window - 1, "window_size_right": 0}


def _cuda_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    dk: Tensor,
    dv: Tensor,
    query_lengths: Lengths,
    key_lengths: Lengths,
    scale: float,
    window: int | None = None,
    softcap: None = None,
) -> Tensor:
    """The queries' own keys of all documents in one call, then blocks of each document's earlier
    keys.
    """
    documents = list(_documents(query_lengths, key_lengths))
    own = [slice(y.stop - (x.stop - x.start), y.stop) for x, y in documents]
    lengths = tuple(x.stop - x.start for x in own)
    at_own = _joined(k, own), _joined(v, own)
    parts = _cuda_own(grad, q, *at_own, output, lse, lengths=lengths, scale=scale, window=window)
    for keys, dk_, dv_ in zip(own, *(x.split(lengths) for x in parts[1:]), strict=True):
        dk[keys].add_(dk_)
        dv[keys].add_(dv_)
    earlier = [block for pair in documents for block in _earlier_blocks(*pair, window, CUDA_BLOCK)]
    if not earlier:
        return parts[0]
    dq = parts[0].to(torch.promote_types(q.dtype, torch.float32))
    for rows, keys, left in earlier:
        sizes = (rows.stop - rows.start,), (keys.stop - keys.start,)
        dq_, dk_, dv_ = _cuda_call(
            *(grad[rows], q[rows], k[keys], v[keys], output[rows], lse[:, rows].contiguous()),
            *_cuda_lengths(*sizes, q.device),
            causal=False,
            scale=scale,
            window_size_left=left,
            window_size_right=-1,
        )
        for sum_, part in ((dq[rows], dq_), (dk[keys], dk_), (dv[keys], dv_)):
            sum_.add_(part)
    return dq.to(q.dtype)


def _cuda_own(
    *tensors: Tensor, lengths: Lengths, scale: float, window: int | None
) -> tuple[Tensor, ...]:
    """Return dq, dk and dv of whole documents: of as many queries as keys."""
    return _cuda_call(
        *tensors,
        *_cuda_lengths(lengths, lengths, tensors[0].device),
        causal=window is None,
        scale=scale,
        **_cuda_window(window),
    )


def _joined(x: Tensor, parts: list[slice]) -> Tensor:
    """Return the parts of x one after the other, without a copy if they are all of it."""
    if sum(part.stop - part.start for part in parts) == len(x):
        return x
    return x[parts[0]] if len(parts) == 1 else torch.cat([x[part] for part in parts])


def _earlier_blocks(
    rows: slice, columns: slice, window: int | None, size: int
) -> Iterator[tuple[slice, slice, int]]:
    """Yield (queries, keys, window to the left, or -1) for blocks of a document's keys before its
    first query.

    The window is counted as the kernel counts it: from the place that it gives to the last of the
    queries, which is that of the block's last key. Only the queries that see a key of the block are
    in it, and they are further right by `ahead` keys in truth.
    """
    first = columns.stop - (rows.stop - rows.start)
    start = columns.start if window is None else max(columns.start, first - window + 1)
    for left in range(start, first, size):
        right = min(first, left + size)
        if window is None:
            yield rows, slice(left, right), -1
            continue
        stop = min(rows.stop, rows.start + (right - 1 + window - first))
        ahead = first + (stop - rows.start) - right
        yield slice(rows.start, stop), slice(left, right), window - 1 - ahead


def _cuda_call(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    *lengths: Any,  # what _cuda_lengths returns
    causal: bool,
    scale: float,
    **window: int,
) -> tuple[Tensor, ...]:
    sizes = q.shape[-1], k.shape[-1], v.shape[-1]
    q, k, v, grad, output = _one_size(q, k, v, grad, output, multiple=8)
    unused = torch.empty(0, device=q.device)  # the state of a dropout that is 0
    gradients = torch.ops.aten._flash_attention_backward(
        *(grad, q, k, v, output, lse),
        *lengths,
        0.0,
        causal,
        *(unused, unused),
        scale=scale,
        **window,
    )
    return tuple(x[..., :size] for x, size in zip(gradients, sizes, strict=True))


# --- the pieces of this project's cores -----------------------------------------------------------

EXPLICIT = _by_tiles(_Kernel(_explicit_forward, _explicit_backward, lambda _: _BLOCK))
"""Explicit scores, tile by tile: exact on every device, with windows and soft-caps, and slow."""
CPU_FLASH = _by_tiles(_Kernel(_cpu_forward, _cpu_backward, _cpu_most_keys))
"""The flash kernel of a CPU; no soft-cap."""
CUDA_FLASH = Pieces(_cuda_forward, _cuda_backward)
"""The flash kernels of CUDA, for bf16 and fp16; no soft-cap."""


def _best(q: Tensor, softcap: float | None) -> Pieces:
    """Return the fastest pieces for queries like q."""
    if softcap is None and q.device.type == "cpu":
        return CPU_FLASH
    if softcap is None and q.device.type == "cuda" and q.dtype.itemsize == 2:
        return CUDA_FLASH
    return EXPLICIT


@torch.no_grad()
def _best_forward(q: Tensor, *rest: Tensor, **options) -> tuple[Tensor, Tensor]:
    return _best(q, options.get("softcap")).forward(q, *rest, **options)


@torch.no_grad()
def _best_backward(grad: Tensor, q: Tensor, *rest: Tensor, **options) -> Tensor:
    return _best(q, options.get("softcap")).backward(grad, q, *rest, **options)


KERNELS = Pieces(_best_forward, _best_backward)
"""The pieces of every core of cores.py: the fastest that can do the call at hand.

Their results can be mixed with those of any exact core, since all compute the same attention.
"""


class _Attention(torch.autograd.Function):
    """Attention of whole documents to themselves: one call of `KERNELS`, and sinks around it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        lengths: Lengths,
        scale: float,
        window: int | None,
    ) -> Tensor:
        ctx.options = {"scale": scale, "window": window}
        ctx.lengths = lengths
        output, lse = KERNELS.forward(
            q, k, v, query_lengths=lengths, key_lengths=lengths, **ctx.options
        )
        if sinks is not None:
            output, lse = with_sinks(output, lse, sinks)
        ctx.save_for_backward(q, k, v, output, lse, sinks)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse, sinks = ctx.saved_tensors
        gradient = None if sinks is None else sinks_gradient(grad, output, lse, sinks)
        saved = grad, q, k, v, output, lse
        if _best(q, None) is CUDA_FLASH:
            gradients = _cuda_own(*saved, lengths=ctx.lengths, **ctx.options)
        else:
            dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
            lengths = {"query_lengths": ctx.lengths, "key_lengths": ctx.lengths}
            dq = KERNELS.backward(*saved, dk=dk, dv=dv, **lengths, **ctx.options)
            gradients = dq, dk.to(k.dtype), dv.to(v.dtype)
        return *gradients, gradient, None, None, None


def attend_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Lengths,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from whole documents to themselves: q [N, Hq, D], k [N, Hkv, D] and v [N, Hkv, Dv] ->
    [N, Hq, Dv], for documents of `lengths`, one after the other. Differentiable.
    """
    return _Attention.apply(q, k, v, sinks, lengths, scale, window)


def has_pieces(core: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give core, which must compute exact attention, the pieces of this file."""
    core.pieces = KERNELS  # type: ignore[attr-defined]
    return core
