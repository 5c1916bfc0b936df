"""Turns a simulated step into a plan: whether it fits, what limits it, how long a step takes."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial, update_wrapper
from math import inf

import torch
from transformers import PreTrainedConfig

from titan_ulysses.config.schema import Config
from titan_ulysses.config.validate import MeshDegrees, ranks_of
from titan_ulysses.distributed.errors import UsageError, UserError
from titan_ulysses.distributed.hardware import GIB, GPU, gpu_named
from titan_ulysses.distributed.sequence import chunk_length
from titan_ulysses.launch.nodes import spans_nodes
from titan_ulysses.model.families import head_sizes, layer_configs
from titan_ulysses.observability.metrics import attention_flops
from titan_ulysses.plan.cost import KINDS, SEQUENCE_GATHERS, Cost, Links, Time, clock, step_time
from titan_ulysses.plan.cuda_memory import CudaWorkspace, Reserve, pinned, reserves
from titan_ulysses.plan.layers import simulate_by_layers
from titan_ulysses.plan.memory import Allocation, Peak
from titan_ulysses.plan.simulate import Simulation
from titan_ulysses.plan.standin import Standin
from titan_ulysses.setup.options import select_core
from titan_ulysses.setup.parallelize import wrap
from titan_ulysses.setup.resolve import RunSpec, resolve
from titan_ulysses.ulysses.cores import Core, flash, flex, sdpa, varlen
from titan_ulysses.ulysses.heads import idle_ranks
from titan_ulysses.ulysses.kernels import FA2, NAMES
from titan_ulysses.ulysses.tiles import EXPLICIT


@dataclass(frozen=True)
class Setup:
    """What a plan is made for: settings, model, mesh and hardware."""

    spec: RunSpec
    gpu: GPU
    gpu_memory: float
    host_memory: float | None
    """bytes of host memory of a node; None: not known, so not checked"""
    disk: float | None = None
    """bytes for the files of a node; None: not known, so not checked"""

    @property
    def config(self) -> Config:
        return self.spec.config

    @property
    def model_config(self) -> PreTrainedConfig:
        return self.spec.model_config

    @property
    def degrees(self) -> MeshDegrees:
        return self.spec.degrees

    @property
    def world_size(self) -> int:
        return self.degrees.data_parallel * self.degrees.sequence

    @property
    def mesh(self) -> str:
        d = self.degrees
        return f"dp_replicate {d.replicate} x dp_shard {d.shard} x sp {d.sequence}"

    @property
    def links(self) -> Links:
        d = self.degrees
        return Links(self.config.plan.gpus_per_node, d.sequence, self.world_size, d.replicate)

    @property
    def ranks_per_node(self) -> int:
        return self.links.ranks_per_node

    @property
    def communicators(self) -> tuple[int, ...]:
        """The ranks of each of NCCL's communicators: of all ranks (for the loss), of FSDP's shards,
        of its replicas, and of sequence parallelism, the last one alone only for all-to-alls.

        Axes with all ranks share the communicator of all ranks: `DeviceMesh` gives them the default
        group. Others have one each, also where two have the same ranks.
        """
        d = self.degrees
        axes = (d.shard * d.sequence, d.replicate, d.sequence)
        groups = [self.world_size, *(n for n in axes if n < self.world_size)]
        return tuple(n for n in groups if n > 1)

    @property
    def multicast(self) -> int:
        """Channels times ranks of a node, of the communicators that reduce or gather in a node."""
        d, per_node = self.degrees, self.config.plan.gpus_per_node
        shards = d.shard * d.sequence
        groups = [self.world_size] + [shards] * (shards < self.world_size)
        if self.world_size <= per_node:  # else the ranks of different replicas are on other nodes
            groups += [d.replicate] * (d.replicate < self.world_size)
        return self.gpu.multicast_channels * sum(min(n, per_node) for n in groups if n > 1)

    @property
    def core(self) -> str:
        """The name of the core that the run takes."""
        core = self.spec.core
        return core.core if isinstance(core, Standin) else getattr(core, "__name__", "")

    @property
    def attention_kernel(self) -> str:
        """The FlashAttention whose rates and workspace are planned.

        Only the core `varlen` has a choice. flash is FlashAttention 2, and the rates of other cores
        are taken to be those of FlashAttention 2. UserError if another one is asked for.
        """
        asked = self.config.plan.attention_kernel
        if asked == "auto":
            return FA2
        if asked != FA2 and self.core != "varlen":
            raise UsageError(
                f'plan.attention_kernel = "{asked}": only the core varlen can have it, and this '
                f'run takes {self.core} ({self.spec.core_reason}). Set it to "auto".'
            )
        return asked

    @property
    def workspace(self) -> CudaWorkspace:
        deterministic = self.config.training.deterministic
        return CudaWorkspace(self.attention_kernel, deterministic, self.gpu.processors)

    @property
    def reserves(self) -> list[Reserve]:
        """Memory of a GPU that no tensor of the step has."""
        training = self.config.training
        flex_tokens = training.local_batch_size * training.seq_len**2 * (self.core == "flex")
        return reserves(
            self.gpu_memory,
            communicators=len(self.communicators),
            multicast=self.multicast,
            flex_tokens=flex_tokens,
        )

    def beside(self, host_bytes: float) -> float:
        """Return the bytes that a GPU has beside its tensors: the reserves, and where host memory
        is the GPU's, the host memory of a node (of one GPU).
        """
        shared = host_bytes if self.gpu.shares_memory else 0
        return sum(reserve.bytes for reserve in self.reserves) + shared

    @property
    def tokens_per_step(self) -> int:
        return self.degrees.global_batch_size * self.config.training.seq_len

    @property
    def rates(self) -> dict[str, float]:
        """The rate of each kind of cost: FLOP/s of products, bytes/s of other kernels."""
        attention = self.gpu.attention_rates(self.attention_kernel)
        rates = self.gpu.matmul, self.gpu.fp32, *attention, self.gpu.memory_bandwidth
        return dict(zip(KINDS, rates, strict=True))


def set_up(config: Config) -> Setup:
    """Build the setup that config describes. UserError where it cannot be planned."""
    plan = config.plan
    gpu = gpu_named(plan.gpu)
    setup = Setup(
        resolve_for_plan(config, world_size=plan.world_size or ranks_of(config)),
        gpu,
        gpu_memory=plan.gpu_memory_gib * GIB or gpu.memory,
        host_memory=plan.host_memory_gib * GIB or None,
        disk=plan.disk_gib * GIB or None,
    )
    gpu.attention_rates(setup.attention_kernel)  # UserError where the kernel does not run
    return setup


def resolve_for_plan(config: Config, *, world_size: int) -> RunSpec:
    """Resolve config for `world_size` GPUs, with a core attention that a CPU can simulate.

    UserError for a model of images and text.
    """
    spec = resolve(config, world_size=world_size, device_type="cuda", select=_select_planned_core)
    if config.model.vision != "off":
        raise UserError(
            f'model.vision = "{config.model.vision}": the planner does not know what a vision '
            "tower takes yet. Plan the text part alone: a [model.config] with the numbers of "
            'text_config, and model.vision = "off".'
        )
    return spec


def _select_planned_core(
    name: str,
    model_config: PreTrainedConfig,
    *,
    device_type: str,
    dtype: torch.dtype,
    seq_len: int,
) -> tuple[Core, str]:
    """Return the core attention to simulate, and a note about it.

    It is the one that a run takes on a GPU. Cores that exist only on CUDA are replaced by a
    `Standin`. A package that is missing here need not be missing there, if it is asked for by name.
    """
    core, reason = select_core(
        name,
        model_config,
        device_type="cuda",
        dtype=dtype,
        seq_len=seq_len,
        packages=name == "auto",
    )
    if core is sdpa and dtype.itemsize > 2:
        # Chunks: its pieces choose by the device of the tensors, which is a CPU here.
        core = update_wrapper(partial(sdpa), sdpa)
        core.pieces = EXPLICIT  # type: ignore[attr-defined]
    if core not in (varlen, flash, flex):
        return core, reason
    note = (
        f"{reason}. {core.__name__} exists only on CUDA. It is planned as SDPA's flash kernel, "
        "with the workspace that FlashAttention takes in backward added "
        "(titan_ulysses/plan/cuda_memory.py)"
    )
    return Standin(core.__name__), note


@dataclass(frozen=True)
class Estimate:
    """What a step of setup needs: what a search keeps of a `Plan`."""

    setup: Setup
    cost: Cost
    """of one rank in a step"""
    collectives: Mapping[str, tuple[float, float]]
    """(calls, bytes of their inputs) of one rank in a step, by kind"""
    on_host: Mapping[str, float]
    """bytes of one rank in host memory at its peak, by component"""
    gpu_bytes: float
    """the peak memory of one GPU, reserves included, and host memory where it is the same"""
    host_bytes: float
    """the peak of a node's host memory"""
    on_disk: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    """bytes of one rank in files at their peak, by component"""

    @property
    def seq_len(self) -> int:
        return self.setup.config.training.seq_len

    @property
    def gpu_fits(self) -> bool:
        return self.gpu_bytes <= self.setup.gpu_memory

    @property
    def host_fits(self) -> bool:
        return self.setup.host_memory is None or self.host_bytes <= self.setup.host_memory

    @property
    def disk_bytes(self) -> float:
        """The bytes of a node's files."""
        return sum(self.on_disk.values()) * self.setup.ranks_per_node

    @property
    def disk_fits(self) -> bool:
        return self.setup.disk is None or self.disk_bytes <= self.setup.disk

    @property
    def fits(self) -> bool:
        return self.gpu_fits and self.host_fits and self.disk_fits

    @property
    def fits_in_time(self) -> bool:
        """Whether it fits, in a step that is not longer than it may be."""
        most = self.setup.config.plan.max_step_seconds
        return self.fits and (not most or self.time.seconds <= most)

    @cached_property
    def time(self) -> Time:
        degrees, links = self.setup.degrees, self.setup.links
        gathers = self.cost.total(SEQUENCE_GATHERS)
        on_disk = bool(self.on_disk)
        place = self.on_disk if on_disk else self.on_host
        checkpoints = place.get("checkpoints", 0) * degrees.accumulation_steps
        return step_time(
            self.cost,
            exchanged=self.exchanged,
            # Bytes of whole tensors: an all-gather hands in a shard, a reduce-scatter the whole.
            gathered=(self.sent("all_gather") - gathers / degrees.sequence)
            * (degrees.shard * degrees.sequence)
            + self.sent("reduce_scatter"),
            # The sums over replicas. The others are of a few bytes.
            reduced=self.sent("all_reduce") if degrees.replicate > 1 else 0,
            on_host={**self.on_host, "checkpoints": checkpoints},
            in_files=on_disk,
            gpu=self.setup.gpu,
            links=links,
            rates=self.setup.rates,
        )

    @property
    def exchanged(self) -> float:
        """The bytes that a rank of a sequence hands in to all-to-alls. A gather takes as long as an
        all-to-all of its result.
        """
        return self.sent("all_to_all") + self.cost.total(SEQUENCE_GATHERS)

    @property
    def seconds_per_token(self) -> float:
        return self.time.seconds / self.setup.tokens_per_step

    def sent(self, kind: str) -> float:
        """Return the bytes that a rank hands in to collectives of this kind."""
        return self.collectives.get(kind, (0, 0))[1]


