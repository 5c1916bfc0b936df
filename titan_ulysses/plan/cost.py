"""What a step costs: FLOPs, bytes moved, and the time that they take on a GPU. The same simulation
gives the step's memory.

The model of time: matrix products, attention, all other kernels and the exchanges run one after the
other, because the computation waits for each exchange. FSDP's collectives and the copies over PCIe
overlap with the computation, and only the time by which they exceed it counts; a single GPU waits
for offloaded parameters. Copies of checkpoints to the host overlap with forward, and copies back
overlap with backward. Those of hidden states that are off the device (`memory.stream_offload`)
overlap with both, in one stream for both directions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from titan_ulysses.distributed.hardware import DISK_BANDWIDTH, GPU
from titan_ulysses.launch.nodes import neighbours_on_node
from titan_ulysses.plan.attribution import SPARSE
from titan_ulysses.plan.memory import MemoryTracker, tensors_in

_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: 2,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 5,
}
"""The number of matrix products over the scores: two in forward, five in backward, which computes
the scores again and has four gradients.
"""


_MOVE_NOTHING = frozenset(
    ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
)
"""Operators that make a tensor without reading or writing one, beside those that torch calls views.
"""
_OVERWRITE = frozenset(("copy_", "fill_", "zero_"))
"""Operators that write their first argument, which is also their result, without reading it."""

_READ_ROWS = frozenset(("index", "gather", "index_select", "embedding"))
"""Operators that read as many numbers of their first argument as the result has, in their order."""

STAGES = {"forward": "forward", "recomputation": "backward", "backward": "backward"}
"""The stage of time that each phase of a step belongs to. All other phases belong to "update"."""

KINDS = ("matmul", "fp32 matmul", "attention forward", "attention backward", "other kernels")
"""Of operations. Those of `SPARSE` have their component in front, as in "indexer: matmul".
"fp32 matmul" has the scores of indexers alone, without TF32, as torch has it by default. The few
other products in fp32 count as the rest.
"""
SEQUENCE_GATHERS = "gathers of a sequence"
"""Bytes of what sequence-parallel ranks gather: keys of an indexer, and its choice."""
TO_DEVICE, OFF_DEVICE = "hidden states to the device", "hidden states off the device"
"""Copies of `memory.stream_offload`."""


Amount = Fraction | int
"""FLOPs or bytes. Exact, so that an amount does not depend on the order of its sums."""


@dataclass
class Cost:
    """The cost of one rank in one step."""

    amounts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """amounts by (stage, kind): FLOPs for "matmul", "attention forward" and "attention backward",
    recomputation included, bytes read and written for "other kernels", and bytes of copies
    """

    def total(self, kind: str) -> float:
        """Return the amount of a kind in all stages and components, "matmul" in fp32 too."""
        return float(sum(n for (_, of_kind), n in self.amounts.items() if of_kind.endswith(kind)))

    @property
    def flops(self) -> float:
        return sum(map(self.total, ("matmul", "attention forward", "attention backward")))


class Tick(NamedTuple):
    """The cost of one operation, from which `clock` computes when the operation ends."""

    event: int
    """the number of `MemoryTracker.events` before the end of the operation"""
    stage: str
    kind: str
    """a kind of `Cost.amounts`, or "exchange", whose amount is in bytes"""
    amount: Amount
    layer: int | None = None
    """see `Allocation.layer`"""


class CostCounter:
    """An observer for `MemoryTracker` that adds up the cost of each operation, times the number of
    operations that it stands for.
    """

    def __init__(self, tracker: MemoryTracker, scores: dict[int | None, Amount]):
        """scores: the number of (query, key) pairs in a row of each layer, for layers where the
        shapes of the call do not say it (see `Standin`).
        """
        self._tracker, self._scores = tracker, scores
        self.reset()

    def reset(self) -> None:
        """Start counting from 0."""
        self.cost = Cost()
        self.ticks: list[Tick] = []

    def add(self, kind: str, amount: Amount) -> None:
        """Add a cost, also of what no operation shows, times the number that it stands for."""
        tracker, amount = self._tracker, amount * self._tracker.weight
        stage = STAGES.get(tracker.attribution.phase, "update")
        if kind != "exchange":  # its bytes are in the collectives
            self.cost.amounts[stage, kind] += amount  # type: ignore[assignment]
        self.ticks.append(Tick(len(tracker.events), stage, kind, amount, tracker.layer))

    def __call__(self, func, args: tuple, kwargs: dict, result) -> None:
        kind, amount = self._of(func, args, kwargs, result)
        if amount:
            component = self._tracker.attribution.here().component
            is_sparse = component in SPARSE and kind in KINDS
            self.add(f"{component}: {kind}" if is_sparse else kind, amount)

    def _of(self, func, args: tuple, kwargs: dict, result) -> tuple[str, Amount]:
        """Return the kind and the amount of an operation's cost."""
        kind = _counted_as(func)
        if kind == "moved":
            values: tuple = (args, kwargs)
            if func._opname not in _OVERWRITE:
                values = args, kwargs, result
            if func._opname in _READ_ROWS:
                values = result, args[1:], kwargs, result
            elif func._opname == "index_add_":  # rows are read, added to and written
                values = args[2:], args[3], args[3]
            return "other kernels", sum([x.numel() * x.element_size() for x in tensors_in(values)])
        if kind == "attention":
            backward = _ATTENTION[func] == 5
            query, key = args[1:3] if backward else args[:2]
            pairs = self._scores.get(self._tracker.attribution.here().layer) or _causal_pairs(
                query.shape[2], key.shape[2]
            )
            products = _ATTENTION[func] * 2 * query.shape[0] * query.shape[1] * query.shape[3]
            return f"attention {'backward' if backward else 'forward'}", products * pairs
        if kind == "experts":
            return "matmul", _grouped_flops(*args[:2])
        if kind == "matmul":
            # torch's formulas do not expect the output dtype that some products take.
            shapes = [x for x in args if not isinstance(x, torch.dtype)]
            flops = flop_registry[func._overloadpacket](*shapes, **kwargs, out_val=result)
            is_wide = args[0].dtype == torch.float32
            is_score = is_wide and self._tracker.attribution.here().component == "indexer"
            return "fp32 matmul" if is_score else "matmul", flops
        if kind == "rows":  # a row for each index; 12 bytes are the index and what goes with it
            table, indices = args[:2] if args[0].ndim > args[1].ndim else args[1:3]
            row = table.shape[1] * table.element_size() + 12
            return "other kernels", indices.numel() * row
        if kind in ("exchange", SEQUENCE_GATHERS):
            return kind, sum([x.numel() * x.element_size() for x in tensors_in(args[0])])
        return "", 0


