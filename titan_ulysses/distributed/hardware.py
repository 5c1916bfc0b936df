"""GPUs and their links: figures from data sheets and from published benchmarks of single kernels.

Each figure has its source. None was fitted to a training run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from titan_ulysses.distributed.errors import UsageError

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
    """Achievable FLOP/s of matrix products: 0.8 of the peak, unless a source says otherwise.

    FlashAttention-2 (arXiv 2307.08691, section 1) and -3 (arXiv 2407.08608, section 1) give 80 to
    90 % for optimized GEMMs on A100 and H100.
    """
    fp32: float
    """FLOP/s of products in fp32, without TF32: 0.8 of the data sheet's."""
    attention: dict[str, tuple[float, float]]
    """FLOP/s of each FlashAttention that runs on it, in forward and in backward.

    Causal, head size 128, long sequences. Only the FLOPs that the causal mask leaves are counted.
    """
    memory_bandwidth: float
    """0.8 of the data sheet's."""
    host_link: float
    """PCIe or C2C, 0.8 of the data sheet's."""
    node_link: float
    """NVLink, or PCIe where there is none, 0.8 of the data sheet's."""
    network: float
    """One GPU's share of the node's network, 0.8 of the data sheet's."""
    processors: int
    """Streaming multiprocessors, from the data sheet."""
    multicast_channels: int
    """Channels with which NCCL reduces inside the NVSwitch (NVLS), in a node; 0: it cannot."""
    own_host_bandwidth: float
    """Bytes/s of the host memory that this GPU has to itself, 0.8 of the data sheet's; 0: the node
    has one for all.
    """
    shares_memory: bool
    """Whether host memory is the GPU's memory, so that what is offloaded takes room there."""

    def host_bandwidth(self, gpus: int) -> float:
        """Return bytes/s of the host memory of a node with so many GPUs."""
        return gpus * self.own_host_bandwidth or HOST_BANDWIDTH

    def attention_rates(self, kernel: str) -> tuple[float, float]:
        """Return FLOP/s of attention in forward and backward; UserError if kernel does not run."""
        if kernel not in self.attention:
            raise UsageError(
                f'plan.attention_kernel = "{kernel}": it does not run on {self.name}, which has '
                f"{', '.join(self.attention)}."
            )
        return self.attention[kernel]


_ACHIEVED = 0.8
HOST_BANDWIDTH = _ACHIEVED * 614e9
"""Bytes/s of a node's host memory: 614 GB/s of two sockets, each with eight channels of DDR5-4800
(Xeon Scalable, 4th generation).
"""

DISK_BANDWIDTH = _ACHIEVED * 4e9
"""Bytes/s of the files of one GPU: DGX H100 has an NVMe drive of 3.84 TB for each, and those of
PCIe 4 read 6.8 GB/s and write 4.0 (Samsung PM9A3, data sheet).
"""


def _gpu(
    name: str,
    gib: float,
    tflops: float,
    memory: float,
    host: float,
    node: float,
    network: float,
    processors: int,
    attention: Mapping[str, tuple[float, float]],
    *,
    channels: int = 0,
    achieved: float = _ACHIEVED,
    host_memory: float = 0,
    shares_memory: bool = False,
) -> GPU:
    """Return a GPU from the figures of its data sheet.

    gib: what CUDA can allocate. tflops: dense bf16 with fp32 sums. memory, host, node, network:
    GB/s in one direction. attention: TFLOP/s. achieved: the share of tflops in matrix products.
    host_memory: GB/s of the host memory that the GPU has to itself.
    """
    rates = {kernel: (1e12 * a, 1e12 * b) for kernel, (a, b) in attention.items()}
    return GPU(
        name,
        gib * GIB,
        1e12 * tflops,
        achieved * 1e12 * tflops,
        _ACHIEVED * 1e12 * _FP32[name],
        rates,
        memory_bandwidth=_ACHIEVED * 1e9 * memory,
        host_link=_ACHIEVED * 1e9 * host,
        node_link=_ACHIEVED * 1e9 * node,
        network=_ACHIEVED * 1e9 * network,
        processors=processors,
        multicast_channels=channels,
        own_host_bandwidth=_ACHIEVED * 1e9 * host_memory,
        shares_memory=shares_memory,
    )


