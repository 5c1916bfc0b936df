"""One run of `Trainer` on a rank, or one `--plan`, as somebody sees it who looks from outside."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runs import logged

MANY_STEPS = 10
"""A run that is to make more steps than so many is told to stop once it has logged some."""


@dataclass
class Seen:
    """What came of a run in the folder `folder`, which was its working directory."""

    folder: Path
    refused: str = ""
    """the message of the UserError that ended it"""
    said: str = ""
    """on the console"""
    files: set[str] = field(default_factory=set)
    """that it wrote, by their path in folder"""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """of metrics.jsonl"""
    initial: dict[str, Any] = field(default_factory=dict)
    """the whole parameters before the first step, as they are stored"""
    weights: dict[str, Any] = field(default_factory=dict)
    """and after the last one"""
    facts: dict[str, Any] = field(default_factory=dict)
    """what only the process itself can tell, see `_look_around`, and what was watched"""

    def of_steps(self, name: str) -> list[Any]:
        """A metric of each logged training step."""
        return [line[name] for line in self.lines if "loss" in line]

    def of_validations(self, name: str) -> list[Any]:
        return [line[f"validation_{name}"] for line in self.lines if "validation_loss" in line]

    def moved(self) -> float:
        """How far training has moved the parameters: the norm of their change."""
        changes = (self.weights[name] - before for name, before in self.initial.items())
        return sum(float(change.double().square().sum()) for change in changes) ** 0.5

    def kept(self) -> set[str]:
        """Names of the parameters that are as they were, to the bit."""
        return {name for name, before in self.initial.items() if before.equal(self.weights[name])}


def see(folder: Path, toml: str, environment: dict[str, str], *, watch: str = "") -> Seen:
    """Run `Trainer` on the ranks that call this, from a TOML file, as train.py does. Everything that is set for the
    process is set back. watch: see `_prepare` and `_watching`."""
    import torch

    from titan_ulysses.config_file import load_config
    from titan_ulysses.errors import UserError
    from titan_ulysses.trainer import Trainer

    seen, said = Seen(folder), io.StringIO()
    folder.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", 0))
    (folder / f"run-{rank}.toml").write_text(toml)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        _prepare(watch, patch)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        try:
            config = load_config(folder / f"run-{rank}.toml")
            run = Trainer(config)
            seen.initial = _whole(run.model)
            with _watching(watch, seen.facts), _stopped(config):
                run.train()
            seen.weights = _whole(run.model)
            seen.facts |= _look_around(run)
        except UserError as error:
            seen.refused = str(error)
        finally:
            torch.use_deterministic_algorithms(False)
    seen.said = said.getvalue()
    seen.files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if metrics := [*folder.rglob("metrics.jsonl")]:
        seen.lines = logged(metrics[0].parent)
    return seen


def _whole(model: Any) -> dict[str, Any]:
    from torch.distributed.tensor import DTensor

    from titan_ulysses.model import hf

    named = hf.named_parameters(model)
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named}


@contextlib.contextmanager
def _stopped(config: Any) -> Iterator[None]:
    """Send this process SIGTERM once a long run has logged two steps."""
    over = threading.Event()
    metrics = Path(config.job.dump_folder) / config.job.name / "metrics.jsonl"

    def stop() -> None:
        while not over.wait(0.01):
            if metrics.exists() and metrics.read_text().count("\n") >= 2:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=stop, daemon=True)
    if config.training.steps > MANY_STEPS:
        watcher.start()
    try:
        yield
    finally:
        over.set()


def _look_around(run: Any) -> dict[str, Any]:
    """What a run has made of its process."""
    import torch

    stores = {id(s): s for m in run.model.modules() if (s := getattr(getattr(m, "_segment", None), "store", None))}
    mapped = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "slabs": [slab.numel() for store in stores.values() for slab in store.slabs],
        "mapped": re.findall(r"(/\S*)/checkpoint-\S+ \(deleted\)", mapped),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "wandb": getattr(sys.modules.get("wandb"), "calls", None),
    }


def _prepare(watch: str, patch: pytest.MonkeyPatch) -> None:
    """wandb: a stand-in takes notes of what it is told; cache: tokens go to the disk however few they are."""
    if watch == "wandb":
        from test_wandb import StandIn

        patch.delenv("WANDB_PROJECT", raising=False)
        patch.setitem(sys.modules, "wandb", StandIn(""))
    if watch == "cache":
        from titan_ulysses.data import cache

        patch.setattr(cache, "SMALL_CHARACTERS", -1)
        patch.setattr(cache, "_cores", lambda: 1)


@contextlib.contextmanager
def _watching(watch: str, facts: dict[str, Any]) -> Iterator[None]:
    """operators: how often each (name, shape of the first input) is computed."""
    if watch != "operators":
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        yield
    calls = ((e.name, tuple(e.input_shapes[0]) if e.input_shapes else ()) for e in profiler.events())
    facts["operators"] = Counter(calls)
