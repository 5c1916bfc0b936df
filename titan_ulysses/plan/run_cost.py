"""What a whole run takes, from the planned time of its steps: hours, GPU-hours, cost; and how long
it takes to stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from titan_ulysses.config.schema import MOST_STEPS
from titan_ulysses.observability.units import size_text, time_text
from titan_ulysses.plan.planner import Estimate, Plan

_SAVING = 1e9
"""Bytes/s that a node is taken to write to a file system that all nodes share."""
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
