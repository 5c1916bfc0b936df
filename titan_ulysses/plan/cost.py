"""What a step costs, from the same run as its memory: FLOPs, bytes moved, and the time that they
take on a GPU.

Time: matrix products, attention and all other kernels run one after the other, and so do the
exchanges, for which the computation waits. FSDP's collectives and the copies of checkpoints run
beside them: of these only what is longer than the computation counts (than that of forward for
copies to the host, than that of backward for those back).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from titan_ulysses.distributed.hardware import GPU, HOST_BANDWIDTH
from titan_ulysses.plan.memory import MemoryTracker

_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: 2,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 5,
}
"""Matrix products over the scores: two in forward; backward computes the scores again and has four
gradients.
"""


STRETCHES = {"forward": "forward", "recomputation": "backward", "backward": "backward"}
"""Of the phases of a step; all else is the "update"."""

KINDS = ("matmul", "attention forward", "attention backward", "other kernels")


@dataclass
class Cost:
    """Of one rank and one step. Additive."""

    amounts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(stretch, kind): FLOPs of "matmul", "attention forward", "attention backward", recomputation
    included, and bytes that "other kernels" read and write
    """

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.amounts + other.amounts)

    def __mul__(self, times: float) -> Cost:
        return Cost(Counter({key: amount * times for key, amount in self.amounts.items()}))

    def total(self, kind: str) -> float:
        return sum(amount for (_, of_kind), amount in self.amounts.items() if of_kind == kind)

    @property
    def flops(self) -> float:
        return sum(map(self.total, ("matmul", "attention forward", "attention backward")))


class Tick(NamedTuple):
    """One operation on the clock of a step."""

    event: int
    """how many of `MemoryTracker.events` came before the operation ended"""
    stretch: str
    kind: str
    """as in `Cost.amounts`, or "exchange", whose amount is in bytes"""
    amount: float
    """of this kind and stretch, up to and with this operation"""


class CostCounter:
    """An observer of `MemoryTracker`: adds up what each operation costs, as often as it stands
    for.
    """

    def __init__(self, tracker: MemoryTracker, scores: dict[int | None, float]):
        """scores: of each layer the (query, key) pairs of a row, where they are not those of the
        call (`Standin`).
        """
        self.cost, self._tracker, self._scores = Cost(), tracker, scores
        self.ticks: list[Tick] = []
        self._exchanged: Counter[str] = Counter()
        """bytes, by stretch"""
        self._latest: Counter[tuple[str, str]] = Counter()
        tracker.observers.append(self)

    def take(self) -> Cost:
        """What has been counted since the last time."""
        cost, self.cost = self.cost, Cost()
        self.ticks, self._exchanged, self._latest = [], Counter(), Counter()
        return cost

    def __call__(self, func, args: tuple, kwargs: dict, result) -> None:
        weight = self._tracker.weight
        stretch = STRETCHES.get(self._tracker.attribution.phase, "update")
        if func in _ATTENTION:
            backward = _ATTENTION[func] == 5
            query, key = args[1:3] if backward else args[:2]
            pairs = self._scores.get(self._tracker.attribution.here().layer) or _causal_pairs(
                query.shape[2], key.shape[2]
            )
            products = _ATTENTION[func] * 2 * query.shape[0] * query.shape[1] * query.shape[3]
            kind = "attention backward" if backward else "attention forward"
            self.cost.amounts[stretch, kind] += products * pairs * weight
        elif (packet := func._overloadpacket) in flop_registry:
            self.cost.amounts[stretch, "matmul"] += weight * flop_registry[packet](
                *args, **kwargs, out_val=result
            )
        elif func.namespace == "aten" and not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.cost.amounts[stretch, "other kernels"] += weight * sum(
                x.numel() * x.element_size() for x in tensors
            )
        elif func._opname == "all_to_all_single":
            self._exchanged[stretch] += args[0].numel() * args[0].element_size()
        self._tick(stretch)

    def _tick(self, stretch: str) -> None:
        """Note the amounts that the operation changed."""
        event, amounts = len(self._tracker.events), self.cost.amounts
        now = {kind: amounts[stretch, kind] for kind in KINDS} | {
            "exchange": self._exchanged[stretch]
        }
        for kind, amount in now.items():
            if amount != self._latest[stretch, kind]:
                self._latest[stretch, kind] = amount
                self.ticks.append(Tick(event, stretch, kind, amount))


def _causal_pairs(queries: int, keys: int) -> float:
    return queries * (queries + 1) / 2 if queries == keys else queries * keys


@dataclass(frozen=True)
class Links:
    """Which links a rank's traffic takes."""

    gpus_per_node: int
    sequence: int
    world: int

    @property
    def ranks_per_node(self) -> int:
        return min(self.world, self.gpus_per_node)

    def exchange_seconds(self, size: float, gpu: GPU) -> float:
        """All-to-alls over neighbours: to ranks on the same node by NVLink, to others by the
        network.
        """
        inside = min(self.sequence, self.gpus_per_node)
        near, far = (inside - 1) / self.sequence, (self.sequence - inside) / self.sequence
        return max(size * near / gpu.node_link, size * far / gpu.network)

    def fsdp_seconds(self, size: float, gpu: GPU) -> float:
        """Rings over all ranks (size: of whole parameters): what comes into a node is shared by
        NVLink in it.
        """
        inside = self.ranks_per_node
        share = (self.world - 1) / self.world
        link = gpu.node_link if self.world <= inside else min(gpu.node_link, inside * gpu.network)
        return size * share / link


