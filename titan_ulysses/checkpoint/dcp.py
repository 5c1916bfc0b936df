"""Checkpoints through DCP (torch.distributed.checkpoint), saved by all ranks, readable on any mesh.

`checkpoints/step-N/` contains DCP's files (model and optimizer, by parameter name) and `run.json`
(the rest: step, data position, names and shapes of the parameters). It is written as
`.step-N.partial` and renamed when it is complete. A folder `step-N` is therefore always a complete
checkpoint, even if the run was killed while saving.

Where each host has a folder of its own (checkpoint.shared = false), the ranks of a host save what
they hold by themselves, in a checkpoint of that part. `run.json` names the hosts and their files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from titan_ulysses.checkpoint.hosts import HostFolders, expect_all_hosts
from titan_ulysses.checkpoint.reader import CheckpointReader, open_checkpoint
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.failure import first_failure, one_line
from titan_ulysses.distributed.files import partial_path
from titan_ulysses.model.freezing import fingerprint
from titan_ulysses.model.names import is_adapter, plain
from titan_ulysses.optim.adamw import state_format, unaligned_blocks

_RUN_FILE = "run.json"


class Checkpointer:
    """Saves and loads a model, its optimizer and a JSON-serializable state in `folder`.

    Only the last `keep` checkpoints are kept (0: all).
    """

    # Words for error messages: the setting that names the folder, what to change for a new folder,
    # and what to change to use another disk.
    setting, other, place = "checkpoint.folder", "another job.name", "job.dump_folder"

    def __init__(self, folder: Path, *, keep: int, hosts: Sequence[str] = ()):
        """hosts: the host of each rank, if each has its own folder. Empty: all share one."""
        self.folder, self.keep = folder, keep
        self.where = f"{self.setting} = {folder}"
        self._hosts = HostFolders(hosts) if hosts else None

    def latest(self) -> int | None:
        """Return the step of the last complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Write step-<step>, then remove all but the last `keep` checkpoints. Collective.

        If step-<step> exists already, nothing is written. Raise `UserError`, on every rank, if
        saving fails.
        """
        final = self.folder / f"step-{step}"
        partial = partial_path(final)
        # Only those that publish are asked: the view that others have of a network file system may
        # be old. Of separate folders, some may have a step that the others lack.
        is_absent = self._publishes() and not final.exists()
        if first_failure("absent" if is_absent else None) is None:
            return
        if self._publishes():
            for folder in (partial, final):
                shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        reason = self._write_and_publish(partial, final, model, optimizer, state)
        if self._publishes():
            old = sorted(self.steps())[: -self.keep] if self.keep else []
            done_with = [partial, final] if reason else [self.folder / f"step-{n}" for n in old]
            for folder in done_with:
                shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()  # no rank goes on before the folder is as it stays
        if reason:
            kept = self.latest()
            raise UserError(
                f"{self.where}: saving step {step} failed ({reason}). "
                + (f"The checkpoint of step {kept} is intact; " if kept is not None else "")
                + f"free space or change {self.place}, and run the same command again to go on."
            )

    def _write_and_publish(
        self,
        partial: Path,
        final: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
    ) -> str | None:
        """Write a checkpoint, and give it its name when all ranks have written. Collective.

        Return, on every rank, why that failed, or None.
        """
        tensors = _tensors(model, optimizer)
        # What a model and an optimizer must match to load this checkpoint.
        kind = {
            "parameters": _shapes(model),
            "frozen": fingerprint(model),
            "optimizer": state_format(optimizer),
        }
        failure = None
        try:
            if self._hosts:
                self._hosts.write(tensors, partial)
            else:
                dcp.save(tensors, checkpoint_id=partial)  # an error on one rank is raised on all
        except (CheckpointException, OSError) as error:
            failure = cause(error)
        if reason := first_failure(failure):
            return reason
        if self._hosts:
            kind |= self._hosts.manifest(partial)
        try:
            if self._publishes():
                self.publish(partial, final, {**state, **kind})
        except OSError as error:
            failure = cause(error)
        return first_failure(failure)  # the other ranks wait for those that publish

    def _publishes(self) -> bool:
        """Return whether this rank renames and removes what is in the folder."""
        return self._hosts.leads if self._hosts else dist.get_rank() == 0

    def publish(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        """Turn the folder `partial` that DCP has written into the checkpoint `final`.

        Write run.json and rename the folder.
        """
        # The sizes reveal a truncated file before any tensor is read.
        state["files"] = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        with open(partial / _RUN_FILE, "w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(final)

    def remove_unfinished(self) -> None:
        """Remove what a run that was killed while saving has left in the folder."""
        if self._publishes():
            for partial in self.folder.glob(".step-*.partial"):
                shutil.rmtree(partial, ignore_errors=True)

    def read_state(self, step: int) -> dict[str, Any]:
        """Return the JSON state of step-<step>. Raise `UserError` if the checkpoint is damaged.

        It is damaged if any of its files is missing or has the wrong size.
        """
        try:
            return _read_run_file(self.folder / f"step-{step}")
        except ValueError as error:
            raise self._damaged(step, str(error)) from error

    def load(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, Any]:
        """Fill the model and the optimizer, if given, from step-<step>, on any mesh. Collective.

        Return the JSON state. Only tensor values are loaded; the hyperparameters of the optimizer
        (learning rate, betas, ...) stay as the config sets them. A checkpoint made by
        scripts/convert.py has no optimizer state and leaves the optimizer unchanged. Raise
        `UserError` if the checkpoint is damaged or belongs to another model or optimizer.
        """
        state = self._read_state_on_all(step)
        self._expect_model(step, state["parameters"], _shapes(model))
        self._expect_frozen(step, state.get("frozen", 0), fingerprint(model))
        saved_optimizer = state.get("optimizer", "adamw")
        if saved_optimizer is None:
            optimizer = None
        if optimizer is not None:
            self._expect_optimizer(step, saved_optimizer, state_format(optimizer))
        folder = self.folder / f"step-{step}"
        try:
            reader = open_checkpoint(folder, where=f"{self.where}: step-{step}")
            tensors, bits = _tensors(model, optimizer), getattr(optimizer, "bits", 32)
            self._expect_whole_blocks(step, reader, tensors.get("optimizer", {}), bits)
            if self._hosts and len(state.get("hosts", ())) > 1:
                self._hosts.read(tensors, reader, f"{self.where}: step-{step}")
            else:
                dcp.load(tensors, storage_reader=reader)  # in place
        except (CheckpointException, OSError, ValueError) as error:
            raise self._damaged(step, cause(error)) from error
        return state

    def _read_state_on_all(self, step: int) -> dict[str, Any]:
        """Return what `read_state` does. Raise its error on every rank. Collective."""
        state, problem = {}, None
        try:
            state = self.read_state(step)
            if self._hosts:
                self._hosts.expect_same(state, f"{self.where}: step-{step}")
            else:
                expect_all_hosts(state, f"{self.where}: step-{step}")
        except UserError as error:
            problem = str(error)
        if problem := first_failure(problem):
            raise UserError(problem)
        return state

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, in any order."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return [int(name) for name in names if name.isdigit()]

    def _damaged(self, step: int, why: str) -> UserError:
        others = sorted(set(self.steps()) - {step})
        remedy = (
            f"Remove it to resume from step {others[-1]}"
            if others
            else "Remove it to start from the beginning"
        )
        return UserError(f"{self.where}: step-{step} is damaged ({why}). {remedy}.")

    def _expect_model(
        self, step: int, saved: dict[str, list[int]], wanted: dict[str, list[int]]
    ) -> None:
        if difference := first_difference(saved, wanted):
            raise UserError(
                f"{self.where}: step-{step} holds another model: {difference.text} here. Give this "
                f"run {self.other}, or the model its old settings."
            )

    def _expect_frozen(self, step: int, saved: int, wanted: int) -> None:
        if saved != wanted:
            raise UserError(
                f"{self.where}: what is frozen here is not what step-{step} was trained beside. "
                "Has what model.path names changed, or training.param_dtype? Give this run what it "
                f"began with, or {self.other}."
            )

    def _expect_optimizer(self, step: int, saved: str, wanted: str) -> None:
        if saved != wanted:
            raise UserError(
                f'optimizer.name = "{wanted}": {self.where}: step-{step} holds the state of '
                f'"{saved}". Set optimizer.name = "{saved}", or give this run {self.other}.'
            )

    def _expect_whole_blocks(
        self,
        step: int,
        reader: CheckpointReader,
        optimizer: dict[str, dict[str, torch.Tensor]],
        bits: int,
    ) -> None:
        """Raise `UserError` if a rank would have to cut a block of quantized optimizer state.

        The numbers of a block share a scale, so they must stay on one rank. Collective. Called
        before anything is changed.
        """
        if bits == 32:
            return
        saved = reader.read_metadata().state_dict_metadata
        apart = None
        for name, state in optimizer.items():
            chunks = [
                (chunk.offsets, chunk.sizes) for chunk in saved[f"optimizer.{name}.exp_avg"].chunks
            ]
            if unaligned_blocks(state["exp_avg"], chunks, bits):
                apart = name
                break
        if broken := first_failure(apart):
            raise UserError(
                f"{self.where}: step-{step} was saved on another number of ranks, and the "
                f"{bits}-bit optimizer state of {broken} cannot be cut as this run needs it: "
                "numbers that share a scale would come apart. Resume with the dp_shard x sp of the "
                "run that saved it."
            )


class Difference(NamedTuple):
    """The first parameter whose shape differs between a checkpoint and a model."""

    name: str
    text: str
    """the name, the shape in the checkpoint ("there") and the shape in the model, in words"""


def first_difference(
    saved: dict[str, list[int]], wanted: dict[str, list[int]]
) -> Difference | None:
    """Compare the names and shapes of a checkpoint with those of a model.

    Return None if they are equal.
    """
    for name in dict.fromkeys((*wanted, *saved)):
        there = saved.get(name, "absent")
        here = wanted.get(name, "absent")
        if there != here:
            return Difference(name, f"{name} is {there} there and {here}")
    return None


def is_checkpoint(path: str) -> bool:
    """Return whether path is a step-N folder saved by a run, not a folder of safetensors."""
    return bool(path) and (Path(path) / _RUN_FILE).is_file()


def check_weights(path: str) -> None:
    """Raise `UserError` if the step-N folder at path is damaged. Needs no model.

    The message names checkpoint.initial_load_path.
    """
    try:
        state = _read_run_file(Path(path))
    except ValueError as error:
        raise UserError(
            f"checkpoint.initial_load_path = {path}: the checkpoint is damaged ({error})."
        ) from error
    expect_all_hosts(state, f"checkpoint.initial_load_path = {path}")


def needs_base(path: str) -> bool:
    """Return whether the step-N folder at path lacks parameters, because they were frozen."""
    return bool(_read_run_file(Path(path)).get("frozen", 0))


def load_weights(path: str, model: nn.Module) -> None:
    """Fill the model with the weights of the step-N folder at path, from any mesh. Collective.

    Only the weights that were trained in that run are loaded, and no optimizer state. All other
    parameters must have been frozen in that run and must be in the model already, except for
    adapters, which may be new. Raise `UserError`, before anything changes, if names, shapes or
    frozen values do not match.
    """
    saved = _read_run_file(Path(path))
    wanted = {plain(name): x for name, x in get_model_state_dict(model).items()}
    shapes = {
        name: list(tensor.shape)
        for name, tensor in wanted.items()
        # Frozen parameters are not saved, and adapters may be new.
        if name in saved["parameters"] or not (is_adapter(name) or saved.get("frozen", 0))
    }
    if difference := first_difference(saved["parameters"], shapes):
        hint = ""
        if is_adapter(difference.name):
            hint = " Set lora.rank and lora.target_modules as that run had them."
        raise UserError(
            f"checkpoint.initial_load_path = {path} holds another model: {difference.text} "
            f"here.{hint}"
        )
    if saved.get("frozen", 0) and saved["frozen"] != fingerprint(model):
        raise UserError(
            f"checkpoint.initial_load_path = {path}: what was frozen there is not what is frozen "
            "here, and only the rest is saved. Begin with the export/ of that run, or with its "
            "model.path, model.freeze and [lora]."
        )
    tensors = {name: wanted[name] for name in saved["parameters"]}
    try:
        reader = open_checkpoint(Path(path), where=f"checkpoint.initial_load_path = {path}")
        dcp.load({"model": tensors}, storage_reader=reader)  # in place
    except (CheckpointException, OSError, ValueError) as error:
        raise UserError(
            f"checkpoint.initial_load_path = {path}: the checkpoint is damaged ({cause(error)})."
        ) from error


def _read_run_file(folder: Path) -> dict[str, Any]:
    """Return the JSON state of a checkpoint.

    Raise `ValueError` if the checkpoint is damaged: a file is missing or has the wrong size.
    """
    try:
        state = json.loads((folder / _RUN_FILE).read_text())
        files, _ = dict(state["files"]), dict(state["parameters"])
        sizes = {name: (folder / name).stat().st_size for name in files}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    for name, size in files.items():
        if sizes[name] != size:
            raise ValueError(f"{name} has {sizes[name]} of {size} bytes")
    return state


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, dict[str, Any]]:
    """Return the live tensors of model and optimizer by parameter name.

    An optimizer without state gets its state allocated, so that it can be filled.
    """
    tensors = {"model": _trained_state(model)}
    if optimizer is not None:
        tensors["optimizer"] = get_optimizer_state_dict(model, optimizer)["state"]
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # offloaded state may still be on its way to the host
    return tensors


def _trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of the model by name, without frozen parameters.

    A run that resumes loads frozen parameters from the same place as when it began.
    """
    # DCP's option `ignore_frozen_params` would keep tied frozen parameters under their second name.
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, p in named if not p.requires_grad}
    return {name: x for name, x in get_model_state_dict(model).items() if name not in frozen}


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in _trained_state(model).items()}


def saved_bytes(model: nn.Module) -> int:
    """Return the bytes of the model in a checkpoint, summed over all ranks.

    A tied tensor is counted under each of its names.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in _trained_state(model).values())


def cause(error: BaseException) -> str:
    """Return the innermost reason in one line: DCP wraps a rank's error in its own exception."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {cause(inner)}"
    return one_line(error)