@dataclass(frozen=True)
class Plan(Estimate):
    """The plan of a step that was simulated whole."""

    simulation: Simulation
    peak: Peak
    """of the tensors on one GPU"""
    host_components: Mapping[str, float]
    """bytes of a node's host memory at its peak, by component"""
    notes: tuple[str, ...]

    @cached_property
    def exchange_inside_node(self) -> float | None:
        """Seconds of a step's exchanges if all ranks of a sequence were on one node.

        None where they are. Otherwise `time` has the seconds across nodes.
        """
        setup = self.setup
        if not check_nodes(setup):
            return None
        inside = replace(setup.links, gpus_per_node=setup.world_size)
        return inside.exchange_seconds(self.exchanged, setup.gpu)

    @cached_property
    def clock(self) -> list[tuple[int, float]]:
        """When each simulated operation ends: (memory events before its end, seconds since the step
        began).
        """
        setup, simulation = self.setup, self.simulation
        exchange = setup.links.exchange_seconds(1.0, setup.gpu)
        rate = 1 / exchange if exchange else inf
        rates = setup.rates | {"exchange": rate, SEQUENCE_GATHERS: rate}
        share = simulation.batches / setup.degrees.accumulation_steps
        return clock(simulation.ticks, self.time, rates=rates, share=share)

    def seconds_at(self, event: int) -> float:
        """Return when a memory event happens, in planned seconds since the step began."""
        over = bisect_right(self.clock, event, key=lambda end: end[0])
        return self.clock[over - 1][1] if over else 0.0

    @cached_property
    def mfu(self) -> float:
        """The share of the GPU's peak that a step's FLOPs take, without recomputation, as the
        trainer counts them.
        """
        setup = self.setup
        training, degrees = setup.config.training, setup.degrees
        rows = training.local_batch_size * degrees.accumulation_steps
        row = rows * training.seq_len * self.simulation.flops_per_token
        scores = attention_flops(setup.model_config, ((training.seq_len,),) * rows)
        flops = (row + scores) / degrees.sequence
        return flops / self.time.seconds / setup.gpu.peak

    @property
    def bottleneck(self) -> str:
        """What limits the step: "GPU memory", "host memory" or "disk" where it is too small, else
        what limits the step's time.
        """
        if not self.gpu_fits:
            return "GPU memory"
        if not self.host_fits:
            return "host memory"
        return self.time.bottleneck if self.disk_fits else "disk"


