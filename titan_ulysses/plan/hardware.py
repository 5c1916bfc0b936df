"""What only the hardware knows: GPUs and links, and the memory that CUDA's kernels and libraries take for themselves.

Nothing here was fitted to a training run. Rates come from data sheets and from benchmarks of single kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from titan_ulysses.distributed.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One GPU in a server of its kind. FLOP/s, bytes/s in one direction, bytes."""

    name: str
    memory: float
    """bytes that CUDA can give out: the `total capacity` of PyTorch's out-of-memory messages"""
    peak: float
    """dense bf16 FLOP/s (data sheet), what MFU is measured by"""
    matmul: float
    """achievable: 0.8 of the peak. FlashAttention-2 (arXiv 2307.08691, section 1) and -3 (arXiv 2407.08608, section 1)
    give 80 to 90 % for optimized GEMMs on A100 and H100"""
    attention_forward: float
    attention_backward: float
    """of flash attention, causal, head size 128, long sequences, counting the FLOPs that causality leaves"""
    memory_bandwidth: float
    """0.8 of the data sheet's"""
    host_link: float
    """PCIe or C2C, 0.8 of the data sheet's"""
    node_link: float
    """NVLink, 0.8 of the data sheet's"""
    network: float
    """a GPU's share of the node's network, 0.8 of the data sheet's"""


GPUS = {
    gpu.name: gpu
    for gpu in (
        # A100 data sheet (80 GB SXM): 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways, PCIe 4 x16 31.5 GB/s;
        # DGX A100: 200 Gbit/s a GPU. Attention: FlashAttention-2, section 4.1: up to 73 % of the peak in forward, 63 %
        # in backward.
        GPU("A100-80GB", 79.1 * GIB, 312e12, 250e12, 227e12, 196e12, 1.63e12, 25e9, 240e9, 20e9),
        # H100 data sheet (SXM): 989 TFLOP/s, 3,350 GB/s, NVLink 900 GB/s, PCIe 5 x16 63 GB/s; DGX H100: 400 Gbit/s a
        # GPU. Attention: flash-attn 2, which the core `flash` calls: 335 TFLOP/s on H100 in FlashAttention-2, section
        # 4.1, forward and backward together.
        GPU("H100-80GB", 79.1 * GIB, 989e12, 791e12, 335e12, 335e12, 2.68e12, 50e9, 360e9, 40e9),
        # H200 data sheet: as H100, with 141 GB and 4,800 GB/s.
        GPU("H200", 139.7 * GIB, 989e12, 791e12, 335e12, 335e12, 3.84e12, 50e9, 360e9, 40e9),
        # B200 data sheet: 2,250 TFLOP/s, 180 GB, 7,700 GB/s, NVLink 1,800 GB/s, PCIe 5. No benchmark of flash-attn 2 is
        # published: its share of the peak is taken to be what it is on H100.
        GPU("B200", 178.3 * GIB, 2250e12, 1800e12, 762e12, 762e12, 6.16e12, 50e9, 720e9, 40e9),
    )
}


HOST_BANDWIDTH = 0.8 * 614e9
"""Bytes/s of a node's host memory: two sockets of eight channels of DDR5-4800 (Xeon Scalable, 4th generation)."""


def gpu_named(name: str) -> GPU:
    """UserError where nothing is known of it."""
    if name not in GPUS:
        raise UserError(
            f'plan.gpu = "{name}": not known; known are {", ".join(GPUS)}. For the memory of another one take the most '
            "similar of these and set plan.gpu_memory_gib, as in plan.gpu_memory_gib = 48.",
            exit_code=2,
        )
    return GPUS[name]


@dataclass(frozen=True)
class Reserve:
    """Device memory that no tensor of the step accounts for."""

    what: str
    bytes: float
    source: str


def reserves(memory: float, *, communicators: int) -> list[Reserve]:
    """What CUDA, its libraries and the allocator keep of a GPU with so many bytes.

    communicators: process groups of more than one rank that move device memory.
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
            "PyTorch, notes/cuda: CUBLAS_WORKSPACE_CONFIG: 32 MiB on Hopper, 8.1 MiB before, and the Lt workspace",
        ),
        Reserve(
            "NCCL buffers",
            communicators * 32 * 4 * 2**20,
            "NCCL, environment variables: NCCL_BUFFSIZE 4 MiB, at most 32 channels (NCCL_MAX_CTAS), a communicator",
        ),
        Reserve(
            "fragmentation",
            0.03 * memory,
            "assumed: 3 % of the GPU, with expandable segments; allocations of other streams' pools are in it",
        ),
    ]


_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def cuda_workspace(func, args: tuple, result) -> int:
    """Bytes that the CUDA kernel which stands where func does holds while it runs, and func does not.

    Flash attention's backward (flash-attn 2, csrc/flash_attn/flash_api.cpp, mha_varlen_bwd; PyTorch's SDPA has the same
    code): `dq_accum`, fp32 of the queries' size; `softmax_d`, fp32 [Hq, S]; and with grouped queries `dk_expanded` and
    `dv_expanded`, which have all query heads. In forward it saves what the CPU's fallback saves.
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
    """Bytes that SDPA's flash kernel on a CPU holds while it runs, in backward.

    For each thread two tiles of scores, of up to 256 queries and 512 keys, in fp32 or wider
    (ATen/native/cpu/FlashAttentionKernel.cpp, cpu_flash_attention_backward).
    """
    if func is not _FLASH_BACKWARD:
        return 0
    queries, keys = args[1].shape[2], args[2].shape[2]
    rows = 256 if queries >= 768 else 64 if queries >= 192 else 32
    scores = 2 * min(rows, queries) * min(512, keys)
    return torch.get_num_threads() * scores * max(4, args[1].element_size())


def pinned(size: int) -> int:
    """Bytes of page-locked host memory that PyTorch takes for size of them (CachingHostAllocator: a power of two)."""
    return 1 << max(0, size - 1).bit_length()