def base_of(kind: str) -> str:
    """Return the kind of an operation without the part in front of it."""
    return kind.rpartition(": ")[2]


@cache
def _counted_as(func) -> str:
    """Return what the cost of an operator follows from; empty where it has none."""
    packet = func._overloadpacket
    if func in _ATTENTION:
        return "attention"
    if packet is torch.ops.aten._grouped_mm:
        return "experts"
    if packet in flop_registry:
        return "matmul"
    if "embedding_bag" in func._opname:
        return "rows"
    if func.namespace == "aten" and not func.is_view and func._opname not in _MOVE_NOTHING:
        return "moved"
    # FSDP gathers into one tensor (`_allgather_base_`).
    return {"all_to_all_single": "exchange", "allgather_": SEQUENCE_GATHERS}.get(func._opname, "")


def _grouped_flops(a: Tensor, b: Tensor) -> int:
    """Return the FLOPs of the products of experts, of which torch has no formula.

    The groups divide the rows of a [S, K] with b [E, K, N], or the sum over S of a [K, S] with
    b [S, N], or the columns of b [K, S] with a [E, M, K].
    """
    both = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return 2 * both * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _causal_pairs(queries: int, keys: int) -> int:
    return queries * (queries + 1) // 2 if queries == keys else queries * keys


