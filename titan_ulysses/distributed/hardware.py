"""GPUs and their links: figures from data sheets and from published benchmarks of single kernels.

Each figure has its source. None was fitted to a training run.
"""

from __future__ import annotations

from dataclasses import dataclass

from titan_ulysses.distributed.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One GPU in a server of its kind. Units: FLOP/s, bytes/s in one direction, bytes."""

    name: str
    memory: float
    """Bytes that CUDA can allocate: the `total capacity` in PyTorch's out-of-memory messages."""
    peak: float
    """Dense bf16 FLOP/s from the data sheet, the reference for MFU."""
    matmul: float
    """Achievable FLOP/s of matrix products: 0.8 of the peak.

    FlashAttention-2 (arXiv 2307.08691, section 1) and -3 (arXiv 2407.08608, section 1) give 80 to
    90 % for optimized GEMMs on A100 and H100.
    """
    attention_forward: float
    attention_backward: float
    """FLOP/s of flash attention in forward and backward: causal, head size 128, long sequences.

    Only the FLOPs that the causal mask leaves are counted.
    """
    memory_bandwidth: float
    """0.8 of the data sheet's."""
    host_link: float
    """PCIe or C2C, 0.8 of the data sheet's."""
    node_link: float
    """NVLink, 0.8 of the data sheet's."""
    network: float
    """One GPU's share of the node's network, 0.8 of the data sheet's."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        # A100 data sheet (80 GB SXM): 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways, PCIe 4
        # x16 31.5 GB/s; DGX A100: 200 Gbit/s a GPU. Attention: FlashAttention-2, section 4.1: up to
        # 73 % of the peak in forward, 63 % in backward.
        GPU("A100-80GB", 79.1 * GIB, 312e12, 250e12, 227e12, 196e12, 1.63e12, 25e9, 240e9, 20e9),
        # H100 data sheet (SXM): 989 TFLOP/s, 3,350 GB/s, NVLink 900 GB/s, PCIe 5 x16 63 GB/s; DGX
        # H100: 400 Gbit/s a GPU. Attention: flash-attn 2, which the core `flash` calls: 335 TFLOP/s
        # on H100 in FlashAttention-2, section 4.1, forward and backward together.
        GPU("H100-80GB", 79.1 * GIB, 989e12, 791e12, 335e12, 335e12, 2.68e12, 50e9, 360e9, 40e9),
        # H200 data sheet: as H100, with 141 GB and 4,800 GB/s.
        GPU("H200", 139.7 * GIB, 989e12, 791e12, 335e12, 335e12, 3.84e12, 50e9, 360e9, 40e9),
        # B200 data sheet: 2,250 TFLOP/s, 180 GB, 7,700 GB/s, NVLink 1,800 GB/s, PCIe 5. No
        # benchmark of flash-attn 2 on it is published: its share of the peak is assumed to be the
        # same as on H100.
        GPU("B200", 178.3 * GIB, 2250e12, 1800e12, 762e12, 762e12, 6.16e12, 50e9, 720e9, 40e9),
    )
}


HOST_BANDWIDTH = 0.8 * 614e9
"""Bytes/s of a node's host memory: 0.8 of the 614 GB/s of two sockets.

Each socket has eight channels of DDR5-4800 (Xeon Scalable, 4th generation).
"""


def gpu_named(name: str) -> GPU:
    """Return the GPU of this name; UserError if the table does not have it."""
    if name not in GPUS:
        raise UserError(
            f'plan.gpu = "{name}": not known; known are {", ".join(GPUS)}. For the memory of '
            "another one take the most similar of these and set plan.gpu_memory_gib, as in "
            "plan.gpu_memory_gib = 48.",
            exit_code=2,
        )
    return GPUS[name]


def gpu_of_device(device_name: str) -> GPU | None:
    """Return the GPU that CUDA calls by this name, as in "NVIDIA H100 80GB HBM3".

    The result is None if the table does not have it.
    """
    return next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in device_name), None)


def peak_flops(device_name: str) -> float | None:
    """Return dense bf16 FLOP/s of the GPU that CUDA calls by this name; None if it is not known."""
    if "H100 PCIe" in device_name:
        return 756e12  # from its data sheet; the table has the SXM module
    gpu = gpu_of_device(device_name)
    return gpu.peak if gpu else None
