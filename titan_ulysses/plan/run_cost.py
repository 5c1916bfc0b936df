"""What a whole run takes, from the planned time of its steps: hours, GPU-hours, cost; what changes
them; and how long it takes to stop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from titan_ulysses.config.schema import MOST_STEPS
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.observability.units import size_text, time_text
from titan_ulysses.plan.fastest import CLEARLY, faster_settings
from titan_ulysses.plan.planner import Estimate, Plan, estimate_plan
from titan_ulysses.plan.search import at_length, with_settings

_SAVING = 1e9
"""Bytes/s that a node is taken to write to a file system that all nodes share."""
_LINKS = {"node_link": "NVLink", "network": "the network", "host_link": "PCIe to the host"}
_TRIED = 3
"""How many changes of a setting are estimated, of those that can gain most."""
_MARGIN = 1.25
"""How much longer than planned a step and a checkpoint may take."""


@dataclass(frozen=True)
class RunCost:
    """What it takes to train a number of tokens."""

    tokens: int
    hours: float
    gpu_hours: float
    cost: float | None
    """in the currency of plan.gpu_hour_price; None without a price"""

    def sentence(self) -> str:
        if not self.tokens:
            return "the run: as long as training.epochs; plan.tokens gives its hours and cost"
        price = "" if self.cost is None else f", cost {self.cost:,.2f}"
        return (
            f"the run: {self.tokens:,} tokens in {time_text(3600 * self.hours)}, "
            f"{self.gpu_hours:,.1f} GPU-hours{price}"
        )


def run_cost(estimate: Estimate, tokens: int = 0) -> RunCost:
    """Return what `tokens` take on the GPUs of setup: plan.tokens, or those of training.steps
    steps, unless given; 0 for epochs, whose tokens no plan knows. Steps alone count, and no
    validation, no checkpoint and no start.
    """
    setup = estimate.setup
    tokens = tokens or setup.config.plan.tokens
    training = setup.config.training
    is_known = not training.epochs or training.steps < MOST_STEPS
    tokens = tokens or is_known * training.steps * setup.tokens_per_step
    hours = tokens * estimate.seconds_per_token / 3600
    gpu_hours = hours * setup.world_size
    price = setup.config.plan.gpu_hour_price
    return RunCost(tokens, hours, gpu_hours, price * gpu_hours if price else None)


def asks_for_cost(plan: Estimate) -> bool:
    """Return whether the config asks what a run costs: what else it could cost is planned then,
    from few layers, which takes some seconds.
    """
    return bool(plan.setup.config.plan.tokens or plan.setup.config.plan.gpu_hour_price)


def costs_at_lengths(plan: Plan) -> list[tuple[int, RunCost | None]]:
    """Return what the tokens of a planned run take in sequences of half its length, of its own and
    of twice it, by length; None where these do not fit, or cannot be.
    """
    own, unit = plan.seq_len, 256 * plan.setup.degrees.sequence
    tokens, found = run_cost(plan).tokens, []
    for length in (own // 2 // unit * unit or own // 2, own, 2 * own):
        try:
            other = plan if length == own else estimate_plan(at_length(plan.setup, length))
        except UserError:
            other = None
        found.append((length, run_cost(other, tokens) if other and other.fits else None))
    return found


def half_as_fast(plan: Plan) -> dict[str, float]:
    """Return by what share a step takes longer if one kind of link is half as fast, by link."""
    gpu, seconds = plan.setup.gpu, plan.time.seconds
    longer = {}
    for link, name in _LINKS.items():
        slow = replace(gpu, **{link: getattr(gpu, link) / 2})
        longer[name] = replace(plan, setup=replace(plan.setup, gpu=slow)).time.seconds / seconds - 1
    return longer


def other_kernels(plan: Plan) -> dict[str, float]:
    """Return the seconds of a step with the other FlashAttentions of this GPU, by name."""
    setup = plan.setup
    names = setup.gpu.attention if setup.core == "varlen" else {}
    others = [name for name in names if name != setup.attention_kernel]
    setups = {name: with_settings(setup, {"plan.attention_kernel": name}) for name in others}
    return {name: replace(plan, setup=other).time.seconds for name, other in setups.items()}


def best_change(plan: Plan) -> tuple[dict[str, Any], Estimate] | None:
    """Return the change of one setting that makes training clearly faster and fits, and its
    estimate; None where none of the most promising does.
    """
    best: tuple[dict[str, Any], Estimate] | None = None
    least = (1 - CLEARLY) * plan.seconds_per_token
    for changes in faster_settings(plan)[:_TRIED]:
        try:
            other = estimate_plan(with_settings(plan.setup, changes))
        except UserError:
            continue
        if other.fits and other.seconds_per_token < least:
            best, least = (changes, other), other.seconds_per_token
    return best


@dataclass(frozen=True)
class Grace:
    """What a run needs to stop once it is asked to: it finishes its step, and saves."""

    saved: float
    """bytes of a checkpoint that each node writes"""
    seconds: int
    """with a margin, in whole minutes"""

    def sentence(self) -> str:
        saving = f" and save {size_text(self.saved)} a node" if self.saved else ""
        return (
            f"to stop it must finish a step{saving}: sbatch --signal=B:USR1@{self.seconds}, or "
            f"terminationGracePeriodSeconds: {self.seconds}"
        )


def grace_of(plan: Plan) -> Grace:
    """Return what a planned run needs to stop. A validation that has begun comes on top."""
    saved = 0.0
    if plan.setup.config.checkpoint.enable:
        state = ("parameters", "optimizer state")
        places = (plan.peak.components, plan.on_host)
        saved = sum(place.get(what, 0.0) for place in places for what in state)
        saved *= plan.setup.ranks_per_node
    seconds = _MARGIN * (plan.time.seconds + saved / _SAVING)
    return Grace(saved, 60 * ceil(seconds / 60))
