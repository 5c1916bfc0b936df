"""Checkpoints through DCP (torch.distributed.checkpoint), saved by all ranks, readable on any mesh.

`checkpoints/step-N/` contains DCP's files (model and optimizer, by parameter name) and `run.json`
(the rest: step, data position, shapes of the parameters, hashes of the files, see run_file.py). It
is written as `.step-N.partial` and renamed when it is complete. A folder `step-N` is therefore
always a complete checkpoint, even if the run was killed while saving. If it is damaged later, that
is found while it is read, and `load_newest` takes the newest one before it that is whole.

Where each host has a folder of its own (checkpoint.shared = false), the ranks of a host save what
they hold by themselves, in a checkpoint of that part. `run.json` names the hosts and their files.
"""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from titan_ulysses.checkpoint.hosts import HostFolders, expect_all_hosts
from titan_ulysses.checkpoint.manifest import Damage, HashingWriter, Pieces, unreadable
from titan_ulysses.checkpoint.reader import CheckpointReader, open_checkpoint
from titan_ulysses.checkpoint.run_file import RUN_FILE, expect_fields, publish, read_run_file
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.failure import first_failure, one_line
from titan_ulysses.distributed.files import partial_path
from titan_ulysses.model.freezing import fingerprint
from titan_ulysses.model.names import is_adapter, plain
from titan_ulysses.optim.adamw import state_format, unaligned_blocks


class DamagedCheckpoint(UserError):
    """Raised, on every rank, if a checkpoint is not what was saved. `why` names the file."""

    def __init__(self, message: str, why: str):
        super().__init__(message)
        self.why = why