def _by(factor: float, rates: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    return {kernel: (factor * a, factor * b) for kernel, (a, b) in rates.items()}


_MMA = {"fa2": (0.73, 0.63)}
"""FlashAttention-2 (arXiv 2307.08691, section 4.1): its share of A100's peak in forward and in
backward. Assumed wherever products are issued as on A100 (mma.sync): Ada, and Blackwell without
tensor memory (compute capability 12), where 3 and 4 do not run. On RTX 5090, PyTorch's has 0.89 of
the peak in forward without a mask (gau-nernst, "Writing Speed-of-Light Flash Attention for 5090").
"""
_HOPPER = {"fa2": (335, 335), "fa3": (600, 480), "fa4": (600, 480)}
"""H100 (SXM).

2: 335 TFLOP/s in FlashAttention-2, section 4.1, forward and backward together, and in the figures
of FlashAttention-3 (arXiv 2407.08608, section 4.1) in forward, causal, 16K tokens.
3: those figures have 616 TFLOP/s in forward; PyTorch's benchmark measured 621 (pytorch/benchmark
pull request 2391). In backward they have only 561 without a causal mask, and 480 with one is
assumed: backward loses more than forward by the mask. 4: assumed to be no slower than 3.
"""
_BLACKWELL = {"fa2": (762, 762), "fa4": (1450, 1160)}
"""B200.

2: not published; its share of the peak is assumed to be the same as on H100.
4: FlashAttention-4 (arXiv 2603.05451, abstract) has up to 1,613 TFLOP/s; 0.9 of it is assumed for
causal forward, and 0.8 of that for backward, as for FlashAttention 3 on H100.
"""
_CDNA = {"fa2": (0.34, 0.34)}
"""Assumed for FlashAttention 2 in ROCm (Composable Kernel): the share of the peak that it has on
H100.
"""

_FP32 = {
    **{"A100-80GB": 19.5, "H100-80GB": 67, "H100-NVL": 60, "H200": 67, "H20": 44, "GH200": 67},
    **{"B200": 75, "B300": 75, "GB200": 80, "GB300": 80, "DGX-Station": 80, "L40S": 91.6},
    **{"RTX-4090": 82.6, "RTX-5090": 104.8, "RTX-PRO-6000": 125, "DGX-Spark": 31},
    **{"MI300X": 163.4, "MI325X": 163.4, "MI355X": 157.3},
}
"""TFLOP/s in fp32 of data sheets, those of B200 and B300 an eighth of HGX's 600. DGX-Station is
assumed: as GB300; DGX-Spark by its cores and clock.
"""

# Memory: the total capacity in PyTorch's out-of-memory messages, as public issues quote them. Where
# no other source stands above it, a figure is from the data sheet of its maker. Network: one GPU's
# share in the maker's reference server.
_TABLE = (
    # A100, 80 GB SXM: PCIe 4 x16; DGX A100: 200 Gbit/s a GPU.
    _gpu("A100-80GB", 79.1, 312, 2039, 31.5, 300, 25, 108, _by(312, _MMA)),
    # H100, SXM: PCIe 5 x16; DGX H100: 400 Gbit/s. NCCL, src/transport/nvls.cc: NVLS_NCHANNELS_SM90.
    _gpu("H100-80GB", 79.1, 989, 3350, 63, 450, 50, 132, _HOPPER, channels=16),
    # H100 NVL: a bridge joins two cards. All others reach each other over PCIe 5, for which an
    # exchange waits. Attention is assumed: as H100 SXM, by their peaks.
    _gpu("H100-NVL", 93.1, 835, 3938, 63, 63, 50, 132, _by(835 / 989, _HOPPER)),
    # H200: as H100, with 141 GB and 4,800 GB/s.
    _gpu("H200", 139.7, 989, 4800, 63, 450, 50, 132, _HOPPER, channels=16),
    # H20: products are capped. FlashAttention 2 and 3 are assumed to reach A100's share of the cap.
    _gpu("H20", 95.0, 148, 4000, 63, 450, 50, 78, _by(148, _MMA | {"fa3": _MMA["fa2"]}),
         channels=16),
    # GH200, 96 GB of HBM3: a copy waits for Grace's memory (480 GB of LPDDR5X at 384 GB/s), which
    # is slower than NVLink-C2C (450 GB/s). NVLink between GPUs: only in racks of 32.
    _gpu("GH200", 94.5, 989, 4000, 384, 450, 50, 132, _HOPPER, channels=16, host_memory=384),
    # B200: 180 GB, 7.7 TB/s, PCIe 5. NCCL: NVLS_NCHANNELS_SM100_NVL.
    _gpu("B200", 178.3, 2250, 7700, 63, 900, 50, 148, _BLACKWELL, channels=24),
    # HGX B300: 36 PFLOP/s of eight with sparsity, PCIe 5 to the host, 800 Gbit/s a GPU. Its faster
    # exponentials are assumed to gain nothing.
    _gpu("B300", 267.6, 2250, 7700, 63, 900, 100, 148, _BLACKWELL, channels=24),
    # GB200 NVL72: 360 PFLOP/s of 72 with sparsity, 8 TB/s. Two GPUs share a Grace: each has half of
    # the 450 GB/s of NVLink-C2C, and of memory at 512 GB/s. 400 Gbit/s. Attention is assumed: as
    # B200, by their peaks.
    _gpu("GB200", 184.3, 2500, 8000, 225, 900, 50, 152, _by(2500 / 2250, _BLACKWELL), channels=24,
         host_memory=256),
    # GB300 NVL72: as GB200, with 279 GB and 800 Gbit/s.
    _gpu("GB300", 276.5, 2500, 8000, 225, 900, 100, 152, _by(2500 / 2250, _BLACKWELL), channels=24,
         host_memory=256),
    # DGX Station: one GB300 with 252 GB at 7.1 TB/s (CUDA's share of it assumed as for GB300), and
    # a Grace of its own, 496 GB at 396 GB/s, for which a copy over NVLink-C2C waits. 800 Gbit/s.
    _gpu("DGX-Station", 249.7, 2500, 7100, 396, 100, 100, 152, _by(2500 / 2250, _BLACKWELL),
         host_memory=396),
    # L40S: PCIe 4, no NVLink; servers with 200 Gbit/s a GPU.
    _gpu("L40S", 44.4, 362, 864, 31.5, 31.5, 25, 142, _by(362, _MMA)),
    # NVIDIA Ada GPU Architecture, appendix A: bf16 with fp32 sums. PCIe 4, no NVLink; the network
    # is assumed: 100 Gbit/s.
    _gpu("RTX-4090", 23.6, 165.2, 1008, 31.5, 31.5, 12.5, 128, _by(165.2, _MMA)),
    # NVIDIA RTX Blackwell GPU Architecture, appendix: bf16 with fp32 sums. PCIe 5; as before.
    _gpu("RTX-5090", 31.3, 209.5, 1792, 63, 63, 12.5, 170, _by(209.5, _MMA)),
    # NVIDIA RTX PRO 6000 Blackwell, Workstation Edition: bf16 503.8 with fp32 sums. PCIe 5, no
    # NVLink; the network is assumed: 400 Gbit/s for two.
    _gpu("RTX-PRO-6000", 94.9, 503.8, 1792, 63, 63, 25, 188, _by(503.8, _MMA)),
    # DGX Spark (GB10): 1 PFLOP/s of FP4 with sparsity, of which bf16 is assumed to have an eighth.
    # 128 GB that GPU and CPU share, at 273 GB/s: a copy reads and writes it. 200 Gbit/s.
    _gpu("DGX-Spark", 119.6, 125, 273, 136.5, 25, 25, 48, _by(125, _MMA), host_memory=273,
         shares_memory=True),
    # AMD Instinct: 7 links of Infinity Fabric at 64 GB/s each, PCIe 5, 400 Gbit/s. Products: AMD's
    # "Measuring Max-Achievable FLOPs, part 2" (rocm.blogs.amd.com) has 708 and 843 TFLOP/s for
    # MI300X and MI325X; for MI355X the share of MI325X is assumed. Host memory as beside H100.
    _gpu("MI300X", 191.9, 1307, 5300, 63, 448, 50, 304, _by(1307, _CDNA), achieved=708 / 1307),
    _gpu("MI325X", 255.9, 1307, 6000, 63, 448, 50, 304, _by(1307, _CDNA), achieved=843 / 1307),
    # MI355X: 7 links at 76.8 GB/s.
    _gpu("MI355X", 287.9, 2517, 8000, 63, 537, 50, 256, _by(2517, _CDNA), achieved=843 / 1307),
)  # fmt: skip

GPUS = {gpu.name: gpu for gpu in _TABLE}


def find_gpu(name: str) -> GPU | None:
    """Return the GPU of this name, with its memory or without ("h100", "RTX 4090"); None if the
    table does not have it: an A10 is no A100.
    """
    asked = _plain(name)
    names = (one for one in GPUS if asked in (_plain(one), _plain(short_name(one))))
    return GPUS.get(next(names, ""))


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def unknown_gpu(name: str) -> str:
    """Return what to say of a name that the table does not have: those near it, and all."""
    plain = {_plain(text): one for one in GPUS for text in (one, short_name(one))}
    near = dict.fromkeys(map(plain.__getitem__, get_close_matches(_plain(name), plain, n=3)))
    nearest = f"; near it: {', '.join(near)}" if near else ""
    return (
        f"not known{nearest}. Known are {', '.join(GPUS)}. For the memory of another one take the "
        "most similar of these and set plan.gpu_memory_gib, as in plan.gpu_memory_gib = 48."
    )


def gpu_named(name: str) -> GPU:
    """Return the GPU of this name (see `find_gpu`); UserError if the table does not have it."""
    if (found := find_gpu(name)) is None:
        raise UsageError(f'plan.gpu = "{name}": {unknown_gpu(name)}')
    return found


def short_name(name: str) -> str:
    """Return the name of a GPU without its memory: H100 of H100-80GB."""
    return re.sub(r"-\d+GB$", "", name)


_OTHER = {"Laptop", "D", "MaxQ"}
"""Words in the names of devices that are slower than the GPU of that name."""
_CALLED = {"DGX-Spark": "GB10", "DGX-Station": "GB300"}
"""What CUDA calls GPUs that have the name of their machine here."""


def gpu_of_device(device_name: str) -> GPU | None:
    """Return the GPU that CUDA calls by this name, as in "NVIDIA H100 80GB HBM3".

    The result is None if the table does not have it: an RTX A1000 is no A100.
    """
    words = {*re.split(r"[\W_]+", device_name)}
    if words & _OTHER:
        return None
    parts = {name: {*_CALLED.get(name, short_name(name)).split("-")} for name in GPUS}
    found = [name for name, of_name in parts.items() if of_name <= words]
    # The most words: an H100 NVL is an H100 too.
    return GPUS[max(found, key=lambda name: len(parts[name]))] if found else None


def peak_flops(device_name: str) -> float | None:
    """Return dense bf16 FLOP/s of the GPU that CUDA calls by this name; None if it is not known."""
    if "H100 PCIe" in device_name:
        return 756e12  # from its data sheet; the table has the SXM module
    gpu = gpu_of_device(device_name)
    return gpu.peak if gpu else None