_MANY_LAYERS = 8
"""From as many on, a plan says that it takes long because all are simulated."""


def make_plan(setup: Setup, *, wrap: Callable[..., object] = wrap) -> Plan:
    """Simulate a step of setup and return the plan. wrap: see `simulate`. UserError where the
    weights alone exceed host memory.
    """
    config = setup.config
    notes = [setup.spec.core_reason]
    if config.compile.enable:
        notes.append(
            "compile.enable: planned as it runs without compilation, which needs as much memory or "
            "more"
        )
    if config.quantize.float8:
        notes.append(
            "quantize.float8: memory is planned with float8 products, time with the speed of bf16 "
            "products"
        )
    kernel = NAMES[setup.attention_kernel]
    notes.append(
        f'attention kernel: {kernel} (plan.attention_kernel = "{config.plan.attention_kernel}")'
        if setup.core == "varlen"
        else f"the time of attention is planned with the rates of {kernel}"
    )
    if config.data.packing != "none" and (more := _bytes_of_a_document(setup)):
        notes.append(
            f"documents: one a sequence is planned. Each further one adds {more / 2**20:.3g} MiB "
            "while the backward of attention runs"
        )
    simulation = simulate_by_layers(setup.spec, cuda=setup.workspace, wrap=wrap)
    memory, start = simulation.memory, simulation.start
    layers = getattr(setup.model_config, "num_hidden_layers", 0)
    if simulation.layers == layers >= _MANY_LAYERS:
        notes.append(f"all {layers} layers are simulated, because fewer do not tell what all need")
    peak, host_peak = memory.peak("device", first=start), memory.peak("host", first=start)
    host: Counter[str] = Counter()
    for allocation, size in host_peak.alive.items():
        host[allocation.component] += on_host(allocation, size) * setup.ranks_per_node
    weights = host["parameters"]
    if setup.host_memory and weights > setup.host_memory:
        raise UserError(
            f"plan.host_memory_gib = {setup.host_memory / GIB:g}: memory.parameter_offload = true "
            f"puts {weights / GIB:.3g} GiB of weights there. Use more nodes, or set "
            "memory.parameter_offload = false."
        )
    return Plan(
        setup,
        simulation.cost,
        simulation.collectives,
        host_peak.components,
        gpu_bytes=peak.bytes + setup.beside(host.total()),
        host_bytes=host.total(),
        simulation=simulation,
        peak=peak,
        on_disk=memory.peak("disk", first=start).components,
        host_components=dict(host.most_common()),
        notes=tuple(notes),
    )


