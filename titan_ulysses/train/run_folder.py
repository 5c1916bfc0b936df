"""The folder of a run: its lock and its files, its checkpoints, and its export.

A checkpoint refuses another model or optimizer (checkpoint/dcp.py). Settings that decide which data
comes next may change, but never in silence. docs/runs.md has the table of all settings.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.dcp import Checkpointer
from titan_ulysses.checkpoint.disk import DiskNeeds, disk_needs
from titan_ulysses.checkpoint.folder import exported_step
from titan_ulysses.checkpoint.initial import (
    base_weights,
    initialize,
    needs_initial_weights,
    origin_of,
)
from titan_ulysses.checkpoint.state import saved_bytes
from titan_ulysses.config.schema import KEYS, Config
from titan_ulysses.config.toml import to_toml
from titan_ulysses.distributed.atomic import whole_file
from titan_ulysses.distributed.errors import UserError, first_failure
from titan_ulysses.launch import heartbeat, run_store
from titan_ulysses.launch.agreement import Ranks
from titan_ulysses.launch.lock import RunLock
from titan_ulysses.optim.adamw import expected_bytes
from titan_ulysses.train.step import TrainState

_SAME_DATA = ("data.cache_folder", "data.bad_lines")
"""Keys of [data] that do not decide which sequence comes next."""
_TWICE = "so some samples are read twice and others never"


class RunFolder:
    """<dump_folder>/<name>/, which all ranks share, or those of a host (checkpoint.shared).

    say: warns the user of what is uncertain. All errors are `UserError`s that name the folder.
    """

    def __init__(self, config: Config, *, say: Callable[[str], None]):
        self.config = config
        self.path = Path(config.job.dump_folder) / config.job.name
        self._lock = RunLock(self.path, say=say)

    def check(self) -> None:
        """Raise UserError if the folder cannot be made or written to. Makes nothing."""
        nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise self._unwritable(
                f"{nearest} is {'not writable' if nearest.is_dir() else 'not a folder'}"
            )

    def lock_if_there(self) -> None:
        """Raise UserError if another run is at work in the folder. Makes nothing.

        Called before anything is read that another run may change.
        """
        if self.path.exists():
            with self._writing():
                self._acquire()

    def open(self) -> None:
        """Make the folder, and lock it for this run."""
        with self._writing():
            self._acquire()
        heartbeat.keep_stacks_in(self.path / "stacks")

    def release(self) -> None:
        """Let other runs in."""
        self._lock.release()

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the folder on rank 0, completely or not at all. Makes the folder."""
        with self._writing():
            if dist.get_rank() == 0:
                with whole_file(self.path / name) as partial:
                    partial.write_bytes(content.encode() if isinstance(content, str) else content)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Make the folder; an error in this context is that it cannot be written to."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from error

    def _acquire(self) -> None:
        """Lock the folder on rank 0, or on the first rank of each host that has one of its own."""
        rank, _ = run_store.rank_and_size()
        if rank == 0 or (not self.config.checkpoint.shared and run_store.leads_host()):
            self._lock.acquire()

    def _unwritable(self, why: str) -> UserError:
        return UserError(
            f"job.dump_folder = {self.config.job.dump_folder}: cannot write to {self.path} "
            f"({why}). Choose a folder that can be written."
        )