def _warn(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(text, stacklevel=4)


class Checkpointer:
    """Saves and loads a model, its optimizer and a JSON-serializable state in `folder`.

    Only the last `keep` checkpoints are kept (0: all).
    """

    # Words for error messages: the setting that names the folder, what to change for a new folder,
    # and what to change to use another disk.
    setting, other, place = "checkpoint.folder", "another job.name", "job.dump_folder"

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        hosts: Sequence[str] = (),
        say: Callable[[str], None] = _warn,
    ):
        """hosts: the host of each rank, if each has its own folder. Empty: all share one.

        say: how a user is told of a checkpoint that is not taken. It is called on every rank.
        """
        self.folder, self.keep, self._say = folder, keep, say
        self.damaged: list[int] = []
        """Steps of the damaged checkpoints that `load_newest` has found."""
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
            old = sorted(self.steps())[: -self.keep] if self.keep and not reason else []
            done_with = [partial, final] if reason else [self.folder / f"step-{n}" for n in old]
            for folder in done_with:
                shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()  # no rank goes on before the folder is as it stays
        if reason:
            kept = None
            with suppress(UserError):  # the folder may be what cannot be read
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
        tensors, save_id = _tensors(model, optimizer), [uuid.uuid4().hex]
        dist.broadcast_object_list(save_id, src=0)
        # What a model and an optimizer must match to load this checkpoint.
        kind = {
            "parameters": _shapes(model),
            "frozen": fingerprint(model),
            "optimizer": state_format(optimizer),
        }
        failure, pieces = None, Pieces()
        try:
            if self._hosts:
                pieces = self._hosts.write(tensors, partial)
            else:
                writer = HashingWriter(partial)
                dcp.save(tensors, storage_writer=writer)  # an error on one rank is raised on all
                pieces = writer.pieces
        except (CheckpointException, OSError) as error:
            failure = cause(error)
        if reason := first_failure(failure):
            return reason
        pieces = self._of_all_ranks(pieces)
        if self._hosts:
            kind |= self._hosts.manifest(partial)
        try:
            if self._publishes():
                saved = {**state, "step": step_of(final), **kind}
                publish(partial, final, saved, pieces, save_id=save_id[0])
        except OSError as error:
            failure = cause(error)
        return first_failure(failure)  # the other ranks wait for those that publish

    def _publishes(self) -> bool:
        """Return whether this rank renames and removes what is in the folder."""
        return self._hosts.leads if self._hosts else dist.get_rank() == 0

    def _of_all_ranks(self, pieces: Pieces) -> Pieces:
        """Return, on the ranks that publish, the pieces that go to their folder. Collective."""
        ranks = self._hosts.ranks_of[self._hosts.own] if self._hosts else [*range(_ranks())]
        group = self._hosts.ranks_of_this_host() if self._hosts else None
        gathered: list[Any] | None = [None] * len(ranks) if self._publishes() else None
        dist.gather_object(pieces, gathered, dst=ranks[0], group=group)
        return {name: found for part in gathered or () for name, found in part.items()}

    def remove_unfinished(self) -> None:
        """Remove what a run that was killed while saving has left in the folder."""
        if self._publishes():
            for partial in self.folder.glob(".step-*.partial"):
                shutil.rmtree(partial, ignore_errors=True)

    def read_state(self, step: int) -> dict[str, Any]:
        """Return the JSON state of step-<step>. Reads no tensors.

        Raise `DamagedCheckpoint` if its run.json is not what was saved, or if any of its files is
        missing or has another size.
        """
        try:
            return read_run_file(self.folder / f"step-{step}")
        except Damage as error:
            raise self._damaged(step, str(error)) from error
        except OSError as error:
            raise self._unreadable(unreadable(error) or one_line(error)) from error

    def load_newest(
        self,
        steps: Collection[int],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        needs: Sequence[str] = (),
        check: Callable[[dict[str, Any]], None] = lambda state: None,
    ) -> tuple[int, dict[str, Any]]:
        """Fill the model and the optimizer, if given, from the newest checkpoint that is whole.

        Return its step and its JSON state. Collective. steps: those to choose from, the same on
        every rank and at least one; needs, check: as in `load`. Damaged checkpoints are
        named by `say`, and stay where they are until `set_damaged_aside`. Raise
        `DamagedCheckpoint` if none is whole, so that a run never begins again unasked, and other
        `UserError`s as `load` does.
        """
        found: dict[int, DamagedCheckpoint] = {}
        for step in sorted(steps, reverse=True):
            try:
                state = self.load(step, model, optimizer, needs=needs, check=check)
            except DamagedCheckpoint as error:
                found[step] = error
                if optimizer is not None:
                    optimizer.state.clear()  # parts may be filled
                continue
            if found:
                told = "; ".join(f"step-{n} is damaged ({error.why})" for n, error in found.items())
                self._say(
                    f"WARNING: {self.where}: {told}. Going on from step {step}, the newest "
                    "checkpoint before that is whole."
                )
            if "save_id" not in state:
                self._say(
                    f"WARNING: {self.where}: step-{step} was saved by an earlier version, without "
                    "hashes: damage that keeps the sizes of its files is not found."
                )
            self.damaged = list(found)
            return step, state
        if len(found) == 1:
            raise next(iter(found.values()))
        told = "; ".join(f"step-{n} is damaged ({error.why})" for n, error in found.items())
        raise DamagedCheckpoint(
            f"{self.where}: no checkpoint is whole: {told}. Remove them to start from the "
            "beginning.",
            told,
        )

    def set_damaged_aside(self) -> None:
        """Rename the checkpoints that `load_newest` has found damaged to step-N.damaged.

        Otherwise they would be in the way when the run comes to their steps again.
        """
        for step in self.damaged:
            path = self.folder / f"step-{step}"
            aside = path.with_name(f"{path.name}.damaged")
            if self._publishes() and path.exists():
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            self._say(f"step-{step}, which is damaged, is now {aside}. Remove it when you like.")
        self.damaged = []

    def load(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        needs: Sequence[str] = (),
        check: Callable[[dict[str, Any]], None] = lambda state: None,
    ) -> dict[str, Any]:
        """Fill the model and the optimizer, if given, from step-<step>, on any mesh. Collective.

        Return the JSON state, which has the fields `needs` and has passed `check`. Only tensor
        values are loaded; the hyperparameters of the optimizer (learning rate, betas, ...) stay as
        the config sets them. A checkpoint made by scripts/convert.py has no optimizer state and
        leaves the optimizer unchanged. Raise `DamagedCheckpoint` if the checkpoint is damaged: what
        was read until then stays in the model. Raise another `UserError` if it belongs to another
        model or optimizer, or if a file cannot be read.
        """
        state = self._read_state_on_all(step, needs)
        check(state)
        self._expect_model(step, state["parameters"], _shapes(model))
        self._expect_frozen(step, state["frozen"], fingerprint(model))
        folder, where = self.folder / f"step-{step}", f"{self.where}: step-{step}"
        closed, damage = None, None
        try:
            reader = open_checkpoint(folder, state["files"], where=where)
            _expect_state_of(state["optimizer"], reader)
            if state["optimizer"] is None:
                optimizer = None
            if optimizer is not None:
                self._expect_optimizer(step, state["optimizer"], state_format(optimizer))
            tensors, bits = _tensors(model, optimizer), getattr(optimizer, "bits", 32)
            self._expect_whole_blocks(step, reader, tensors.get("optimizer", {}), bits)
            if self._hosts and len(state.get("hosts", ())) > 1:
                self._hosts.read(tensors, reader, where)
            else:
                dcp.load(tensors, storage_reader=reader)  # in place
        except (CheckpointException, OSError, ValueError) as error:
            closed = unreadable(innermost(error))
            damage = None if closed else cause(error)
        # DCP raises an error on all ranks that read together: those of one host, if each has a
        # folder of its own.
        if closed := first_failure(closed):
            raise self._unreadable(closed)
        if damage := first_failure(damage):
            raise self._damaged(step, damage)
        return state

    def _read_state_on_all(self, step: int, needs: Sequence[str]) -> dict[str, Any]:
        """Return what `read_state` does. Raise its error on every rank. Collective."""
        state, problem, damage, where = {}, None, None, f"{self.where}: step-{step}"
        try:
            state = self.read_state(step)
            if self._hosts:
                self._hosts.expect_same(state, where)
            else:
                expect_all_hosts(state, where)
            if needs and "loop" in state:
                raise UserError(
                    f"{where} was saved by save_checkpoint of a training loop, and has no position "
                    f"in the data of this run. Give this run {self.other}."
                )
            # Those of an earlier version have no seed.
            expect_fields(state, *(n for n in needs if n != "rng" or "save_id" in state))
        except DamagedCheckpoint as error:
            damage = error.why
        except Damage as error:
            damage = str(error)
        except UserError as error:
            problem = str(error)
        if problem := first_failure(problem):
            raise UserError(problem)
        damage = first_failure(damage)
        if damage is None and self._hosts:
            damage = self._hosts.another_save(state)
        if damage:
            raise self._damaged(step, damage)
        return state

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, in any order.

        Raise `UserError` if the folder cannot be listed. It may be absent.
        """
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unreadable(f"{self.folder}: {error.strerror}") from error
        steps = map(step_named, names)
        return [step for step in steps if step is not None]

    def _unreadable(self, why: str) -> UserError:
        return UserError(
            f"{self.where}: cannot be read ({why}), so that it is unknown which checkpoints are "
            "there. Nothing is changed. Make it readable, and run the same command again."
        )

    def _damaged(self, step: int, why: str) -> DamagedCheckpoint:
        others = sorted(set(self.steps()) - {step})
        remedy = (
            f"Remove it to resume from step {others[-1]}"
            if others
            else "Remove it to start from the beginning"
        )
        return DamagedCheckpoint(f"{self.where}: step-{step} is damaged ({why}). {remedy}.", why)

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
    return bool(path) and (Path(path) / RUN_FILE).exists()


def step_named(name: str) -> int | None:
    """Return N of the name step-N, written as the trainer writes it; None for another name."""
    number = name.removeprefix("step-")
    is_step = name.startswith("step-") and number.isascii() and number.isdecimal()
    return int(number) if is_step and len(number) < 19 and number == str(int(number)) else None


def step_of(folder: Path) -> int:
    """Return N of a folder step-N. Raise `UserError` if it has another name."""
    step = step_named(folder.name)
    if step is None:
        raise UserError(f"{folder}: a checkpoint is a folder named step-N, as in step-0.")
    return step


def check_weights(path: str) -> None:
    """Raise `UserError` if the step-N folder at path is damaged. Needs no model.

    The message names checkpoint.initial_load_path.
    """
    state = _initial_state(path)
    expect_all_hosts(state, f"checkpoint.initial_load_path = {path}")


def needs_base(path: str) -> bool:
    """Return whether the step-N folder at path lacks parameters, because they were frozen."""
    return bool(_initial_state(path)["frozen"])


def _initial_state(path: str) -> dict[str, Any]:
    """Return run.json of checkpoint.initial_load_path. Raise `UserError` if it is damaged."""
    try:
        return read_run_file(Path(path))
    except Damage as error:
        raise UserError(
            f"checkpoint.initial_load_path = {path}: the checkpoint is damaged ({error})."
        ) from error


def load_weights(path: str, model: nn.Module) -> None:
    """Fill the model with the weights of the step-N folder at path, from any mesh. Collective.

    Only the weights that were trained in that run are loaded, and no optimizer state. All other
    parameters must have been frozen in that run and must be in the model already, except for
    adapters, which may be new. Raise `UserError`, before anything changes, if names, shapes or
    frozen values do not match.
    """
    saved = _initial_state(path)
    wanted = {plain(name): x for name, x in get_model_state_dict(model).items()}
    shapes = {
        name: list(tensor.shape)
        for name, tensor in wanted.items()
        # Frozen parameters are not saved, and adapters may be new.
        if name in saved["parameters"] or not (is_adapter(name) or saved["frozen"])
    }
    if difference := first_difference(saved["parameters"], shapes):
        hint = ""
        if is_adapter(difference.name):
            hint = " Set lora.rank and lora.target_modules as that run had them."
        raise UserError(
            f"checkpoint.initial_load_path = {path} holds another model: {difference.text} "
            f"here.{hint}"
        )
    if saved["frozen"] and saved["frozen"] != fingerprint(model):
        raise UserError(
            f"checkpoint.initial_load_path = {path}: what was frozen there is not what is frozen "
            "here, and only the rest is saved. Begin with the export/ of that run, or with its "
            "model.path, model.freeze and [lora]."
        )
    tensors = {name: wanted[name] for name in saved["parameters"]}
    try:
        where = f"checkpoint.initial_load_path = {path}"
        reader = open_checkpoint(Path(path), saved["files"], where=where)
        dcp.load({"model": tensors}, storage_reader=reader)  # in place
    except (CheckpointException, OSError, ValueError) as error:
        raise UserError(
            f"checkpoint.initial_load_path = {path}: the checkpoint is damaged ({cause(error)})."
        ) from error


def _expect_state_of(optimizer: str | None, reader: CheckpointReader) -> None:
    """Raise `Damage` if run.json and the table of contents differ about an optimizer's state."""
    names = reader.read_metadata().state_dict_metadata
    has_state = any(name.startswith("optimizer.") for name in names)
    if has_state != (optimizer is not None):
        raise Damage(
            f"{RUN_FILE}: optimizer is {optimizer}, and there is "
            f"{'state' if has_state else 'no state'} of one"
        )


def _ranks() -> int:
    return dist.get_world_size()


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


def innermost(error: BaseException) -> BaseException:
    """Return the error of the first rank that failed, of which DCP has made its own exception."""
    if isinstance(error, CheckpointException) and error.failures:
        return innermost(next(iter(error.failures.values()))[0])
    return error


def cause(error: BaseException) -> str:
    """Return the innermost reason in one line: DCP wraps a rank's error in its own exception."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {cause(inner)}"
    return one_line(error)
