"""Runs of `Trainer`, and plans, as somebody sees them who looks from outside: what they said,
wrote, logged, trained.

`Observer` makes them, `Seen` is what came of one, and the functions below it are what is asked of
that.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.material import as_toml, write_earlier_run, write_material
from helpers.ranks import run_on_ranks
from helpers.runs import logged

if TYPE_CHECKING:
    from helpers.runs import Settings
    from titan_ulysses.config.schema import Config
    from titan_ulysses.train.trainer import Trainer

_MANY_STEPS = 10
"""A run that is to make more steps is sent SIGTERM when it has logged two of them."""
_CHECKPOINT_FILE = re.compile(r"(/\S*)/checkpoint-\S+ \(deleted\)")
"""Of a checkpoint on disk that is mapped, in /proc/self/maps: its folder."""


@dataclass
class Seen:
    """What came of a run, or a plan, in the folder `folder`, which was its working directory."""

    folder: Path
    refused: str = ""
    """the message of the UserError that ended it"""
    said: str = ""
    """on the console"""
    files: set[str] = field(default_factory=set)
    """that are there, by their path below folder"""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """of metrics.jsonl"""
    initial: dict[str, Any] = field(default_factory=dict)
    """the whole parameters before the first step, as they are stored"""
    weights: dict[str, Any] = field(default_factory=dict)
    """and after the last one"""
    facts: dict[str, Any] = field(default_factory=dict)
    """of a run what only its process can tell (see `_look_around`), of a plan what plan.json
    holds
    """

    def of_steps(self, name: str) -> list[Any]:
        """A metric of each logged training step."""
        return [line[name] for line in self.lines if "loss" in line]

    def of_validations(self, name: str) -> list[Any]:
        lines = [line for line in self.lines if "validation_loss" in line]
        return [line.get(f"validation_{name}") for line in lines]

    def moved(self) -> float:
        """How far training has moved the parameters: the norm of their change."""
        changes = (self.weights[name] - before for name, before in self.initial.items())
        return sum(float(change.double().square().sum()) for change in changes) ** 0.5

    def kept(self) -> set[str]:
        """Names of the parameters that are as they were, to the bit."""
        names = self.initial.keys() & self.weights.keys()
        return {name for name in names if self.initial[name].equal(self.weights[name])}


class Observer:
    """Makes runs in folders of their own below `folder`; what has been run is not run again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"MATERIAL": str(folder / "material"), "HOME": str(folder)}
        self._known: dict[Any, Seen] = {}
        self._numbers = count()
        write_material(folder / "material")
        write_earlier_run(folder / "material")

    def __call__(
        self, settings: Settings, *, ranks: int = 1, watch: str = "", plans: bool = False
    ) -> Seen:
        """Of `Trainer` on so many ranks what rank 0 shows, or of `train.py --plan`. watch: see
        `see`.

        settings: all of them, as in TOML, except those that are None; "$MATERIAL" is the folder of
        `material.py`.
        """
        toml = as_toml(settings)
        key = (toml, ranks, watch, plans)
        if key not in self._known:
            here = self.folder / f"run-{next(self._numbers)}"
            here.mkdir()
            (here / "run.toml").write_text(toml)
            if plans:
                self._known[key] = see_plan(here, self.environment)
            else:
                self._known[key] = run_on_ranks(
                    ranks, see, here, self.environment, watch=watch, timeout=300
                )[0]
        return self._known[key]


def see(folder: Path, environment: dict[str, str], *, watch: str = "") -> Seen:
    """Run `Trainer` on the ranks that call this, as train.py does, from <folder>/run.toml.

    watch: "operators" counts what is computed, "wandb" has a stand-in for it, "cache" keeps tokens
    on the disk however few they are. What is set for the process is set back.
    """
    import torch

    from titan_ulysses.config.load import load_config
    from titan_ulysses.distributed.errors import UserError
    from titan_ulysses.train.trainer import Trainer

    seen, said = Seen(folder), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        _prepare(watch, patch)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        try:
            config = load_config("run.toml")
            run = Trainer(config)
            seen.facts["startup_timeouts"] = _timeouts(run)
            seen.initial = _whole(run.state.model)
            with _watching(watch, seen.facts), _stopped(config):
                run.train()
            seen.weights = _whole(run.state.model)
            seen.facts |= _look_around(run)
        except UserError as error:
            seen.refused = str(error)
        finally:
            torch.use_deterministic_algorithms(False)
    return _with_files(seen, said)


def see_plan(folder: Path, environment: dict[str, str]) -> Seen:
    """`train.py --plan` of <folder>/run.toml, in this process: it needs one without a process
    group.
    """
    import train as train_script
    from titan_ulysses.distributed.errors import UserError

    seen, said = Seen(folder), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        # It sets the second for its process, so that it is set back.
        for name, value in (environment | {"CUDA_VISIBLE_DEVICES": ""}).items():
            patch.setenv(name, value)
        try:
            train_script.main(["--config", "run.toml", "--plan"])
            seen.facts = json.loads((folder / "outputs" / "run" / "plan.json").read_text())
        except UserError as error:
            seen.refused = str(error)
    return _with_files(seen, said)


def _with_files(seen: Seen, said: io.StringIO) -> Seen:
    seen.said = said.getvalue()
    seen.files = {
        path.relative_to(seen.folder).as_posix()
        for path in seen.folder.rglob("*")
        if path.is_file()
    }
    seen.lines = [
        line for file in seen.folder.rglob("metrics.jsonl") for line in logged(file.parent)
    ]
    return seen


