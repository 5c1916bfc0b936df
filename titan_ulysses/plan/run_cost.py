"""What a whole run takes, from the planned time of its steps: hours, GPU-hours, cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from titan_ulysses.observability.units import time_text
from titan_ulysses.plan.planner import Setup


@dataclass(frozen=True)
class RunCost:
    """What it takes to train a number of tokens."""

    tokens: int
    hours: float
    gpu_hours: float
    cost: float | None
    """in the currency of plan.gpu_hour_price; None without a price"""

    def sentence(self) -> str:
        price = "" if self.cost is None else f", cost {self.cost:,.2f}"
        return (
            f"the run: {self.tokens:,} tokens in {time_text(3600 * self.hours)}, "
            f"{self.gpu_hours:,.1f} GPU-hours{price}"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def tokens_of_run(setup: Setup) -> int:
    """Return the tokens to train: plan.tokens, or those of training.steps steps of setup."""
    return setup.config.plan.tokens or setup.config.training.steps * setup.tokens_per_step


def run_cost(setup: Setup, *, tokens: int, seconds_per_token: float) -> RunCost:
    """Return what `tokens` take on the GPUs of setup. Steps alone count, and no validation, no
    checkpoint and no start.
    """
    hours = tokens * seconds_per_token / 3600
    gpu_hours = hours * setup.world_size
    price = setup.config.plan.gpu_hour_price
    return RunCost(tokens, hours, gpu_hours, price * gpu_hours if price else None)
