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


def reserves(
    memory: float, *, communicators: int, multicast: int = 0, flex_tokens: int = 0
) -> list[Reserve]:
    """Return what CUDA, its libraries and the allocator keep of a GPU with `memory` bytes.

    communicators: the number of process groups with more than one rank that move device memory;
    those of the same ranks count once. multicast: the sum over those that reduce or gather inside a
    node of channels times ranks (see `GPU.multicast_channels`). flex_tokens: rows times S^2 where
    the core is flex, else 0.
    """
    found = [
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
        Reserve(
            "NCCL multicast buffers",
            multicast * 2 * 2**20,
            "NCCL, src/transport/nvls.cc, ncclNvlsBufferSetup: channels x ranks of the node x 2 x "
            "8 chunks of 128 KiB (NCCL_NVLS_CHUNKSIZE): 256 MiB on 8 Hopper GPUs, as its log says",
        ),
        Reserve(
            "block mask of flex",
            16 * flex_tokens / 128**2,
            "torch/nn/attention/flex_attention.py: four int32 arrays of (S / 128)^2 a row",
        ),
    ]
    return [reserve for reserve in found if reserve.bytes]


_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class CudaWorkspace:
    """The workspace of CUDA's kernels."""

    kernel: str = "fa2"
    """which FlashAttention (see ulysses/kernels.py)"""
    deterministic: bool = False
    processors: int = 132
    """streaming multiprocessors of the GPU"""

    def __call__(self, func, args: tuple, result) -> int:
        """Return the bytes of workspace that the CUDA kernel holds while it runs, where the
        simulated CPU operator `func` holds none.

        Only flash attention's backward has such a workspace: `dq_accum`, fp32, with the size of the
        queries, and `softmax_d`, fp32 [Hq, S]. With grouped queries FlashAttention 2 also has
        `dk_expanded` and `dv_expanded`, with all query heads (csrc/flash_attn/flash_api.cpp,
        mha_varlen_bwd; PyTorch's file of that name is the same), and 3 has `dk_accum` and
        `dv_accum`, fp32, with the KV heads, and `softmax_lse_log2` (hopper/flash_api.cpp, mha_bwd);
        4 is taken to be like 3. Flash attention's forward saves the same tensors as the CPU
        operator. What is in fp32 has `DOCUMENT_ROWS` more for each document. A row counts as one
        document here (see `of_document`).

        With deterministic algorithms, FlashAttention 2 has one `dq_accum` for each of ceil(
        processors / (documents x heads)) blocks, which is the most for one document. 3 and 4 take
        turns instead.
        """
        if func is not _FLASH_BACKWARD:
            return 0
        query, key = args[1], args[2]
        batch, heads, tokens, size = query.shape
        more = DOCUMENT_ROWS * batch
        of_queries = batch * tokens + more
        copies, held, grouped = 1, 0, key.shape[1] != heads
        if self.kernel == "fa2":
            if self.deterministic:
                copies = -(-self.processors // (batch * heads))
            held = 2 * batch * heads * key.shape[2] * size * key.element_size() * grouped
        else:
            of_keys = batch * key.shape[2] + more
            held = 4 * heads * of_queries
            held += 2 * 4 * key.shape[1] * of_keys * _rounded(size) * grouped
        return held + 4 * heads * of_queries * (copies * _rounded(size) + 1)

    def of_document(self, heads: int, size: int) -> int:
        """Return the bytes that each further document of a row adds, at least: those of `dq_accum`
        and `softmax_d`.
        """
        return 4 * heads * DOCUMENT_ROWS * (_rounded(size) + 1)


DOCUMENT_ROWS = 128
"""Rows of the accumulators that separate a document from the next: FlashAttention 2's total_q + 128
* batch_size. FlashAttention 3's blocks have 64 to 128 rows (kBlockM, kBlockN).
"""


def _rounded(size: int) -> int:
    """Return the head size that the accumulators have."""
    multiple = 32 if size <= 128 else 64
    return -(-size // multiple) * multiple


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