@dataclass(frozen=True)
class Links:
    """The links that the traffic of a rank takes."""

    gpus_per_node: int
    sequence: int
    world: int
    replicas: int = 1
    """copies of the sharded parameters; the ranks of one copy are neighbours"""

    @property
    def ranks_per_node(self) -> int:
        return min(self.world, self.gpus_per_node)

    def exchange_seconds(self, size: float, gpu: GPU) -> float:
        """Return the seconds of all-to-alls of `size` bytes in a group of neighbouring ranks.

        Traffic to ranks on the same node goes over NVLink and all other traffic over the network,
        both at the same time. The rank with the fewest neighbours on its node is the slowest.
        """
        inside = neighbours_on_node(
            sequence=self.sequence, world_size=self.world, per_node=self.gpus_per_node
        )
        near, far = (inside - 1) / self.sequence, (self.sequence - inside) / self.sequence
        return max(size * near / gpu.node_link, size * far / gpu.network)

    def fsdp_seconds(self, size: float, gpu: GPU) -> float:
        """Return the seconds of FSDP's collectives, as rings over the ranks that share parameters.

        size: bytes of the whole (unsharded) tensors. All GPUs of a node receive a part of the
        node's traffic over the network and share it over NVLink.
        """
        ranks, inside = self.world // self.replicas, self.ranks_per_node
        link = gpu.node_link if ranks <= inside else min(gpu.node_link, inside * gpu.network)
        return size * (ranks - 1) / ranks / link

    def replica_seconds(self, size: float, gpu: GPU) -> float:
        """Return the seconds of summing the gradients of shards over the replicas, as a ring.

        size: bytes of a rank's shards, of which each is sent twice. A node has a rank of as many
        rings as it has different shards, and these share its network.
        """
        inside = self.ranks_per_node
        members = max(1, inside * self.replicas // self.world)  # of a ring, on one node
        is_local = self.world <= inside
        link = gpu.node_link if is_local else min(gpu.node_link, members * gpu.network)
        return 2 * size * (self.replicas - 1) / self.replicas / link


_LIMITS = {"exchange": "network", "offloaded optimizer": "PCIe", "parameters to the GPU": "PCIe"}
"""What limits the parts of a step's time that the GPU does not compute."""


@dataclass(frozen=True)
class Time:
    """The seconds of a step, by what they are spent on."""

    parts: dict[str, float]
    """Work that runs one after the other, so that its seconds add up: matmul, the parts of `SPARSE`
    (all their kernels), attention, other kernels, exchange, parameters to the GPU (of a single
    GPU), offloaded optimizer.
    """
    hidden: dict[str, float]
    """Transfers that overlap with the computation: FSDP's collectives, and checkpoints and
    parameters over PCIe. Each lasts as long as it would alone.
    """
    waits: dict[str, float]
    """The seconds by which each transfer in `hidden` exceeds the computation that it overlaps
    with. The computation waits for them.
    """

    @property
    def seconds(self) -> float:
        return sum(self.parts.values()) + max([0.0, *self.waits.values()])

    @property
    def bottleneck(self) -> str:
        """What limits the speed of the step: "compute", "network" or "PCIe"."""
        longest = max(self.waits, key=self.waits.__getitem__)
        if self.waits[longest] > sum(self.parts.values()):
            return "network" if longest == "FSDP" else "PCIe"
        largest = max(self.parts, key=self.parts.__getitem__)
        return _LIMITS.get(largest, "compute")


def step_time(
    cost: Cost,
    *,
    exchanged: float,
    gathered: float,
    reduced: float = 0,
    on_host: Mapping[str, float],
    in_files: bool = False,
    gpu: GPU,
    links: Links,
    rates: dict[str, float],
) -> Time:
    """Return the time of a step.

    exchanged and gathered: bytes of one rank in one step, of the exchanges and of FSDP's
    collectives; reduced: those of the shards that are summed over replicas. on_host: its bytes off
    the device, by component, of the checkpoints those of all micro-batches. Checkpoints are copied
    off the device and back; in_files: they and hidden states are in files. Offloaded parameters are
    copied to the GPU twice, and their gradients to the host once. On a single GPU, FSDP2 copies
    parameters on the stream that computes (FSDPParamGroup.wait_for_unshard, where the world size is
    1), so that nothing overlaps.
    rates: see `Setup.rates`.
    """
    seconds = Counter(
        {
            key: float(amount) / rates[base]
            for key, amount in cost.amounts.items()
            if (base := base_of(key[1])) in rates
        }
    )
    exchange = links.exchange_seconds(exchanged, gpu)
    stages: Counter[str] = Counter()
    for (stage, _), s in seconds.items():
        stages[stage] += s
    # Forward, recomputation and backward are taken to have a third of the exchanges each.
    forward = stages["forward"] + exchange / 3
    backward = stages["backward"] + 2 * exchange / 3
    components = ("checkpoints", "parameters", "gradients")
    checkpoints, parameters, gradients = (on_host.get(name, 0) for name in components)
    to_gpu, to_host = 2 * parameters / gpu.host_link, gradients / gpu.host_link
    copies = min(gpu.host_link, DISK_BANDWIDTH) if in_files else gpu.host_link
    hidden = {
        "FSDP": links.fsdp_seconds(gathered, gpu) + links.replica_seconds(reduced, gpu),
        "checkpoints to the host": checkpoints / copies,
        "checkpoints back": checkpoints / copies,
        "parameters": to_host if links.world == 1 else to_gpu + to_host,
        "hidden states": (cost.total(TO_DEVICE) + cost.total(OFF_DEVICE)) / copies,
    }
    computed = {"checkpoints to the host": forward, "checkpoints back": backward}
    both = forward + backward
    waits = {name: max(0.0, s - computed.get(name, both)) for name, s in hidden.items()}
    parts = {
        **_by_part(seconds),
        "exchange": exchange,
        "parameters to the GPU": to_gpu if links.world == 1 else 0.0,
        "offloaded optimizer": _update_seconds(on_host, gpu, links.ranks_per_node),
    }
    return Time(parts, hidden, waits)


def _by_part(seconds: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Return the seconds of kernels, by component of `SPARSE` or by kind."""
    found = dict.fromkeys(("matmul", "attention", "other kernels"), 0.0)
    for (_, kind), s in seconds.items():
        part = kind.partition(": ")[0]
        part = "attention" if part.startswith("attention ") else part
        found[part] = found.get(part, 0.0) + s
    return found


def _update_seconds(on_host: Mapping[str, float], gpu: GPU, ranks: int) -> float:
    """Return the seconds that an offloaded optimizer takes, of a node with so many ranks.

    If only its state is on the host, it fetches the state and sends it back. If the parameters are
    too, it runs there, at the speed of host memory.
    """
    components = ("parameters", "gradients", "optimizer state")
    parameters, gradients, state = (on_host.get(name, 0) for name in components)
    if not parameters:
        return 2 * state / gpu.host_link
    return (2 * (parameters + state) + gradients) * ranks / gpu.host_bandwidth(ranks)


def clock(
    ticks: Sequence[Tick], time: Time, *, rates: dict[str, float], share: float
) -> list[tuple[int, float]]:
    """Return when each operation of a simulated step ends: (memory events before its end, seconds
    since the step began).

    rates: amounts per second of each kind, those of exchanges included. share: the share of the
    step's micro-batches that was simulated. The time that the computation waits is spread evenly
    over the stage that waits, and that of copies of parameters over forward and backward. The
    transfer of an offloaded optimizer's state is spread over the update.
    """
    # Copies of `memory.stream_offload` have no rate, and take no time here.
    own = [float(tick.amount) / rates.get(base_of(tick.kind), inf) for tick in ticks]
    totals: defaultdict[str, float] = defaultdict(float)
    for tick, seconds in zip(ticks, own, strict=True):
        totals[tick.stage] += seconds
    # The factor by which waiting makes each stage longer.
    longest = max(time.waits, key=time.waits.__getitem__)
    waiting = {"checkpoints to the host": {"forward"}, "checkpoints back": {"backward"}}.get(
        longest, {"forward", "backward"}
    )
    slower: defaultdict[str, float] = defaultdict(lambda: 1.0)
    copies = time.parts.get("parameters to the GPU", 0.0)
    for stages, lost in ((waiting, time.waits[longest]), ({"forward", "backward"}, copies)):
        over = sum(totals[stage] for stage in stages)
        for stage in stages if over else ():
            slower[stage] += share * lost / over
    if totals["update"]:
        slower["update"] = 1 + time.parts["offloaded optimizer"] / totals["update"]
    ends, now = [], 0.0
    for tick, seconds in zip(ticks, own, strict=True):
        now += seconds * slower[tick.stage]
        ends.append((tick.event, now))
    return ends
