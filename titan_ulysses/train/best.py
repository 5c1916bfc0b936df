"""The best validation of a run: which checkpoint to keep, and whether to end early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from titan_ulysses.config.schema import Config
from titan_ulysses.train.evaluation import Found


class Best:
    """The best value of validation.metric so far, the same on every rank.

    It is kept in run.json of each checkpoint, so that a run that goes on knows it. The validation
    before the first step does not count: nothing is trained yet.
    """

    def __init__(self, config: Config) -> None:
        self.metric, self.patience = config.validation.metric, config.validation.patience
        self.keeps = config.checkpoint.keep_best
        """whether its checkpoint is kept"""
        self.step: int | None = None
        self.value = float("inf")
        self.waited = 0
        """validations in a row that were not better"""

    def note(self, step: int, sets: Mapping[str, Found], together: Found) -> bool:
        """Note a validation; return whether it is the best one. Collective."""
        if step == 0:
            return False
        found = together if self.metric == "loss" else sets[self.metric.removesuffix("/loss")]
        value = torch.tensor(found.loss, dtype=torch.float64)
        dist.broadcast(value, src=0)  # the ranks must agree to the last bit
        if value.item() < self.value:
            self.step, self.value, self.waited = step, value.item(), 0
            return True
        self.waited += 1
        return False

    @property
    def ends_run(self) -> bool:
        return 0 < self.patience <= self.waited

    def state(self) -> dict[str, Any] | None:
        """Return what run.json keeps; None before the first validation that counts."""
        if self.step is None:
            return None
        return {
            "metric": self.metric,
            "step": self.step,
            "value": self.value,
            "waited": self.waited,
            "keep": self.keeps,
        }

    def load(self, state: dict[str, Any] | None) -> str | None:
        """Go on from `state`; return a warning if it is of no use here."""
        if state is None:
            return None
        if self.keeps and not state["keep"]:
            return (
                "WARNING: checkpoint.keep_best = true, and it was false: the best checkpoint is "
                "looked for from here on."
            )
        if state["metric"] != self.metric:
            return (
                f'WARNING: validation.metric = "{self.metric}", and it was "{state["metric"]}": '
                "the best checkpoint is looked for from here on."
            )
        self.step, self.value, self.waited = state["step"], state["value"], state["waited"]
        return None

    def describe(self) -> str:
        return f"{self.metric} {self.value:.4f} at step {self.step}"
