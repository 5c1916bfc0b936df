"""Replacements for the kernels of layers that carry a state, for simulation on a CPU.

They allocate what the CUDA kernels allocate, in their order, and have their matrix products. What
the kernels are known to hold is from the sources of flash-linear-attention
(fla/ops/gated_delta_rule/chunk.py), mamba-ssm (mamba_ssm/ops/triton/ssd_combined.py) and
causal-conv1d. No figure was fitted to a run, and their time is taken to be that of matrix products,
which is optimistic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CHUNK = 64
"""Tokens of a chunk of fla's kernel."""


def _product(batch: int, rows: int, inner: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return a batch of matrix products [batch, rows, columns], whose factors take no memory."""
    one = torch.empty(1, 1, 1, dtype=dtype)
    return torch.bmm(one.expand(batch, rows, inner), one.expand(batch, inner, columns))


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """Stand for causal_conv1d_fn: x [B, C, n] -> [B, C, n]. It keeps x, not what it activates."""
    return _Convolution.apply(x, weight, bias)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x).copy_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else torch.zeros_like(x) for x in ctx.saved_tensors)


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stand for fla's kernel: q, k [B, n, H, Dk], v [B, n, H, Dv] -> [B, n, H, Dv], state."""
    output, state = _DeltaRule.apply(query, key, value, g, beta, initial_state)
    return output, state if output_final_state else None


def _delta_states(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return w, u, the states before chunks, and the new values."""
    (batch, tokens, heads, size), of_values = q.shape, v.shape[3]
    chunks = batch * heads * -(-tokens // _CHUNK)
    w = _product(chunks, _CHUNK, _CHUNK, size, q.dtype)
    u = _product(chunks, _CHUNK, _CHUNK, of_values, q.dtype)
    states = _product(chunks, size, _CHUNK, of_values, q.dtype)
    return w, u, states, _product(chunks, _CHUNK, size, of_values, q.dtype)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state):
        (batch, tokens, heads, size), of_values = q.shape, v.shape[3]
        chunks = batch * heads * -(-tokens // _CHUNK)
        normed, sums = [torch.empty_like(x) for x in (q, k)], torch.empty_like(g)
        scores = _product(chunks, _CHUNK, 2 * size, _CHUNK, torch.float32)
        solved = scores.to(q.dtype)
        del scores
        held = _delta_states(q, v)
        output = _product(chunks, _CHUNK, size + _CHUNK, of_values, v.dtype)
        del held
        ctx.save_for_backward(*normed, v, sums, beta, solved)
        ctx.has_state = state is not None
        last = q.new_empty(batch, heads, size, of_values, dtype=torch.float32)
        return output.view(-1)[: v.numel()].view(v.shape), last

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, _ = ctx.saved_tensors
        size, of_values = q.shape[3], v.shape[3]
        held = _delta_states(q, v)
        chunks = len(held[0])
        dv = _product(chunks, _CHUNK, _CHUNK, of_values, v.dtype)
        dstates = _product(chunks, size, 2 * _CHUNK, of_values, q.dtype)
        dv = _product(chunks, _CHUNK, size, of_values, v.dtype)
        dq, dk, dw = (_product(chunks, _CHUNK, of_values + _CHUNK, size, q.dtype) for _ in range(3))
        del dstates, held
        dk2 = _product(chunks, _CHUNK, 2 * _CHUNK, size, q.dtype)
        dv2 = _product(chunks, _CHUNK, 2 * _CHUNK, of_values, v.dtype)
        del dk2, dw, dv2
        like = [x.view(-1)[: y.numel()].view(y.shape) for x, y in ((dq, q), (dk, k), (dv, v))]
        state = torch.empty_like(of_state) if ctx.has_state else None
        return *like, torch.empty_like(g), torch.empty_like(beta), state


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Stand for mamba-ssm's kernel: x [B, n, H, D], b and c [B, n, groups, N] -> [B, n, H, D]."""
    inputs = x, dt, a, b, c, D, dt_bias, initial_states
    output, state = _Scan.apply(chunk_size, *inputs)
    return (output, state) if return_final_states else output


def _scan_states(x: Tensor, b: Tensor, size: int) -> tuple[Tensor, ...]:
    """Return dt and the sums of A * dt, the states twice, and the products of C and B."""
    (batch, tokens, heads, width), (groups, states) = x.shape, b.shape[2:]
    chunks, wide = batch * -(-tokens // size), torch.float32
    steps = x.new_empty(2, batch, heads, tokens, dtype=wide)
    before = _product(chunks * heads, width, size, states, wide)
    return (
        steps,
        before,
        torch.empty_like(before),
        _product(chunks * groups, size, states, size, wide),
    )


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, *inputs: Tensor | None):
        x, _, _, b, *_ = inputs
        (batch, tokens, heads, width), states = x.shape, b.shape[3]
        steps, *held = _scan_states(x, b, size)
        chunks = batch * -(-tokens // size)
        output = _product(chunks * heads, size, states + size, width, x.dtype)
        output = output.view(-1)[: x.numel()].view(x.shape)
        del held
        ctx.size, ctx.has_state = size, inputs[-1] is not None
        ctx.save_for_backward(output, steps, *inputs[:-1])
        return output, x.new_empty(batch, heads, width, states, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_state: Tensor) -> tuple[Tensor | None, ...]:
        _, _, *inputs = ctx.saved_tensors
        x, _, _, b, *_ = inputs
        (batch, tokens, heads, width), states = x.shape, b.shape[3]
        _, *held = _scan_states(x, b, ctx.size)
        chunks = batch * -(-tokens // ctx.size)
        dstates = _product(chunks * heads, width, 2 * ctx.size, states, torch.float32)
        dx = _product(chunks * heads, ctx.size, states + ctx.size, width, x.dtype)
        dscores = _product(chunks * heads, ctx.size, width, ctx.size, torch.float32)
        del held, dstates, dscores
        gradients = [None if y is None else torch.empty_like(y) for y in inputs[1:]]
        state = torch.empty_like(of_state) if ctx.has_state else None
        return None, dx.view(-1)[: x.numel()].view(x.shape), *gradients, state


KERNELS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d,
    "torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
    "mamba2_chunk_scan": mamba_chunk_scan_combined,
}
"""By the names of the functions of transformers that choose these kernels."""