def _whole(model: Any) -> dict[str, Any]:
    from titan_ulysses.model import hf

    named = hf.named_parameters(model)
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().to("cpu", copy=True)
        for name, p in named
    }


@contextlib.contextmanager
def _stopped(config: Config) -> Iterator[None]:
    """Send this process SIGTERM in a long run."""
    over = threading.Event()
    metrics = Path(config.job.dump_folder) / config.job.name / "metrics.jsonl"

    def stop() -> None:
        while not over.wait(0.01):
            if metrics.exists() and metrics.read_text().count("\n") >= 2:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    if config.training.steps > _MANY_STEPS:
        threading.Thread(target=stop, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _prepare(watch: str, patch: pytest.MonkeyPatch) -> None:
    if watch == "wandb":
        from test_wandb import StandIn

        patch.delenv("WANDB_PROJECT", raising=False)
        patch.setitem(sys.modules, "wandb", StandIn(""))
    if watch == "cache":
        from titan_ulysses.data import cache

        patch.setattr(cache, "SMALL_CHARACTERS", -1)
        patch.setattr(cache, "usable_cores", lambda: 1)


@contextlib.contextmanager
def _watching(watch: str, facts: dict[str, Any]) -> Iterator[None]:
    if watch != "operators":
        yield
        return
    with _Operators() as mode:
        yield
    facts["operators"] = mode.calls


class _Operators(TorchDispatchMode):
    """Counts calls of each (operator, shape of its first input), in forward and in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its own calls come here with plain tensors
        self.calls[func._schema.name, tuple(getattr(args[0], "shape", ())) if args else ()] += 1
        return func(*args, **(kwargs or {}))


def _timeouts(run: Trainer) -> set[float]:
    """The seconds that each process group of the mesh waits for a rank."""
    from titan_ulysses.distributed.mesh import timeout_of

    mesh = run.state.mesh
    groups = [
        group for part in (mesh.world, mesh.fsdp, mesh.batch) for group in part.get_all_groups()
    ]
    return {timeout_of(group) for group in (*groups, mesh.loss.get_group())}


def _look_around(run: Trainer) -> dict[str, Any]:
    """What a run has made of its process."""
    import torch

    maps = Path("/proc/self/maps")
    if maps.exists() and _CHECKPOINT_FILE.search(maps.read_text()):
        gc.collect()  # files of earlier runs may still be mapped
    segments = (getattr(module, "checkpoint_segment", None) for module in run.state.model.modules())
    stores = {id(segment.store): segment.store for segment in segments if segment and segment.store}
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        # Bytes of each piece of host memory or disk that checkpoints wait in, and the folders of
        # those on disk.
        "buffers": [buffer.numel() for store in stores.values() for buffer in store.buffers],
        "mapped": _CHECKPOINT_FILE.findall(maps.read_text()) if maps.exists() else [],
        "timeouts": _timeouts(run),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "wandb": getattr(sys.modules.get("wandb"), "calls", []),
    }


# --- what is asked of them ------------------------------------------------------------------------


def near(one: Any, other: Any) -> bool:
    """Equal but for the order in which fp32 sums are added."""
    return one == pytest.approx(other, rel=2e-5)


def losses(run: Seen) -> list[float]:
    return run.of_steps("loss")


def norms(run: Seen) -> list[float]:
    return run.of_steps("grad_norm")


def labels(run: Seen) -> int:
    """How many the last validation looked at; 0 without one."""
    return [0, *run.of_validations("tokens")][-1]


def tokens(run: Seen) -> int:
    """How many the data is said to have; 0 where nothing is said."""
    found = re.search(r"([\d,]+) tokens, ", run.said)
    return int(found[1].replace(",", "")) if found else 0


def numbers(run: Seen) -> int:
    """How many parameters there are."""
    return sum(parameter.numel() for parameter in run.weights.values())


def same_weights(run: Seen, other: Seen) -> bool:
    return run.weights.keys() == other.weights.keys() and all(
        run.weights[name].equal(parameter) for name, parameter in other.weights.items()
    )


def moved_bytes(run: Seen, collective: str) -> int:
    """That a step hands to this kind of collective."""
    return run.of_steps("collectives")[0].get(collective, {"bytes": 0})["bytes"]


def computed(run: Seen, name: str, *, rows: int | None = None) -> int:
    """How often an operator was called; of first inputs [..., rows, numbers] alone."""
    calls = run.facts["operators"].items()
    return sum(
        n for (operator, shape), n in calls if operator == name and rows in (None, *shape[-2:-1])
    )


def material_of(run: Seen) -> Path:
    return run.folder.parent / "material"


def bytes_of(run: Seen, folder: str) -> int:
    """Tokens of the byte tokenizer: a byte, and the end of a text."""
    return sum(file.stat().st_size + 1 for file in (material_of(run) / folder).glob("*.txt"))


def begins_with_export(run: Seen) -> bool:
    """Whether it began with the weights that the earlier run has left."""
    from safetensors.torch import load_file

    saved = load_file(material_of(run) / "earlier" / "run" / "export" / "model.safetensors")
    return bool(run.initial) and all(
        run.initial[name].equal(tensor) for name, tensor in saved.items()
    )
