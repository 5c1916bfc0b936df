"""Estimates the plan of a model with many layers from the plans of two models with few.

A simulated step takes as long as the model has layers. But layers are alike, or repeat with a
period, and then all that a step asks of the hardware is affine in their number L: FLOPs, bytes of
collectives, and memory at a given moment of the step. The moment of the peak is not the same for
every L: with few layers it is in the loss head, with many in a block or in the optimizer. So memory
is extrapolated for each kind of moment, of which the first and the last layers are enough: between
them it is affine, too.

An estimate ranks settings. What is reported is simulated whole.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from math import lcm

from titan_ulysses.plan.cost import Cost
from titan_ulysses.plan.layers import IRREGULAR, period_of, with_layers
from titan_ulysses.plan.planner import Estimate, Plan, Setup, make_plan

MomentKind = tuple[str, "int | str"]
"""(phase of the step, layer from the first or, if negative, from the last; else a module)"""


def estimate_plan(setup: Setup) -> Estimate:
    """Estimate the plan of setup, by two simulations of a few layers. UserError as `make_plan`."""
    counts = _layers_to_simulate(setup)
    if counts is None:
        return make_plan(setup)
    few, more = (make_plan(replace(setup, spec=with_layers(setup.spec, count))) for count in counts)
    layers = setup.model_config.num_hidden_layers
    factor = (layers - counts[0]) / (counts[1] - counts[0])

    def at_all_layers(a: float, b: float) -> float:
        return a + factor * (b - a)

    def each(a: Mapping, b: Mapping) -> dict:
        keys = dict.fromkeys((*a, *b))
        return {key: at_all_layers(a.get(key, 0), b.get(key, 0)) for key in keys}

    ends = _ends(counts[1] - counts[0])
    a, b = (_peaks(plan, ends=ends) for plan in (few, more))
    peak = max(at_all_layers(a[kind], b[kind]) for kind in a.keys() & b.keys())
    calls, sizes = (
        each(*({kind: both[of] for kind, both in plan.collectives.items()} for plan in (few, more)))
        for of in (0, 1)
    )
    host_bytes = at_all_layers(few.host_bytes, more.host_bytes)
    return Estimate(
        setup,
        Cost(Counter(each(few.cost.amounts, more.cost.amounts))),
        {kind: (calls[kind], sizes[kind]) for kind in calls},
        each(few.on_host, more.on_host),
        gpu_bytes=peak + setup.beside(host_bytes),
        host_bytes=host_bytes,
        on_disk=each(few.on_disk, more.on_disk),
    )


def _layers_to_simulate(setup: Setup) -> tuple[int, int] | None:
    """Return two numbers of layers that stand for all; None where no fewer would do.

    Each has whole periods of layers and of checkpoints, the first of which is not the last: what
    comes from the layers after it (their gradients, say) is there in both.
    """
    model, checkpoint = setup.model_config, setup.config.activation_checkpoint
    layers = getattr(model, "num_hidden_layers", 0)
    irregular = any(getattr(model, name, None) for name in IRREGULAR)
    if irregular or getattr(model, "is_heterogeneous", False):
        return None
    period = lcm(period_of(model, layers), checkpoint.every if checkpoint.mode == "full" else 1)
    first = period * -(-(_ends(period) + 1) // period)
    return (first, first + period) if first + period < layers else None


def _ends(period: int) -> int:
    """Return how many layers at each end of a model are moments of their own.

    At least two: while the backward of a layer runs, the checkpoint of the next one can come back
    to the device, for which the last layer of all has none.
    """
    return max(2, period)


def _peaks(plan: Plan, *, ends: int) -> Mapping[MomentKind, float]:
    """Return the peak of device memory at each kind of moment of a step.

    ends: how many layers at the beginning, and at the end, are moments of their own.
    """
    memory, layers = plan.simulation.memory, plan.setup.model_config.num_hidden_layers
    peaks: defaultdict[MomentKind, float] = defaultdict(float)
    total = 0
    for index, (allocation, change) in enumerate(memory.events):
        if allocation.place != "device":
            continue
        total += change
        if index < plan.simulation.start:
            continue
        phase, owner, *_ = memory.moments[index]
        places: tuple[int | str, ...] = (owner.module,)
        if owner.layer is not None:  # of few layers, one can be among the first and the last
            places = tuple(
                place for place in (owner.layer, owner.layer - layers) if -ends <= place < ends
            )
        for place in places:
            peaks[phase, place] = max(peaks[phase, place], total)
    return peaks