def on_host(allocation: Allocation, size: int) -> int:
    """Return the bytes of host memory that a tensor of `size` bytes takes there."""
    # Checkpoints are in buffers of exactly their size. PyTorch's allocator pins the rest.
    return size if allocation.component == "checkpoints" else pinned(size)


def estimate_plan(setup: Setup) -> Estimate:
    """Plan setup, and keep what settings are compared by, without the events of the step.

    UserError as `make_plan`.
    """
    return summary(make_plan(setup))


def summary(plan: Estimate) -> Estimate:
    """Return what settings are compared by, of a plan."""
    return Estimate(**{one.name: getattr(plan, one.name) for one in fields(Estimate)})


def _bytes_of_a_document(setup: Setup) -> int:
    """Return what `CudaWorkspace.of_document` says of the layer with most; 0 where no kernel takes
    several documents.
    """
    if setup.core not in ("varlen", "flash"):
        return 0
    layers = [x for x in layer_configs(setup.model_config) if hasattr(x, "num_attention_heads")]
    heads = [-(-x.num_attention_heads // setup.degrees.sequence) for x in layers]
    sizes = [max(head_sizes(x)) for x in layers]
    return max(map(setup.workspace.of_document, heads, sizes), default=0)


def check_idle(plan: Plan) -> str | None:
    """Return a sentence about ranks that are idle in attention, or None where there are none."""
    setup, degree = plan.setup, plan.setup.degrees.sequence
    setting = plan.simulation.model.sharding.stream_chunk_tokens
    if chunk_length(setting, setup.config.training.seq_len, degree) is not None:
        return None
    return idle_ranks(getattr(setup.model_config, "num_attention_heads", degree), degree)


def check_nodes(setup: Setup) -> str | None:
    """Return a warning about sequences whose ranks are on several nodes, or None."""
    return spans_nodes(
        sequence=setup.degrees.sequence,
        world_size=setup.world_size,
        per_node=setup.config.plan.gpus_per_node,
    )
