"""The memory that CUDA's kernels and libraries take for themselves. Each figure has its source.

No figure was fitted to a training run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from titan_ulysses.distributed.hardware import GIB


@dataclass(frozen=True)
class Reserve:
    """Device memory that belongs to no tensor of the step."""

    what: str
    bytes: float
    source: str


def reserves(memory: float, *, communicators: int) -> list[Reserve]:
    """Return what CUDA, its libraries and the allocator keep of a GPU with `memory` bytes.

    communicators: the number of process groups with more than one rank that move device memory.
    """
    return [
        Reserve(
            "CUDA context",
            0.55 * GIB,
            "assumed: half a GiB, the order of what nvidia-smi shows for a process without tensors",
        ),
        Reserve(
            "cuBLAS workspace",
            (32 + 8) * 2**20,
            "PyTorch, notes/cuda: CUBLAS_WORKSPACE_CONFIG: 32 MiB on Hopper, 8.1 MiB before, and "
            "the Lt workspace",
        ),
        Reserve(
            "NCCL buffers",
            communicators * 32 * 4 * 2**20,
            "NCCL, environment variables: NCCL_BUFFSIZE 4 MiB, at most 32 channels "
            "(NCCL_MAX_CTAS), a communicator",
        ),
        Reserve(
            "fragmentation",
            0.03 * memory,
            "assumed: 3 % of the GPU, with expandable segments; allocations of other streams' "
            "pools are in it",
        ),
    ]


_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def cuda_workspace(func, args: tuple, result) -> int:
    """Return the bytes of workspace that the CUDA kernel holds while it runs, where the simulated
    CPU operator `func` holds none.

    Only flash attention's backward has such a workspace (flash-attn 2,
    csrc/flash_attn/flash_api.cpp, mha_varlen_bwd; PyTorch's SDPA has the same code): `dq_accum`,
    fp32, with the size of the queries; `softmax_d`, fp32 [Hq, S]; and with grouped queries
    `dk_expanded` and `dv_expanded`, which have all query heads. Flash attention's forward saves the
    same tensors as the CPU operator.
    """
    if func is _FLASH_BACKWARD:
        query, key = args[1], args[2]
        batch, heads, tokens, size = query.shape
        held = 4 * query.numel() + 4 * batch * heads * tokens
        if key.shape[1] != heads:
            held += 2 * batch * heads * key.shape[2] * size * key.element_size()
        return held
    return 0


def cpu_workspace(func, args: tuple, result) -> int:
    """Return the bytes of workspace that SDPA's flash kernel on a CPU holds while it runs, in
    backward.

    Each thread has two tiles of scores, of up to 256 queries and 512 keys, in fp32 or wider
    (ATen/native/cpu/FlashAttentionKernel.cpp, cpu_flash_attention_backward).
    """
    if func is not _FLASH_BACKWARD:
        return 0
    queries, keys = args[1].shape[2], args[2].shape[2]
    rows = 256 if queries >= 768 else 64 if queries >= 192 else 32
    scores = 2 * min(rows, queries) * min(512, keys)
    return torch.get_num_threads() * scores * max(4, args[1].element_size())


def pinned(size: int) -> int:
    """Return the bytes of page-locked host memory that PyTorch allocates for `size` bytes:
    CachingHostAllocator rounds up to a power of two.
    """
    return 1 << max(0, size - 1).bit_length()