@dataclass(frozen=True)
class Time:
    """Seconds of a step, by what they are spent on."""

    parts: dict[str, float]
    """matmul, attention, other kernels, exchange, offloaded optimizer: these add up."""
    hidden: dict[str, float]
    """FSDP, checkpoints and parameters over PCIe: beside the others, as far as those last."""
    waits: dict[str, float]
    """Of each of these what the computation waits for."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values()) + max([0.0, *self.waits.values()])

    @property
    def bottleneck(self) -> str:
        """What makes the step as long as it is: "compute", "network" or "PCIe"."""
        longest = max(self.waits, key=self.waits.__getitem__)
        if self.waits[longest] > sum(self.parts.values()):
            return "network" if longest == "FSDP" else "PCIe"
        largest = max(self.parts, key=self.parts.__getitem__)
        return {"exchange": "network", "offloaded optimizer": "PCIe"}.get(largest, "compute")


@dataclass(frozen=True)
class Offloaded:
    """Bytes of a rank that are in host memory."""

    checkpoints: float = 0
    """of all the batches of a step"""
    parameters: float = 0
    gradients: float = 0
    optimizer_state: float = 0


def kernel_rates(gpu: GPU) -> dict[str, float]:
    """FLOP/s of the kinds of products, bytes/s of the other kernels."""
    rates = gpu.matmul, gpu.attention_forward, gpu.attention_backward, gpu.memory_bandwidth
    return dict(zip(KINDS, rates, strict=True))


def step_time(
    cost: Cost, *, exchanged: float, gathered: float, offloaded: Offloaded, gpu: GPU, links: Links
) -> Time:
    """exchanged and gathered: bytes of a rank and step.

    Checkpoints go to the host and come back; parameters come twice and their gradients go. An
    optimizer whose state alone is on the host fetches it and sends it back; one whose parameters
    are there too is as fast as host memory.
    """
    rates = kernel_rates(gpu)
    seconds = Counter({key: amount / rates[key[1]] for key, amount in cost.amounts.items()})
    exchange = links.exchange_seconds(exchanged, gpu)
    stretches = {
        name: sum(s for (stretch, _), s in seconds.items() if stretch == name)
        for name in STRETCHES.values()
    }
    forward = stretches["forward"] + exchange / 3
    backward = stretches["backward"] + 2 * exchange / 3
    hidden = {
        "FSDP": links.fsdp_seconds(gathered, gpu),
        "checkpoints to the host": offloaded.checkpoints / gpu.host_link,
        "checkpoints back": offloaded.checkpoints / gpu.host_link,
        "parameters": (2 * offloaded.parameters + offloaded.gradients) / gpu.host_link,
    }
    if offloaded.parameters:
        moved = 2 * (offloaded.parameters + offloaded.optimizer_state) + offloaded.gradients
        update = moved * links.ranks_per_node / HOST_BANDWIDTH
    else:
        update = 2 * offloaded.optimizer_state / gpu.host_link
    waits = {
        "FSDP": max(0.0, hidden["FSDP"] - forward - backward),
        "checkpoints to the host": max(0.0, hidden["checkpoints to the host"] - forward),
        "checkpoints back": max(0.0, hidden["checkpoints back"] - backward),
        "parameters": max(0.0, hidden["parameters"] - forward - backward),
    }
    parts = {
        "matmul": sum(s for (_, kind), s in seconds.items() if kind == "matmul"),
        "attention": sum(s for (_, kind), s in seconds.items() if kind.startswith("attention")),
        "other kernels": sum(s for (_, kind), s in seconds.items() if kind == "other kernels"),
        "exchange": exchange,
        "offloaded optimizer": update,
    }
    return Time(parts, hidden, waits)


def clock(
    ticks: Sequence[Tick], time: Time, *, rates: dict[str, float], share: float
) -> list[tuple[int, float]]:
    """When each operation of a simulated step ends: (events before its end, seconds since the step
    began).

    rates: amounts a second, of the exchange too. share: of the step's batches, how much was
    simulated. What the computation waits for is spread over the stretch that waits, as is the
    transfer of an offloaded optimizer.
    """
    latest: defaultdict[tuple[str, str], float] = defaultdict(float)
    own: list[float] = []
    for tick in ticks:
        key = tick.stretch, tick.kind
        own.append((tick.amount - latest[key]) / rates[tick.kind])
        latest[key] = tick.amount
    totals: defaultdict[str, float] = defaultdict(float)
    for tick, seconds in zip(ticks, own, strict=True):
        totals[tick.stretch] += seconds
    longest = max(time.waits, key=time.waits.__getitem__)
    waiting = {"checkpoints to the host": {"forward"}, "checkpoints back": {"backward"}}.get(
        longest, {"forward", "backward"}
    )
    over = sum(totals[stretch] for stretch in waiting)
    slower = (
        {stretch: 1 + share * time.waits[longest] / over for stretch in waiting} if over else {}
    )
    if totals["update"]:
        slower["update"] = 1 + time.parts["offloaded optimizer"] / totals["update"]
    ends, now = [], 0.0
    for tick, seconds in zip(ticks, own, strict=True):
        now += seconds * slower.get(tick.stretch, 1.0)
        ends.append((tick.event, now))
    return ends
