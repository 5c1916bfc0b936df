"""GPUs and their links: figures from data sheets and from published benchmarks of single kernels.

Each figure has its source. None was fitted to a training run.
"""

from __future__ import annotations

import re
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
    attention: dict[str, tuple[float, float]]
    """FLOP/s of each FlashAttention that runs on it, in forward and in backward.

    Causal, head size 128, long sequences. Only the FLOPs that the causal mask leaves are counted.
    """
    memory_bandwidth: float
    """0.8 of the data sheet's."""
    host_link: float
    """PCIe or C2C, 0.8 of the data sheet's."""
    node_link: float
    """NVLink, 0.8 of the data sheet's."""
    network: float
    """One GPU's share of the node's network, 0.8 of the data sheet's."""
    processors: int
    """Streaming multiprocessors, from the data sheet."""
    multicast_channels: int
    """Channels with which NCCL reduces inside the NVSwitch (NVLS), in a node; 0: it cannot."""

    def attention_rates(self, kernel: str) -> tuple[float, float]:
        """Return FLOP/s of attention in forward and backward; UserError if kernel does not run."""
        if kernel not in self.attention:
            raise UserError(
                f'plan.attention_kernel = "{kernel}": it does not run on {self.name}, which has '
                f"{', '.join(self.attention)}.",
                exit_code=2,
            )
        return self.attention[kernel]


_AMPERE = {"fa2": (227e12, 196e12)}
"""FlashAttention-2 (arXiv 2307.08691, section 4.1): up to 73 % of A100's peak in forward, 63 % in
backward.
"""
_HOPPER = {"fa2": (335e12, 335e12), "fa3": (600e12, 480e12), "fa4": (600e12, 480e12)}
"""H100 (SXM).

2: 335 TFLOP/s in FlashAttention-2, section 4.1, forward and backward together, and in the figures
of FlashAttention-3 (arXiv 2407.08608, section 4.1) in forward, causal, 16K tokens.
3: those figures have 616 TFLOP/s in forward; PyTorch's benchmark measured 621 (pytorch/benchmark
pull request 2391). In backward they have only 561 without a causal mask, and 480 with one is
assumed: backward loses more than forward by the mask. 4: assumed to be no slower than 3.
"""
_BLACKWELL = {"fa2": (762e12, 762e12), "fa4": (1450e12, 1160e12)}
"""B200.

2: not published; its share of the peak is assumed to be the same as on H100.
4: FlashAttention-4 (arXiv 2603.05451, abstract) has up to 1,613 TFLOP/s; 0.9 of it is assumed for
causal forward, and 0.8 of that for backward, as for FlashAttention 3 on H100.
"""


GPUS = {
    gpu.name: gpu
    for gpu in (
        # A100 data sheet (80 GB SXM): 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways, PCIe 4
        # x16 31.5 GB/s; DGX A100: 200 Gbit/s a GPU.
        GPU("A100-80GB", 79.1 * GIB, 312e12, 250e12, _AMPERE, 1.63e12, 25e9, 240e9, 20e9, 108, 0),
        # H100 data sheet (SXM): 989 TFLOP/s, 3,350 GB/s, NVLink 900 GB/s, PCIe 5 x16 63 GB/s; DGX
        # H100: 400 Gbit/s a GPU. NCCL, src/transport/nvls.cc: NVLS_NCHANNELS_SM90.
        GPU("H100-80GB", 79.1 * GIB, 989e12, 791e12, _HOPPER, 2.68e12, 50e9, 360e9, 40e9, 132, 16),
        # H200 data sheet: as H100, with 141 GB and 4,800 GB/s.
        GPU("H200", 139.7 * GIB, 989e12, 791e12, _HOPPER, 3.84e12, 50e9, 360e9, 40e9, 132, 16),
        # B200 data sheet: 2,250 TFLOP/s, 180 GB, 7,700 GB/s, NVLink 1,800 GB/s, PCIe 5. NCCL:
        # NVLS_NCHANNELS_SM100_NVL.
        GPU("B200", 178.3 * GIB, 2250e12, 1800e12, _BLACKWELL, 6.16e12, 50e9, 720e9, 40e9, 148, 24),
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


def short_name(name: str) -> str:
    """Return the name of a GPU without its memory: H100 of H100-80GB."""
    return name.partition("-")[0]


def gpu_of_device(device_name: str) -> GPU | None:
    """Return the GPU that CUDA calls by this name, as in "NVIDIA H100 80GB HBM3".

    The result is None if the table does not have it: an RTX A1000 is no A100, a GH200 no H200.
    """
    words = re.split(r"[\W_]+", device_name)
    return next((gpu for gpu in GPUS.values() if short_name(gpu.name) in words), None)


def peak_flops(device_name: str) -> float | None:
    """Return dense bf16 FLOP/s of the GPU that CUDA calls by this name; None if it is not known."""
    if "H100 PCIe" in device_name:
        return 756e12  # from its data sheet; the table has the SXM module
    gpu = gpu_of_device(device_name)
    return gpu.peak if gpu else None
