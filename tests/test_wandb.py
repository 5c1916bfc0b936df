"""Weights & Biases, by a stand-in that takes notes: the records of metrics.jsonl, and one run also
when resumed.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.ranks import run_on_ranks
from helpers.runs import Settings, learned, logged, train, write_run
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.observability import wandb as wandb_run

SETTINGS: Settings = {
    "parallelism.sequence_parallel_degree": 2,
    "metrics.enable_wandb": True,
    "validation.enable": True,
    "validation.interval": 2,
    "training.global_batch_size": 2,
}


class StandIn(ModuleType):
    """Takes notes; `fails` is the call that raises, each time."""

    def __init__(self, fails: str):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)  # other packages ask whether there is one
        self.fails, self.calls = fails, []

    def _note(self, call: str, *details: Any) -> None:
        self.calls.append((call, *details))
        if call == self.fails:
            raise RuntimeError("no route to the service")

    def init(self, **settings: Any) -> None:
        self._note("init", settings)

    def log(self, values: dict[str, Any], step: int) -> None:
        self._note("log", step, values)

    def Table(self, columns: list[str], data: list[list[str]]) -> dict[str, str]:
        assert columns == ["prompt", "text"]
        return {prompt: text for prompt, text in data}

    def finish(self) -> None:
        self._note("finish")


def train_with(
    config: Path, settings: Settings, fails: str = "", **environment: str
) -> tuple[list[tuple], str]:
    """What wandb was told on this rank, and what the run printed."""
    stand_in, printed = StandIn(fails), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(sys.modules, "wandb", stand_in)
        patch.delenv("WANDB_PROJECT", raising=False)
        patch.delenv("WANDB_DIR", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        train(config, settings)
    return stand_in.calls, printed.getvalue()


def test_one_run_with_the_records_of_metrics_jsonl(tmp_path: Path) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    (first, _), (others, _) = run_on_ranks(2, train_with, config, SETTINGS | {"training.steps": 4})
    longer = SETTINGS | {"training.steps": 6, "validation.prompts": ["a"]}
    longer["validation.prompt_tokens"] = 2
    (second, _), (more, _) = run_on_ranks(2, train_with, config, longer, WANDB_DIR="/elsewhere")
    assert others == more == [], "rank 0 alone logs"
    for calls in (first, second):
        assert [call[0] for call in calls] == ["init", *["log"] * (len(calls) - 2), "finish"]
    started, resumed = first[0][1], second[0][1]
    assert started["id"] == resumed["id"] == (run / "wandb_run_id").read_text()
    assert (started["project"], started["name"], started["resume"]) == (
        "titan_ulysses",
        "run",
        "allow",
    )
    assert started["config"]["training"]["steps"] == 4 and started["dir"] == str(run)
    assert resumed["dir"] == "/elsewhere"
    told = [
        {"step": call[1], **call[2]}
        for calls in (first, second)
        for call in calls
        if call[0] == "log"
    ]
    told = json.loads(json.dumps(told))
    assert told == [
        {name: value for name, value in line.items() if value is not None} for line in logged(run)
    ]
    assert any("validation_samples" in values for values in told)


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_failure_ends_nothing_and_is_told_once(fails: str, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (calls, printed), _ = run_on_ranks(
        2, train_with, config, SETTINGS | {"training.steps": 3}, fails
    )
    assert [call[0] for call in calls].count(fails) == 1
    assert printed.count("no route to the service") == 1
    assert "wandb: RuntimeError: no route to the service. Training goes on" in printed
    assert [step for step, *_ in learned(tmp_path / "outputs" / "run")] == [1, 2, 3]


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(
        UserError, match="enable_wandb = true: the package wandb is not installed. Install it"
    ):
        wandb_run.check_wandb()
