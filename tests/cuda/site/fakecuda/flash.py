"""Kernels that only CUDA has: FlashAttention 2's operators and products into a wider dtype, by
plain products in fp32, with the real kernels' own rules; and some that are the CPU's, in one piece.

The rules are those of flash-attention v2 as torch builds it, third_party/flash-attention:
    csrc/flash_attn/flash_api.cpp        mha_fwd, mha_varlen_fwd: what is refused; set_params_fprop:
                                         what a window means
    csrc/flash_attn/src/mask.h           which keys a query sees
    csrc/flash_attn/src/softmax.h        a row that sees no key: output 0, log-sum-exp +inf
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_library: torch.library.Library | None = None


def put_in() -> None:
    global _library
    _library = torch.library.Library("aten", "IMPL")
    kernels = {name: _one_kernel(name) for name in _ONE_KERNEL} | {
        "_flash_attention_forward": _forward,
        "_flash_attention_backward": _backward,
        "mm.dtype": _mm,
        "addmm.dtype": _addmm,
        "addmm.dtype_out": _addmm,
        "histc": _histc,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it replaces the fallback
        for name, kernel in kernels.items():
            _library.impl(name, kernel, "CUDA", allow_override=True)


_ONE_KERNEL = ("silu_backward", "native_layer_norm", "convolution", "convolution_backward")
"""Operators that are one kernel in CUDA (ATen/native/native_functions.yaml), where a build for the
CPU has several operators with tensors of their own in its place, or none: convolutions by channel
(ATen/native/Convolution.cpp, use_cudnn_depthwise) are CUDA's alone.
"""


def _one_kernel(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.aten, name).default

    def run(*arguments: Any) -> Any:
        device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
        found = operator(*_low(name, *arguments))
        return tree_map_only(torch.Tensor, lambda t: _high(name, t, device), found)

    return run


def _low(by: str, *tensors: Any) -> list[Any]:
    """The operands of a kernel, as tensors of the CPU."""
    return [
        torch.ops.fakecuda.alias(t.detach(), False, by)
        if isinstance(t, torch.Tensor) and t.is_cuda
        else t
        for t in tensors
    ]


def _high(by: str, t: Tensor, device: torch.device) -> Tensor:
    return torch.ops.fakecuda.result(t, device.index, by)


# --- flash attention ------------------------------------------------------------------------------


def _refuse(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Tensor | None, Tensor | None], dropout: float
) -> None:
    """What flash_api.cpp refuses."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("query and key must have the same dtype")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise RuntimeError("head_size should be a multiple of 8 and at most 256")
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        raise RuntimeError("query, key and value must have the same head size")
    if q.shape[-2] % k.shape[-2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    for starts in lengths:
        if starts is None:
            continue
        if starts.dtype != torch.int32 or not starts.is_cuda or not starts.is_contiguous():
            raise RuntimeError("cu_seqlens must be contiguous, of dtype int32 and on CUDA")
    if dropout:
        raise RuntimeError("fakecuda: attention without dropout only")


def _documents(
    q: Tensor, k: Tensor, starts_q: Tensor | None, starts_k: Tensor | None
) -> list[tuple[slice, slice]]:
    """The rows of q and k that belong together, of tensors flattened to [tokens, heads, size]."""
    if starts_q is None or starts_k is None:
        edges_q = range(0, (len(q) + 1) * q.shape[1], q.shape[1])
        edges_k = range(0, (len(k) + 1) * k.shape[1], k.shape[1])
    else:
        edges_q, edges_k = starts_q.tolist(), starts_k.tolist()
    return [
        (slice(a, b), slice(c, d))
        for a, b, c, d in zip(edges_q, edges_q[1:], edges_k, edges_k[1:], strict=False)
    ]


def _visible(
    queries: int, keys: int, longest: int, causal: bool, left: int | None, right: int | None
) -> Tensor:
    """mask.h: column < row + 1 + keys - queries + right, and >= row + keys - queries - left.

    flash_api.cpp and set_params_fprop turn limits that are no less than the longest document's keys
    into -1, no limit, and then, where only one of both limits is left, the other into `longest`.
    """
    left = -1 if left is None or left >= longest else left
    right = -1 if right is None or right >= longest else right
    if causal:
        right = 0
    if left < 0 <= right:
        left = longest
    if right < 0 <= left:
        right = longest
    row, column = torch.arange(queries)[:, None], torch.arange(keys)[None]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if right >= 0:
        seen &= column < row + 1 + keys - queries + right
    if left >= 0:
        seen &= column >= row + keys - queries - left
    return seen


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [t.reshape(-1, *t.shape[-2:]) for t in tensors]


def _wide(x: Tensor, heads: int) -> Tensor:
    """[tokens, heads, size] -> fp32 of [all query heads, tokens, size]."""
    return x.float().repeat_interleave(heads // x.shape[-2], -2).transpose(0, 1)


def _narrow(x: Tensor, heads: int) -> Tensor:
    """Gradients of _wide's output -> those of its input, [tokens, heads, size]."""
    whole = x.transpose(0, 1)
    return whole.reshape(whole.shape[0], heads, -1, whole.shape[-1]).sum(2)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    dropout: float,
    causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **unused: Any,
) -> tuple[Tensor, ...]:
    by = "flash forward"
    _refuse(q, k, v, (starts_q, starts_k), dropout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    low_q, low_k, low_v, low_starts_q, low_starts_k = _low(by, q, k, v, starts_q, starts_k)
    all_q, all_k, all_v = _flat(low_q, low_k, low_v)
    heads = all_q.shape[1]
    out = torch.zeros_like(all_q)
    lse = torch.full((heads, len(all_q)), float("inf"))
    for rows, keys in _documents(low_q, low_k, low_starts_q, low_starts_k):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        if n == 0 or m == 0:
            continue
        seen = _visible(n, m, longest_k, causal, window_size_left, window_size_right)
        scores = _wide(all_q[rows], heads) @ _wide(all_k[keys], heads).transpose(1, 2) * scale
        scores = scores.masked_fill(~seen, float("-inf"))
        total = scores.logsumexp(-1)
        blind = total == float("-inf")
        weights = (scores - total.masked_fill(blind, 0)[..., None]).exp().to(q.dtype).float()
        out[rows] = (weights @ _wide(all_v[keys], heads)).transpose(0, 1).to(q.dtype)
        lse[:, rows] = total.masked_fill(blind, float("inf"))
    if starts_q is None:
        lse = lse.view(heads, len(q), q.shape[1]).transpose(0, 1).contiguous()
    random_state = torch.empty(2, dtype=torch.uint64)
    nothing = torch.empty(0, dtype=torch.uint64), torch.empty(0, dtype=q.dtype)
    results = (out.view(q.shape), lse, random_state, *nothing)
    return tuple(_high(by, t, q.device) for t in results)


def _held_by_backward(q: Tensor, k: Tensor, documents: int) -> list[Tensor]:
    """What the kernel holds while it runs (flash_api.cpp, mha_bwd and mha_varlen_bwd): `softmax_d`,
    `dq_accum`, and with grouped heads `dk_expanded` and `dv_expanded`.
    """
    heads, size = q.shape[-2:]
    rounded = -(-size // 32) * 32 if size <= 128 else -(-size // 64) * 64
    rows = q.numel() // (heads * size) + 128 * documents
    held = [q.new_empty(heads, rows, dtype=torch.float32)]
    held.append(q.new_empty(rows, heads, rounded, dtype=torch.float32))
    if k.shape[-2] != heads:
        held += [k.new_empty(*k.shape[:-2], heads, size) for _ in range(2)]
    return held


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    dropout: float,
    causal: bool,
    random_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    by = "flash backward"
    _refuse(q, k, v, (starts_q, starts_k), dropout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    low = _low(by, grad, q, k, v, out, lse, starts_q, starts_k)
    all_g, all_q, all_k, all_v, all_out = _flat(*low[:5])
    lse, low_starts_q, low_starts_k = low[5:]
    heads, kv_heads = all_q.shape[1], all_k.shape[1]
    if starts_q is None:
        lse = lse.transpose(0, 1).reshape(heads, -1)
    dq, dk, dv = (torch.zeros_like(x) for x in (all_q, all_k, all_v))
    for rows, keys in _documents(low[1], low[2], low_starts_q, low_starts_k):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        if n == 0 or m == 0:
            continue
        seen = _visible(n, m, longest_k, causal, window_size_left, window_size_right)
        wide_q, wide_g, wide_out = (_wide(x[rows], heads) for x in (all_q, all_g, all_out))
        wide_k, wide_v = (_wide(x[keys], heads) for x in (all_k, all_v))
        weights = (wide_q @ wide_k.transpose(1, 2) * scale - lse[:, rows, None]).exp()
        weights = weights.masked_fill(~seen, 0)
        d_weights = wide_g @ wide_v.transpose(1, 2) - (wide_g * wide_out).sum(-1, keepdim=True)
        d_scores = weights * d_weights * scale
        dq[rows] = (d_scores @ wide_k).transpose(0, 1).to(q.dtype)
        dk[keys] = _narrow(d_scores.transpose(1, 2) @ wide_q, kv_heads).to(q.dtype)
        dv[keys] = _narrow(weights.transpose(1, 2) @ wide_g, kv_heads).to(q.dtype)
    results = zip((dq, dk, dv), (q, k, v), strict=True)
    held = _held_by_backward(q, k, len(q) if starts_q is None else len(starts_q) - 1)
    found = tuple(_high(by, found.view(like.shape), q.device) for found, like in results)
    del held  # until the results are there
    return found


# --- products that add in a wider dtype (ATen/native/cuda/Blas.cpp, addmm.dtype) ------------------


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    low_a, low_b = _low("mm", a, b)
    return _high("mm", low_a.to(out_dtype) @ low_b.to(out_dtype), a.device)


def _addmm(
    added: Tensor,
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Tensor:
    low_added, low_a, low_b = _low("addmm", added, a, b)
    product = low_a.to(out_dtype) @ low_b.to(out_dtype)
    result = _high("addmm", low_added.to(out_dtype) * beta + product * alpha, a.device)
    return result if out is None else out.copy_(result)


# --- what CUDA has for other dtypes ---------------------------------------------------------------


def _histc(x: Tensor, bins: int = 100, lowest: float = 0, highest: float = 0) -> Tensor:
    """Of integers too (ATen/native/cuda/SummaryOps.cu, _histc_cuda): tokens by expert."""
    (low,) = _low("histc", x)
    found = torch.histc(low.double(), bins, lowest, highest)
    return _high("histc", found.to(x.dtype), x.device)
