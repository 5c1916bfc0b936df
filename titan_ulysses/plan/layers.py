"""Simulates a model of many layers by two models with few.

Layers are alike, or repeat with a period, so a step of a longer model repeats what its layers do. A
model with few layers is simulated, and one with a period of layers more. What the second has more
than the first is what a period does: it is inserted again, as often as the whole model has it, with
the numbers of its layers. What is of no layer, such as the norm of all gradients, grows by the same
amount with each period.

The result is the simulation of the whole model, to the byte and the FLOP. Where the two models do
not differ by layers alone, the whole model is simulated.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import replace
from itertools import groupby
from math import lcm
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from titan_ulysses.model.families import layer_types
from titan_ulysses.plan.attribution import Owner
from titan_ulysses.plan.cost import Cost, Tick
from titan_ulysses.plan.memory import Allocation, History, Moment
from titan_ulysses.plan.simulate import Simulation, no_garbage_collection, simulate
from titan_ulysses.setup.resolve import RunSpec

_IRREGULAR = ("num_kv_shared_layers",)
"""Numbers of layers at the end of a model that differ from the others."""


def simulate_by_layers(spec: RunSpec, **options: Any) -> Simulation:
    """Do what `simulate` does, with the same arguments, of as few layers as tell all."""
    few: Simulation | None = None
    with no_garbage_collection():
        for count in layers_to_simulate(spec):
            more = simulate(_with_layers(spec, count), **options)
            try:
                if few is not None:
                    return _Longer(spec, few, more).simulation()
            except _NotAlike:
                pass
            few = more
        return simulate(spec, **options)


def layers_to_simulate(spec: RunSpec) -> list[int]:
    """Return numbers of layers of which two that follow each other stand for all; empty where no
    fewer would do.

    Each has a period of layers and checkpoints more than the one before. All have the leading
    layers that differ from all that follow, as in DeepSeek-V3. Of those, the first has a first
    checkpoint, a last one, and one between, which streamed blocks that share a checkpoint can do
    without. Only with a third one, two layers of each kind are in two of them: the first one and
    the last one of a kind may differ from those between.
    """
    model = spec.model_config
    layers = getattr(model, "num_hidden_layers", 0)
    irregular = any(getattr(model, name, None) for name in _IRREGULAR)
    if irregular or getattr(model, "is_heterogeneous", False) or spec.frozen is not None:
        return []
    every, period, lead = _every(spec), _whole_period(spec), _leading(spec)
    is_streamed = every > 1 and spec.config.memory.stream_chunk_tokens >= 0
    least = max((2 if is_streamed else 3) * every, period)
    # As many are left over as in the whole model.
    few = lead + least + (layers - lead - least) % period
    counts = [few, few + period] + [few + 2 * period] * (period > every or is_streamed)
    is_shorter = counts[0] + counts[1] < layers
    return [count for count in counts if count < layers] if is_shorter else []


def _every(spec: RunSpec) -> int:
    """Return the layers of a checkpoint."""
    checkpoint = spec.config.activation_checkpoint
    return checkpoint.every if checkpoint.mode == "full" else 1


def _whole_period(spec: RunSpec) -> int:
    return lcm(_pattern(spec.model_config)[1], _every(spec))


def _leading(spec: RunSpec) -> int:
    """Return how many layers come before those that repeat, in whole checkpoints."""
    lead, every = _pattern(spec.model_config)[0], _every(spec)
    return -(-lead // every) * every


def _pattern(model: PreTrainedConfig) -> tuple[int, int]:
    """Return how many layers come first that do not repeat, and after how many the others do."""
    layers = model.num_hidden_layers
    # Some families have no list of kinds, but places of one kind (bamba).
    lists = [*_lists_by_layer(model, layers).values(), layer_types(model) or [""] * layers]
    dense = getattr(model, "first_k_dense_replace", None) or 0
    kinds = [(i < dense, *of_layer) for i, of_layer in enumerate(zip(*lists, strict=True))]
    return min(
        (
            (lead, p)
            for lead in range(layers)
            for p in range(1, layers - lead + 1)
            if kinds[lead + p :] == kinds[lead : layers - p]
        ),
        key=lambda found: (sum(found), found),
    )


def _lists_by_layer(model: PreTrainedConfig, layers: int) -> dict[str, list]:
    return {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, list) and len(value) == layers
    }


def _with_layers(spec: RunSpec, layers: int) -> RunSpec:
    """Return spec for the first layers of its model."""
    model = copy.deepcopy(spec.model_config)
    for name, kinds in _lists_by_layer(model, model.num_hidden_layers).items():
        setattr(model, name, kinds[:layers])
    model.num_hidden_layers = layers
    return replace(spec, model_config=model, whole_config=model)


class _NotAlike(Exception):
    """Two simulations do not differ by layers alone."""


class _Entry(NamedTuple):
    """A memory event or the cost of an operation, in the order of a step."""

    layer: int | None
    event: int
    """the number of memory events before it"""
    tick: Tick | None
    """None: it is the memory event"""


class _Step:
    """A simulated step, and what two of them are compared by.

    Layers before `head` are counted from the first, those from `tail` on from the last. Those
    between are the ones that the longer of two models has more. numbers: of what both have, in
    place of long keys.
    """

    def __init__(
        self, simulation: Simulation, numbers: dict[Hashable, int], *, head: int, tail: int
    ) -> None:
        self.simulation, self.memory = simulation, simulation.memory
        self.layers = simulation.layers
        self.head, self.tail, self._numbers = head, tail, numbers
        self._names: dict[int, int] = {}
        self.entries = self._entries()
        self.identities = self._identities()

    def is_between(self, layer: int | None) -> bool:
        return layer is not None and self.head <= layer < self.tail

    def is_tail(self, layer: int | None) -> bool:
        return layer is not None and layer >= self.tail

    def _entries(self) -> list[_Entry]:
        events, layers = self.memory.events, self.memory.layers
        ticks: defaultdict[int, list[_Entry]] = defaultdict(list)
        for tick in self.simulation.ticks:
            ticks[tick.event].append(_Entry(tick.layer, tick.event, tick))
        found: list[_Entry] = []
        for at, ((one, _), layer) in enumerate(zip(events, layers, strict=True)):
            found += ticks[at]
            found.append(_Entry(one.layer if layer is None else layer, at, None))
        return found + ticks[len(events)]

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _identities(self) -> dict[int, tuple[int | None, int]]:
        """By the id of an allocation, the layer that allocates it, and what it alone has there: the
        same as in other layers that are alike.
        """
        counts = Counter[Hashable]()
        found: dict[int, tuple[int | None, int]] = {}
        for entry in self.entries:
            one, _ = self.memory.events[entry.event] if entry.tick is None else (None, 0)
            if one is None or id(one) in found:
                continue
            shape = () if entry.layer is None else one.shape
            key = self._number((self._without_layer(one.made), shape, one.dtype))
            found[id(one)] = entry.layer, self._number((key, counts[entry.layer, key]))
            counts[entry.layer, key] += 1
        return found

    def comparable(self, entry: _Entry) -> Hashable:
        """Return what entries of two steps have in common if they are the same."""
        place = self._place(entry.layer)
        if (tick := entry.tick) is not None:
            return place, tick.stage, tick.kind, None if place is None else tick.amount
        one, change = self.memory.events[entry.event]
        layer, identity = self.identities[id(one)]
        moment = self._without_layer(self.memory.moments[entry.event])
        size = change > 0 if layer is None else change
        return place, identity, one.component, one.place, moment, size

    def uses(self, entry: _Entry) -> tuple[int | None, int | None]:
        """Return the layer that allocates what an event is of: how many it is after the event's,
        and its place.
        """
        layer, _ = self.identities[id(self.memory.events[entry.event][0])]
        after = None if layer is None or entry.layer is None else layer - entry.layer
        return after, self._place(layer)

    def _place(self, layer: int | None) -> int | None:
        if layer is None or not self.is_tail(layer):
            return layer
        return layer - self.layers

    def _without_layer(self, moment: Moment) -> int:
        if (found := self._names.get(id(moment))) is None:
            owner, name = moment.owner, moment.owner.module
            if owner.layer is not None:
                name = re.sub(rf"\.{owner.layer}(?=\.|$)", "", name, count=1)
            key = moment.phase, owner.component, name, moment.operation, moment.created_in
            found = self._names[id(moment)] = self._number(key)
        return found


class _Longer:
    """The simulation of all layers of a model, from two with few."""

    def __init__(self, spec: RunSpec, few: Simulation, more: Simulation) -> None:
        self.period = more.layers - few.layers
        # Periods are inserted behind the first one, in which is the first layer of each kind.
        lead = _leading(spec)
        head = lead + (self.period if few.layers - lead >= 2 * self.period else _every(spec))
        self.times = (spec.model_config.num_hidden_layers - few.layers) // self.period
        """how many periods all layers have more than the few"""
        numbers: dict[Hashable, int] = {}
        self.few = _Step(few, numbers, head=head, tail=head)
        self.more = _Step(more, numbers, head=head, tail=head + self.period)
        self.memory, self.ticks = History(), list[Tick]()
        self._made: dict[tuple[int | None, int], Allocation] = {}
        self._moments: dict[tuple[int, int], Moment] = {}
        self._owners: dict[tuple[Owner, int], Owner] = {}

    def simulation(self) -> Simulation:
        few, more = self.few.simulation, self.more.simulation
        start = self._write()
        return Simulation(
            self.memory,
            start,
            {
                kind: (self._at_all(of[0], both[0]), self._at_all(of[1], both[1]))
                for kind, both in more.collectives.items()
                for of in [few.collectives.get(kind, (0, 0))]
            },
            Cost(
                Counter(
                    {
                        key: self._at_all(few.cost.amounts[key], amount)
                        for key, amount in more.cost.amounts.items()
                    }
                )
            ),
            self.ticks,
            more.batches,
            self._at_all(few.flops_per_token, more.flops_per_token),
            more.model,
        )

    def _at_all(self, few: Any, more: Any) -> Any:
        """Return an amount for all layers: each period adds the same."""
        return more + (self.times - 1) * (more - few)

    def _write(self) -> int:
        """Write events and ticks. Returns the step's first event."""
        parts = [
            [*group]
            for _, group in groupby(self.more.entries, lambda x: self.more.is_between(x.layer))
        ]
        own = [part for part in parts if not self.more.is_between(part[0].layer)]
        if sum(map(len, own)) != len(self.few.entries):
            raise _NotAlike
        start, partners = None, iter(self.few.entries)
        for at, entries in enumerate(parts):
            if self.more.is_between(entries[0].layer):
                before, after = parts[max(0, at - 1)][-1], parts[(at + 1) % len(parts)][0]
                for time in self._order(entries, before.layer, after.layer):
                    for entry in entries:
                        self._repeat(entry, time * self.period)
                continue
            for entry in entries:
                partner = next(partners)
                if self.more.comparable(entry) != self.few.comparable(partner):
                    raise _NotAlike
                if start is None and entry.event >= self.more.simulation.start:
                    start = len(self.memory.events)
                is_tail = self.more.is_tail(entry.layer)
                self._repeat(entry, (self.times - 1) * self.period if is_tail else 0, partner)
        return start or 0

    def _order(self, entries: list[_Entry], before: int | None, after: int | None) -> range:
        """Return the order of periods: that of the layers in a period, or around it. In backward,
        and where the members of a list are released, the last layer is the first.
        """
        own = [entry.layer for entry in entries if entry.layer is not None]
        inside = [layer for layer in own if layer != own[0]]
        around = [layer for layer in (before, *own, after) if layer is not None]
        first, last = (own[0], inside[-1]) if inside else (around[0], around[-1])
        return range(self.times)[:: 1 if first < last else -1]

    def _repeat(self, entry: _Entry, shift: int, partner: _Entry | None = None) -> None:
        """Write an entry, of a layer whose number is higher by shift. partner: the same entry of
        the model with few layers.
        """
        if (tick := entry.tick) is not None:
            amount = tick.amount
            if partner is not None and entry.layer is None:
                amount = self._at_all(partner.tick.amount, amount)
            layer = None if tick.layer is None else tick.layer + shift
            event = len(self.memory.events)
            self.ticks.append(Tick(event, tick.stage, tick.kind, amount, layer))
            return
        one, change = self.more.memory.events[entry.event]
        layer, identity = self.more.identities[id(one)]
        shift_of = shift
        if layer is None:
            if partner is None:
                raise _NotAlike  # each layer would release it
            of_few, of_few_change = self.few.memory.events[partner.event]
            change = self._at_all(of_few_change, change)
            found: Allocation | None = self._made.get((None, identity))
            found = self._made[None, identity] = found or self._without_number(of_few, one)
        else:
            if partner is not None:
                shift_of = self._shift_of(entry, partner, layer, shift)
            key = layer + shift_of, identity
            found = self._made.get(key)
            if found is None:
                if change < 0:
                    raise _NotAlike
                found = self._made[key] = self._numbered(one, shift_of)
        at = self.more.memory.layers[entry.event]
        self.memory.layers.append(None if at is None else at + shift)
        self.memory.events.append((found, change))
        self.memory.moments.append(self._moment(self.more.memory.moments[entry.event], shift))

    def _shift_of(self, entry: _Entry, partner: _Entry, layer: int, shift: int) -> int:
        """Return by how much the number of the layer is higher that allocates what an event is of.

        It is as far from the event's layer in both models, or from an end of the model.
        """
        (after, place), of_few = self.more.uses(entry), self.few.uses(partner)
        if after is not None and after == of_few[0]:
            return shift
        if place != of_few[1]:
            raise _NotAlike
        return (self.times - 1) * self.period if self.more.is_tail(layer) else 0

    def _without_number(self, few: Allocation, more: Allocation) -> Allocation:
        """Return an allocation of no layer: its shape grows with their number."""
        if len(few.shape) != len(more.shape):
            raise _NotAlike
        return replace(more, shape=tuple(map(self._at_all, few.shape, more.shape)))

    def _numbered(self, one: Allocation, shift: int) -> Allocation:
        label, layer = one.label, one.layer
        if shift and label:
            label = _LAYER.sub(lambda found: str(int(found[0]) + shift), label, count=1)
        layer = None if layer is None else layer + shift
        made = self._moment(one.made, shift)
        return Allocation(one.component, one.place, made, one.shape, one.dtype, label, layer)

    def _moment(self, moment: Moment, shift: int) -> Moment:
        owner = moment.owner
        if not shift or owner.layer is None:
            return moment
        if (found := self._moments.get((id(moment), shift))) is None:
            if (other := self._owners.get((owner, shift))) is None:
                layer = owner.layer + shift
                name = re.sub(rf"\.{owner.layer}(?=\.|$)", f".{layer}", owner.module, count=1)
                other = self._owners[owner, shift] = Owner(owner.component, name, layer)
            found = Moment(moment.phase, other, moment.operation, moment.created_in)
            self._moments[id(moment), shift] = found
        return found


_LAYER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=layer )\d+")
"""The number of a layer in the name of a parameter, or in words."""
