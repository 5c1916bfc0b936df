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

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from titan_ulysses.ulysses.flash_cuda import CUDA_FLASH, flash_gradients
from titan_ulysses.ulysses.scores import PieceKernels, Scores
from titan_ulysses.ulysses.sparse import CHOSEN
from titan_ulysses.ulysses.tiles import BLOCK, CPU_FLASH, EXPLICIT


def pieces_of(core: Callable) -> PieceKernels | None:
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
    for part in zip(grad.split(BLOCK), output.split(BLOCK), lse.split(BLOCK, dim=1), strict=True):
        products = (part[0].to(wide) * part[1].to(wide)).sum(dim=-1)
        weights = torch.exp(sinks.to(wide)[:, None] - part[2])
        gradient -= (weights * products.t()).sum(dim=-1)
    return gradient.to(sinks.dtype)


# --- the pieces of this project's cores -----------------------------------------------------------


def _best(q: Tensor, scores: Scores) -> PieceKernels:
    """Return the fastest pieces for queries like q."""
    if scores.chosen is not None:
        return CHOSEN
    if scores.softcap is None and q.device.type == "cpu":
        return CPU_FLASH
    if scores.softcap is None and q.device.type == "cuda" and q.dtype.itemsize == 2:
        return CUDA_FLASH
    return EXPLICIT


@torch.no_grad()
def _best_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    return _best(q, scores).forward(q, k, v, scores)


@torch.no_grad()
def _best_backward(grad: Tensor, q: Tensor, *rest: Any, **sums: Tensor) -> Tensor:
    scores: Scores = rest[-1]
    return _best(q, scores).backward(grad, q, *rest, **sums)


KERNELS = PieceKernels(_best_forward, _best_backward)
"""The pieces of every core of cores.py: the fastest one that supports the call.

Their results can be mixed with those of any exact core, since all compute the same attention.
"""


class _WholeAttention(torch.autograd.Function):
    """Attention of whole documents to themselves: one call of `KERNELS`, and sinks around it."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores
    ) -> Tensor:
        output, lse = KERNELS.forward(q, k, v, scores)
        if sinks is not None:
            output, lse = with_sinks(output, lse, sinks)
        ctx.scores = replace(scores, chosen=None)  # saved tensors are released after backward
        ctx.save_for_backward(q, k, v, output, lse, sinks, scores.chosen)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse, sinks, chosen = ctx.saved_tensors
        gradient = None if sinks is None else sinks_gradient(grad, output, lse, sinks)
        saved = grad, q, k, v, output, lse, replace(ctx.scores, chosen=chosen)
        if _best(q, saved[-1]) is CUDA_FLASH:
            gradients = flash_gradients(*saved)
        else:
            dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
            dq = KERNELS.backward(*saved, dk=dk, dv=dv)
            gradients = dq, dk.to(k.dtype), dv.to(v.dtype)
        return *gradients, gradient, None


def attend_documents(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores
) -> Tensor:
    """Attend from whole documents to themselves, those of all rows in one call: q [B, S, Hq, D],
    k [B, S, Hkv, D] and v [B, S, Hkv, Dv] -> [B, S, Hq, Dv]. Differentiable.
    """
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return _WholeAttention.apply(*flat, sinks, scores).unflatten(0, q.shape[:2])
