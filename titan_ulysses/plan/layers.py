"""Simulates a model of many layers by two models with few.

Layers are alike, or repeat with a period, so a step of a longer model repeats what its layers do. A
model with few layers is simulated, and one with a period of layers more. What the second has more
than the first is what a period does: it is inserted again, as often as the whole model has it, with
the numbers of its layers. What is of no layer, such as the norm of all gradients, grows by the same
amount with each period.

The result is the simulation of the whole model, to the byte and the FLOP. Where the two models do
not differ by layers alone, the whole model is simulated. What the smaller one tells is kept: of
another length with the same settings, only the larger one is simulated.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import replace
from fractions import Fraction
from itertools import groupby, pairwise
from math import lcm
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from titan_ulysses.model.families import layer_types
from titan_ulysses.plan.attribution import Owner
from titan_ulysses.plan.cost import Amount, Cost, Tick
from titan_ulysses.plan.memory import Allocation, History, Moment
from titan_ulysses.plan.simulate import Simulation, no_garbage_collection, simulate
from titan_ulysses.setup.resolve import RunSpec

_IRREGULAR = ("num_kv_shared_layers",)
"""Numbers of layers at the end of a model that differ from the others."""


class _Cut(NamedTuple):
    """Numbers of layers of two models that stand for all, of which the second has a period more,
    behind the first `head` layers.
    """

    few: int
    more: int
    head: int


def simulate_by_layers(spec: RunSpec, **options: Any) -> Simulation:
    """Do what `simulate` does, with the same arguments, of as few layers as tell all."""
    done: dict[int, Simulation] = {}

    def simulated(layers: int) -> Simulation:
        if layers not in done:
            done[layers] = simulate(_with_layers(spec, layers), **options)
        return done[layers]

    with no_garbage_collection():
        keys = {_key(spec, cut, options): cut for cut in cuts(spec)}
        for key in sorted(keys, key=lambda key: key not in _KNOWN):  # those last that failed before
            cut, known = keys[key], _KNOWN.get(key)
            more = _Step(simulated(cut.more), cut, known.numbers if known else {})
            try:
                if known is None or not known.hold_of(more):
                    known = _Pairs(_Step(simulated(cut.few), cut, more.numbers), more)
                    _KNOWN.clear()
                    _KNOWN[key] = known
                return _Longer(spec, more, known).simulation()
            except _NotAlike:
                pass
        return simulate(spec, **options)


def _key(spec: RunSpec, cut: _Cut, options: dict[str, Any]) -> Hashable:
    """Return all that a simulation depends on but the length of the sequence."""
    same = type(spec.config).model_validate(spec.config.model_dump())  # a default -1 becomes -1.0
    settings = same.model_dump(exclude={"plan": True, "job": True, "training": {"seq_len"}})
    core = getattr(spec.core, "core", spec.core)
    return repr((cut, settings, spec.model_config.to_dict(), spec.degrees, core, options))


def cuts(spec: RunSpec) -> list[_Cut]:
    """Return pairs of models of which one stands for all layers, those first that are tried first;
    none where no fewer would do.

    All have the leading layers that differ from all that follow. Of those that follow, there is a
    first checkpoint, a last one, and one between. Streamed blocks that share a checkpoint can do
    without the one between, where the inputs of all checkpoints are treated alike: the input of the
    last one is not copied off the device. Two layers of each kind are in two of more models: the
    first one and the last one of a kind may differ from those between.
    """
    model, config = spec.model_config, spec.config
    layers = getattr(model, "num_hidden_layers", 0)
    irregular = any(getattr(model, name, None) for name in _IRREGULAR)
    if irregular or getattr(model, "is_heterogeneous", False) or spec.frozen is not None:
        return []
    every = _every(spec)
    leading, kinds = _pattern(model)
    lead = -(-leading // every) * every  # in whole checkpoints
    copied = config.activation_checkpoint.offload != "none"
    is_streamed = config.memory.stream_chunk_tokens >= 0 and every > 1
    least = 2 if is_streamed and (config.memory.stream_offload != "none" or not copied) else 3
    period = lcm(kinds, every)
    fewest = lead + max(least * every, period)
    fewest += (layers - fewest) % period  # as many are left over as in the whole model
    sizes = range(fewest, layers, period)[: 3 if period > every or least == 2 else 2]
    if sum(sizes[:2]) >= layers:
        return []
    return [
        _Cut(few, more, lead + (period if few - lead >= 2 * period else every))
        for few, more in pairwise(sizes)
    ]


def _every(spec: RunSpec) -> int:
    """Return the layers of a checkpoint."""
    checkpoint = spec.config.activation_checkpoint
    return checkpoint.every if checkpoint.mode == "full" else 1


def _pattern(model: PreTrainedConfig) -> tuple[int, int]:
    """Return how many layers come first that do not repeat, as in DeepSeek-V3, and after how many
    the others do.
    """
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

    def __init__(self, simulation: Simulation, cut: _Cut, numbers: dict[Hashable, int]) -> None:
        self.simulation, self.memory, self.cut = simulation, simulation.memory, cut
        self.layers, self.head = simulation.layers, cut.head
        self.tail = cut.head + self.layers - cut.few
        self.numbers = numbers
        self._names: dict[int, int] = {}
        self.entries = self._entries()
        self.identities = self._identities()
        self._near = {self._from_here(x) for x in self.entries if self.is_between(x.layer)}

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
        return self.numbers.setdefault(key, len(self.numbers))

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
        place = self.place(entry.layer)
        if (tick := entry.tick) is not None:
            return place, tick.stage, tick.kind, None if place is None else tick.amount
        one, change = self.memory.events[entry.event]
        layer, identity = self.identities[id(one)]
        moment = self._without_layer(self.memory.moments[entry.event])
        size = change > 0 if layer is None else change
        return place, identity, one.component, one.place, moment, size

    def growing(self, entry: _Entry) -> tuple[Amount, ...]:
        """Return what may be more in a model of more layers, because it is of none: the amount, and
        the shape.
        """
        if entry.tick is not None:
            return (entry.tick.amount,) if entry.layer is None else ()
        one, change = self.memory.events[entry.event]
        return (change, *one.shape) if self.identities[id(one)][0] is None else ()

    def kind(self, entry: _Entry) -> tuple[Any, ...]:
        """Return what entries of any length have in common that do the same, maybe many times."""
        if (tick := entry.tick) is not None:
            return entry.layer, tick.stage, tick.kind
        one, change = self.memory.events[entry.event]
        moment = self._without_layer(self.memory.moments[entry.event])
        made = self._without_layer(one.made)
        maker = self.maker(entry)
        return entry.layer, maker, one.component, one.place, moment, made, one.dtype, change > 0

    def maker(self, entry: _Entry) -> int | None:
        """Return the layer that allocates what a memory event is of."""
        return self.identities[id(self.memory.events[entry.event][0])][0]

    def crosses(self, entry: _Entry) -> bool:
        """Return whether entry is of memory of a layer that a longer model may have farther away:
        of those at the head, those between and those at the tail, it is not among the same.
        """
        maker = None if entry.tick is not None else self.maker(entry)
        return maker is not None and self._part(maker) != self._part(entry.layer)

    def _part(self, layer: int | None) -> int | None:
        return None if layer is None else (layer >= self.head) + (layer >= self.tail)

    def _from_here(self, entry: _Entry) -> Hashable:
        """Return the kind of an event of another layer's memory, and how many layers after its own
        that one is; None where the two layers are in the same part, or one is none.
        """
        if entry.layer is None or not self.crosses(entry):
            return None
        layer, maker, *rest = self.kind(entry)
        return (maker - layer, *rest)

    def reaches(self, entry: _Entry, follows: bool) -> int | None:
        """Return which layer allocates what an event is of: how many layers after the event's if it
        follows that one, else its place.
        """
        maker = self.maker(entry)
        if maker is None or entry.layer is None or not follows:
            return self.place(maker)
        return maker - entry.layer

    def follows(self, entry: _Entry) -> bool:
        """Return whether the layer that allocates what an event is of is as far from the event's
        layer in a longer model: if it is one between, or if those between do the same. Otherwise it
        is as far from an end of the model.
        """
        where = self._from_here(entry)
        return where is not None and (self.is_between(self.maker(entry)) or where in self._near)

    def place(self, layer: int | None) -> int | None:
        if layer is None or not self.is_tail(layer):
            return layer
        return layer - self.layers

    def collectives(self) -> tuple[dict, dict[str, tuple[int, int]]]:
        """Return those of the layers that the smaller model has too, and those of no layer."""
        of = self.simulation.collectives_of
        own = {self.place(k): n for k, n in of.items() if n and not self.is_between(k)}
        return own, own.pop(None, {})

    def _without_layer(self, moment: Moment) -> int:
        if (found := self._names.get(id(moment))) is None:
            owner, name = moment.owner, moment.owner.module
            if owner.layer is not None:
                name = re.sub(rf"\.{owner.layer}(?=\.|$)", "", name, count=1)
            key = moment.phase, owner.component, name, moment.operation, moment.created_in
            found = self._names[id(moment)] = self._number(key)
        return found


class _Pairs:
    """What a model with few layers tells about the entries of one with more that both have."""

    def __init__(self, few: _Step, more: _Step) -> None:
        own = [entry for entry in more.entries if not more.is_between(entry.layer)]
        if len(own) != len(few.entries):
            raise _NotAlike
        grown: defaultdict[Hashable, list[tuple[tuple, tuple]]] = defaultdict(list)
        for mine, its in zip(own, few.entries, strict=True):
            if more.comparable(mine) != few.comparable(its):
                raise _NotAlike
            if amounts := more.growing(mine):
                growth = _minus(amounts, few.growing(its))
                grown[more.kind(mine)].append((amounts, growth))
            if more.crosses(mine):
                follows = more.follows(mine)
                if more.reaches(mine, follows) != few.reaches(its, follows):
                    raise _NotAlike
        self.numbers = more.numbers
        self.grown = {k: both for k, both in grown.items() if any(any(g) for _, g in both)}
        """By kind of entries that grow, the amounts of each, and by how much each period adds."""
        (of_layers, alone), (all_of_layers, self._alone) = few.collectives(), more.collectives()
        if of_layers != all_of_layers:
            raise _NotAlike
        self.alone = {k: _minus(n, alone.get(k, (0, 0))) for k, n in self._alone.items()}
        self.flops = more.simulation.flops_per_token - few.simulation.flops_per_token

    def hold_of(self, more: _Step) -> bool:
        """Return whether they hold of the same model with another length of the sequence too.

        Amounts that grow with the layers must not depend on the length.
        """
        grown: dict[Hashable, list[tuple]] = {kind: [] for kind in self.grown}
        for entry in more.entries:
            if more.is_between(entry.layer):
                continue
            kind = more.kind(entry)
            if kind in grown:
                grown[kind].append(more.growing(entry))
            if entry.layer is None and more.crosses(entry) and more.is_between(more.maker(entry)):
                return False
        alone = more.collectives()[1]
        both: list[tuple] = [(alone.get(k), self._alone[k], n) for k, n in self.alone.items()]
        for of_kind, known in self.grown.items():
            if len(grown[of_kind]) != len(known):
                return False
            both += [(a, *one) for a, one in zip(grown[of_kind], known, strict=True)]
        return all(a == b for a, b, growth in both if any(growth))


def _minus(more: tuple, few: tuple) -> tuple:
    if len(more) != len(few):
        raise _NotAlike
    return tuple(a - b for a, b in zip(more, few, strict=True))


_KNOWN: dict[Hashable, _Pairs] = {}
"""The latest pairs: a search goes from one length to the next of the same settings."""


class _Longer:
    """The simulation of all layers of a model, from one with few and what pairs of layers tell."""

    def __init__(self, spec: RunSpec, more: _Step, pairs: _Pairs) -> None:
        self.spec, self.more, self.pairs = spec, more, pairs
        self.period = more.tail - more.head
        further = spec.model_config.num_hidden_layers - more.layers
        self.times = further // self.period + 1
        """how often the layers between are there"""
        self.memory, self.ticks = History(), list[Tick]()
        self._seen = Counter[Hashable]()
        self._made: dict[tuple[int | None, int], Allocation] = {}
        self._moments: dict[tuple[int, int], Moment] = {}
        self._owners: dict[tuple[Owner, int], Owner] = {}

    def simulation(self) -> Simulation:
        more = self.more.simulation
        start = self._write()
        costs = Counter[tuple[str, str]]()
        for tick in self.ticks:
            costs[tick.stage, tick.kind] += tick.amount  # type: ignore[assignment]
        times = Fraction(self.spec.degrees.accumulation_steps, more.batches)
        cost = Cost(Counter({k: times * n for k, n in costs.items() if k[1] != "exchange"}))
        flops = self._at_all(more.flops_per_token, self.pairs.flops)
        collectives: dict[int | None, dict[str, tuple[int, int]]] = {None: self._collectives()}
        return Simulation(
            self.memory, start, collectives, cost, self.ticks, more.batches, flops, more.model
        )

    def _at_all(self, more: Any, growth: Any) -> Any:
        """Return an amount for all layers: each period adds the same."""
        return more + (self.times - 1) * growth

    def _collectives(self) -> dict[str, tuple[int, int]]:
        totals: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for layer, counts in self.more.simulation.collectives_of.items():
            times = self.times if self.more.is_between(layer) else 1
            for kind, own in counts.items():
                growth = self.pairs.alone[kind] if layer is None else (0, 0)
                calls, size = map(self._at_all, own, growth)
                before = totals[kind]
                totals[kind] = before[0] + times * calls, before[1] + times * size
        return dict(totals)

    def _write(self) -> int:
        """Write events and ticks. Returns the step's first event."""
        more, start, end = self.more, None, 0
        for is_between, group in groupby(more.entries, lambda x: more.is_between(x.layer)):
            entries = [*group]
            first, end = end, end + len(entries)
            for time in self._order(first, end) if is_between else [self.times - 1]:
                for entry in entries:
                    if start is None and entry.event >= more.simulation.start:
                        start = len(self.memory.events)
                    is_shifted = is_between or more.is_tail(entry.layer)
                    shift = time * self.period if is_shifted else 0
                    self._repeat(entry, shift, () if is_between else self._growth(entry))
        return start or 0

    def _order(self, first: int, end: int) -> range:
        """Return the order of periods: that of the layers around one, or in it. In backward, and
        where the members of a list are released, the last layer is the first.
        """
        entries = self.more.entries
        own = [entry.layer for entry in entries[first:end] if entry.layer is not None]
        before, after = entries[max(0, first - 1)].layer, entries[end % len(entries)].layer
        inside = [layer for layer in own if layer != own[0]]
        around = [layer for layer in (before, *own, after) if layer is not None]
        one, other = (own[0], inside[-1]) if inside else (around[0], around[-1])
        if before is not None and after is not None and before != after:
            one, other = before, after
        return range(self.times)[:: 1 if one < other else -1]

    def _growth(self, entry: _Entry) -> tuple[Amount, ...]:
        """Return by how much each period adds to what may grow of the next entry of its kind."""
        amounts = self.more.growing(entry)
        if not amounts:
            return ()
        kind = self.more.kind(entry)
        if (grown := self.pairs.grown.get(kind)) is None:
            return (0,) * len(amounts)
        self._seen[kind] += 1
        return grown[self._seen[kind] - 1][1]

    def _repeat(self, entry: _Entry, shift: int, growth: tuple[Amount, ...]) -> None:
        """Write an entry, of a layer whose number is higher by shift."""
        more = self.more
        number = None if entry.layer is None else entry.layer + shift
        if (tick := entry.tick) is not None:
            amount = self._at_all(tick.amount, *growth) if growth else tick.amount
            event = len(self.memory.events)
            self.ticks.append(Tick(event, tick.stage, tick.kind, amount, number))
            return
        one, change = more.memory.events[entry.event]
        maker, identity = more.identities[id(one)]
        if maker is None:
            if not growth:
                raise _NotAlike  # each layer would release it
            change = self._at_all(change, growth[0])
            found = self._made.get((None, identity))
            if found is None:
                shape = tuple(map(self._at_all, one.shape, growth[1:]))
                found = self._made[None, identity] = replace(one, shape=shape)
        else:
            of_maker = self._shift_of(entry, maker, shift)
            key = maker + of_maker, identity
            found = self._made.get(key)
            if found is None:
                if change < 0:
                    raise _NotAlike
                found = self._made[key] = self._numbered(one, of_maker)
        self.memory.layers.append(None if more.memory.layers[entry.event] is None else number)
        self.memory.events.append((found, change))
        self.memory.moments.append(self._moment(more.memory.moments[entry.event], shift))

    def _shift_of(self, entry: _Entry, maker: int, shift: int) -> int:
        """Return by how much the number of the layer is higher that allocates what an event is of.

        It is as far from the event's layer in both models, or from an end of the model.
        """
        is_near = self.more.is_between(entry.layer) or not self.more.crosses(entry)
        if is_near or self.more.follows(entry):
            return shift
        return (self.times - 1) * self.period if self.more.is_tail(maker) else 0

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
