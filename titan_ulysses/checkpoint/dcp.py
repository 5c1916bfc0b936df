"""Checkpoints through DCP (torch.distributed.checkpoint), saved by all ranks, readable on any mesh.

If a checkpoint (see step_folder.py) is damaged after it was written, that is found while it is
read, and `load_newest` takes the newest one before it that is whole.

Where each host has a folder of its own (checkpoint.shared = false), the ranks of a host save what
they hold by themselves, in a checkpoint of that part. `run.json` names the hosts and their files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import STORAGE_TYPES

from titan_ulysses.checkpoint.hosts import HostFolders, expect_all_hosts
from titan_ulysses.checkpoint.manifest import Damage
from titan_ulysses.checkpoint.state import first_difference, shapes_of, tensors_of
from titan_ulysses.checkpoint.step_folder import RUN_FILE, expect_fields, read_run_file, steps_in
from titan_ulysses.checkpoint.storage import errors_of_all_ranks, open_checkpoint
from titan_ulysses.checkpoint.writing import BackgroundSave, CheckpointWriter, SaveFailed
from titan_ulysses.distributed.atomic import remove
from titan_ulysses.distributed.errors import UserError, first_failure
from titan_ulysses.model.freezing import fingerprint
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
        in_background: bool = False,
        say: Callable[[str], None] = _warn,
    ):
        """hosts: the host of each rank, if each has its own folder. Empty: all share one.

        in_background: `save` copies the tensors and returns, and a thread writes them.
        say: how the user is notified of a checkpoint that is passed over; called on every rank.
        """
        self.folder, self.keep, self._say = folder, keep, say
        self.damaged: list[int] = []
        """Steps of the damaged checkpoints that `load_newest` has found."""
        self.where = f"{self.setting} = {folder}"
        self._hosts = HostFolders(hosts) if hosts else None
        self._writer = CheckpointWriter(folder, keep=keep, hosts=self._hosts)
        self.in_background = in_background
        self._background: BackgroundSave | None = None

    def latest(self) -> int | None:
        """Return the step of the last complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Write step-<step>, then remove all but the last `keep` checkpoints. Collective.

        If step-<step> exists already, nothing is written. Raise `UserError`, on every rank, if
        saving fails. In the background, return when the tensors are copied, after waiting for the
        save before: see `retry_failed` and `finish`.
        """
        self.finish()
        tensors = tensors_of(model, optimizer)
        # What a model and an optimizer must match to load this checkpoint.
        saved = state | {
            "parameters": shapes_of(model),
            "frozen": fingerprint(model),
            "optimizer": state_format(optimizer),
        }
        if self.in_background:
            self._background = self._background or BackgroundSave(self._writer.for_thread())
            self._background.start(step, tensors, saved)
            return
        try:
            self._writer.write(step, tensors, saved)
        except SaveFailed as error:
            raise self._failed(step, str(error)) from error

    @property
    def save_has_failed(self) -> bool:
        """Whether this rank knows that the save in the background has failed. Waits for nothing."""
        return self._background is not None and self._background.has_failed

    def retry_failed(self) -> None:
        """Say that the save in the background has failed, and try once more. Collective.

        Called on every rank as soon as `save_has_failed` on one of them. The same bytes are
        written, which are still in memory. Raise `UserError`, on every rank, the second time.
        """
        background = self._background
        if background is None or (reason := background.wait()) is None:
            return
        assert background.step is not None
        if background.tries > 1:
            step, background.step = background.step, None
            raise self._failed(step, reason)
        self._say(
            f"WARNING: {self.where}: saving step {background.step} failed ({reason}). Trying once "
            "more."
        )
        background.again()

    def finish(self) -> None:
        """Wait until the save in the background is on the disk. Collective.

        One that has failed is tried once more. Raise `UserError`, on every rank, if it fails again.
        """
        while self._background is not None and self._background.wait() is not None:
            self.retry_failed()

    def _failed(self, step: int, reason: str) -> UserError:
        kept = None
        with suppress(UserError):  # the folder may be what cannot be read
            kept = self.latest()
        return UserError(
            f"{self.where}: saving step {step} failed ({reason}). "
            + (f"The checkpoint of step {kept} is intact; " if kept is not None else "")
            + f"free space or change {self.place}, and run the same command again to go on."
        )

    def remove_unfinished(self) -> None:
        """Remove what a run that was killed while saving has left in the folder."""
        if self._writer.publishes:
            for partial in self.folder.glob(".step-*.partial"):
                remove(partial)

    def read_state(self, step: int, *, needs: Sequence[str] = ()) -> dict[str, Any]:
        """Return the JSON state of step-<step>, which has the fields `needs`. Reads no tensors.

        Raise `DamagedCheckpoint` if its run.json is not what was saved, or if any of its files is
        missing or has another size. Collective.
        """
        where = f"{self.where}: step-{step}"
        with self._errors_of(step):
            state = read_run_file(self.folder / f"step-{step}")
            if self._hosts:
                self._hosts.expect_same(state, where)
            else:
                expect_all_hosts(state, where)
            if needs and "loop" in state:
                raise UserError(
                    f"{where} was saved by save_checkpoint of a training loop, and has no position "
                    f"in the data of this run. Give this run {self.other}."
                )
            expect_fields(state, *needs)
        if self._hosts:
            with self._errors_of(step):
                self._hosts.expect_one_save(state)
        return state

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
        every rank and at least one; needs, check: as in `load`. Damaged checkpoints are named by
        `say`, and stay where they are until `set_damaged_aside`. Raise `DamagedCheckpoint` if none
        is intact, so that a run never silently starts over, and other `UserError`s as `load` does.
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
                self._say(
                    f"WARNING: {self.where}: {_listed(found)}. Resuming from step {step}, the "
                    "newest intact checkpoint before it."
                )
            self.damaged = list(found)
            return step, state
        if len(found) == 1:
            raise next(iter(found.values()))
        raise DamagedCheckpoint(
            f"{self.where}: no checkpoint is intact: {_listed(found)}. Remove them to start from "
            "the beginning.",
            _listed(found),
        )

    def set_damaged_aside(self) -> None:
        """Rename the checkpoints that `load_newest` has found damaged to step-N.damaged.

        Otherwise they would be in the way when the run comes to their steps again.
        """
        for step in self.damaged:
            path = self.folder / f"step-{step}"
            aside = path.with_name(f"{path.name}.damaged")
            if self._writer.publishes and path.exists():
                remove(aside)
                path.rename(aside)
            self._say(
                f"step-{step} is damaged and was renamed to {aside}. You may delete it at any time."
            )
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
        the config sets them. A checkpoint that `titan-ulysses convert` made has no optimizer state
        and leaves the optimizer unchanged. Raise `DamagedCheckpoint` if the checkpoint is damaged:
        what was read until then stays in the model. Raise another `UserError` if it belongs to
        another model or optimizer, or if a file cannot be read.
        """
        state = self.read_state(step, needs=needs)
        check(state)
        self._expect_same(step, state, model)
        with self._errors_of(step):
            folder, where = self.folder / f"step-{step}", f"{self.where}: step-{step}"
            reader, group = open_checkpoint(folder, state["files"], where=where), None
            saved = reader.read_metadata()
            if state["optimizer"] is None:
                optimizer = None
            self._expect_optimizer(step, state["optimizer"], optimizer, saved.state_dict_metadata)
            tensors = tensors_of(model, optimizer)
            if optimizer is not None:
                bits = getattr(optimizer, "bits", 32)
                self._expect_whole_blocks(step, saved.state_dict_metadata, tensors, bits)
            if self._hosts and len(state.get("hosts", ())) > 1:
                self._hosts.expect_complete(tensors, saved, where)
                group = self._hosts.ranks_of_this_host()
            # In place. DCP raises an error on all ranks of the group.
            dcp.load(tensors, storage_reader=reader, process_group=group)
        return state

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, in any order.

        Raise `UserError` if the folder cannot be listed. It may be absent.
        """
        try:
            return steps_in(self.folder)
        except OSError as error:
            raise self._unreadable(f"{self.folder}: {error.strerror}") from error

    def _unreadable(self, why: str) -> UserError:
        return UserError(
            f"{self.where}: cannot be read ({why}), so it is unknown which checkpoints it holds. "
            "Nothing was changed. Make it readable, and run the same command again."
        )

    def _damaged(self, step: int, why: str) -> DamagedCheckpoint:
        others = sorted(set(self.steps()) - {step})
        remedy = (
            f"Remove it to resume from step {others[-1]}"
            if others
            else "Remove it to start from the beginning"
        )
        return DamagedCheckpoint(f"{self.where}: step-{step} is damaged ({why}). {remedy}.", why)

    @contextmanager
    def _errors_of(self, step: int) -> Iterator[None]:
        """Name step-<step> in what `errors_of_all_ranks` raises in this context. Collective."""
        try:
            with errors_of_all_ranks():
                yield
        except Damage as error:
            raise self._damaged(step, str(error)) from error
        except OSError as error:
            raise self._unreadable(str(error)) from error

    def _expect_same(self, step: int, state: dict[str, Any], model: nn.Module) -> None:
        """Raise `UserError` if the checkpoint is of another model, or of other frozen weights."""
        if difference := first_difference(state["parameters"], shapes_of(model)):
            raise UserError(
                f"{self.where}: step-{step} holds a different model: {difference.text} here. Give "
                f"this run {self.other}, or restore the settings of the model."
            )
        if state["frozen"] != fingerprint(model):
            raise UserError(
                f"{self.where}: the frozen weights are not those that step-{step} was trained "
                "with. Did model.path, training.param_dtype or lora.quantize_base change? Restore "
                f"them, or give this run {self.other}."
            )

    def _expect_optimizer(
        self,
        step: int,
        saved: str | None,
        optimizer: torch.optim.Optimizer | None,
        stored: dict[str, STORAGE_TYPES],
    ) -> None:
        """Raise `UserError` if the state is that of another optimizer.

        Raise `Damage` if run.json and the table of contents differ about whether there is one.
        """
        has_state = any(name.startswith("optimizer.") for name in stored)
        if has_state != (saved is not None):
            raise Damage(
                f"{RUN_FILE}: optimizer is {saved}, but the checkpoint has "
                f"{'an' if has_state else 'no'} optimizer state"
            )
        if optimizer is not None and saved != (wanted := state_format(optimizer)):
            raise UserError(
                f'optimizer.name = "{wanted}": {self.where}: step-{step} holds the state of '
                f'"{saved}". Set optimizer.name = "{saved}", or give this run {self.other}.'
            )

    def _expect_whole_blocks(
        self,
        step: int,
        stored: dict[str, STORAGE_TYPES],
        tensors: dict[str, dict[str, Any]],
        bits: int,
    ) -> None:
        """Raise `UserError` if a rank would have to cut a block of quantized optimizer state.

        The numbers of a block share a scale, so they must stay on one rank. Collective. Called
        before anything is changed.
        """
        if bits == 32:
            return
        cut = None
        for name, state in tensors["optimizer"].items():
            chunks = [
                (chunk.offsets, chunk.sizes) for chunk in stored[f"optimizer.{name}.exp_avg"].chunks
            ]
            if unaligned_blocks(state["exp_avg"], chunks, bits):
                cut = name
                break
        if broken := first_failure(cut):
            raise UserError(
                f"{self.where}: step-{step} was saved on another number of ranks, and the "
                f"{bits}-bit optimizer state of {broken} cannot be cut as this run needs it: "
                "values that share a scale would be separated. Resume with the dp_shard x sp of "
                "the run that saved it."
            )


def _listed(damaged: dict[int, DamagedCheckpoint]) -> str:
    return "; ".join(f"step-{step} is damaged ({error.why})" for step, error in damaged.items())