class Checkpoints:
    """The checkpoints of a run and its export, in the run's folder."""

    def __init__(self, config: Config, folder: Path, ranks: Ranks, *, say: Callable[[str], None]):
        """Find the checkpoints there. UserError if the hosts do not see the same folder."""
        self.config, self.folder, self._ranks, self._say = config, folder, ranks, say
        shared = config.checkpoint.shared
        if config.checkpoint.enable and shared:
            ranks.expect_one_folder(folder, f"job.dump_folder = {config.job.dump_folder}")
        self.checkpointer = Checkpointer(
            folder / config.checkpoint.folder,
            keep=config.checkpoint.keep_latest_k,
            hosts=() if shared else ranks.hosts,
            in_background=config.checkpoint.async_mode == "async",
            say=say,
        )
        self.steps = self._common_steps() if config.checkpoint.enable else []
        """Steps of those that were there when the run started, on all hosts."""

    def _common_steps(self) -> list[int]:
        """Return the steps of the checkpoints that all hosts have.

        If they share a folder, rank 0 alone looks: the view of another host may be old.
        """
        ranks, shared = self._ranks, self.config.checkpoint.shared
        looks = ranks.rank == 0 or not shared or ranks.watch is None  # which decides alone

        def common(steps: list[list[int] | None]) -> list[int]:
            return sorted(set.intersection(*(set(seen) for seen in steps if seen is not None)))

        return ranks.decide("checkpoints", self.checkpointer.steps() if looks else None, common)

    def latest(self) -> int | None:
        """Return the step of the last checkpoint, after one that is still being written."""
        with suppress(UserError):
            self.checkpointer.finish()
        return self.checkpointer.latest() if self.config.checkpoint.enable else None

    def are_due(self, state: TrainState) -> bool:
        config, step = state.config, state.step
        return config.checkpoint.enable and (
            step % config.checkpoint.interval == 0 or step == config.training.steps
        )

    def disk_needs(self, state: TrainState) -> DiskNeeds:
        """Return what the disk of this host must have room for."""
        part, degrees = 1.0, state.spec.degrees
        if not self.config.checkpoint.shared:  # a host has the shards of its own ranks
            ranks = self._ranks.hosts.count(self._ranks.own_host)
            part = min(1.0, ranks / (degrees.shard * degrees.sequence))
        assert state.optimizer is not None
        return disk_needs(
            state.config,
            self.folder,
            model=int(part * saved_bytes(state.model)),
            optimizer=int(part * expected_bytes(state.optimizer)),
            export=weights.exported_bytes(state.model, origin_of(self.config)),
            there=len(self.checkpointer.steps()),
            done=state.step,
        )

    def fill(self, state: TrainState) -> None:
        """Fill the model with its initial weights, or go on from the newest checkpoint.

        Collective.
        """
        needed = needs_initial_weights(self.config, self.steps)
        if needed and (note := initialize(state.model, self.config)):
            self._say(note)
        if not self.steps:
            return
        state.step, saved = self.checkpointer.load_newest(
            self.steps, state.model, state.optimizer, needs=("loader", "rng")
        )
        if state.loader:
            state.loader.load_state_dict(saved["loader"])
            state.skipped = saved.get("skipped", 0)
            warnings = warnings_of(
                self.config,
                state.step,
                saved,
                content=state.loader.sequences.content(),
                frozen_weights=state.loss.fingerprint(),
            )
            for warning in filter(None, [*warnings, state.best.load(saved.get("best"))]):
                self._say(warning)

    def save(self, state: TrainState) -> None:
        """Save a checkpoint of this step. Collective."""
        assert state.loader is not None and state.optimizer is not None
        saved = {
            "step": state.step,
            "loader": state.loader.state_dict(),
            "rng": {"seed": self.config.training.seed},
            "data": data_settings(self.config),
            "content": state.loader.sequences.content(),
            "beside": state.loss.fingerprint(),
            "skipped": state.skipped,
        }
        if best := state.best.state():
            saved["best"] = best
        self.checkpointer.save(state.step, state.model, state.optimizer, saved)

    def is_exported(self, state: TrainState) -> bool:
        """Return whether rank 0, which exports, sees the export of this step. Collective."""
        if not self.config.checkpoint.export:
            return True
        there = exported_step(self.folder / "export") == state.step_to_export
        return first_failure("absent" if dist.get_rank() == 0 and not there else None) is None

    def export(self, state: TrainState) -> None:
        """Write the model for transformers, and the adapters for peft. Collective."""
        if self.config.lora.rank:
            base = base_weights(self.config)
            weights.save_adapters(
                state.model, self.folder / "adapter", base=base.path if base else ""
            )
        vision = state.spec.vision
        weights.export(
            state.model,
            vision.processor if vision else state.spec.tokenizer,
            self.folder / "export",
            step=state.step_to_export,
            origin=origin_of(self.config),
        )


def data_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide which sequence is the next one, by key, as JSON."""
    keys = [key for key in KEYS if key.startswith("data.") and key not in _SAME_DATA]
    keys += ["training.seq_len", "model.tokenizer"]
    values = config.model_dump(mode="json")
    found = {key: values[key.split(".")[0]][key.split(".")[1]] for key in keys}
    # What is held out is not trained on, unless it comes from elsewhere.
    validation = config.validation
    has_own_data = validation.path or validation.split or validation.sets
    found["validation.enable"] = validation.enable and not has_own_data
    return found


def warnings_of(
    config: Config,
    step: int,
    saved: dict[str, Any],
    *,
    content: dict[str, str],
    frozen_weights: int,
) -> list[str]:
    """Return warnings for what leads to other data than the run would have read: settings, or files
    that have changed; and for a reference or teacher with other weights.

    saved: run.json of the checkpoint, which has no settings if it was converted. content: the
    hashes of the documents that are there now, by source. frozen_weights: the fingerprint of the
    second model's weights.
    """
    seed, found = saved.get("rng", {}).get("seed"), []
    if saved.get("beside", frozen_weights) != frozen_weights:
        found.append(
            f"WARNING: [loss]: the reference or teacher differs from the one that step {step} was "
            "trained with: from here on the loss uses the new one."
        )
    if seed not in (None, config.training.seed):
        found.append(
            f"WARNING: training.seed = {config.training.seed}, and it was {seed} when step {step} "
            f"was saved: the data continues in a different order, {_TWICE}. Set training.seed = "
            f"{seed} to go on exactly."
        )
    before, now = saved.get("data", {}), data_settings(config)
    changed = [key for key in now if key in before and before[key] != now[key]]
    for key in changed:
        found.append(
            f"WARNING: {key} = {to_toml(now[key])}, and it was {to_toml(before[key])} when step "
            f"{step} was saved: the run continues at the same position in different data, "
            f"{_TWICE}."
        )
    then = saved.get("content", {})
    other = [name for name in content if then.get(name, content[name]) != content[name]]
    if other and not changed:
        where = "data.path" if config.data.path else f"data.mixture ({', '.join(other)})"
        found.append(
            f"WARNING: {where}: the documents have changed since step {step} was saved: a file "
            "was changed, added or removed. The run continues at the same position in different "
            f"data, {_TWICE}."
        )
    return found
