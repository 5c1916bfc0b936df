"""checkpoint.async_mode = "async": the steps go on while a checkpoint is written, and what a
checkpoint promises holds.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import RankFailure, close_pools, run_on_ranks
from helpers.runs import Settings, learned, refusal, train, write_run
from titan_ulysses.checkpoint import storage, writing
from titan_ulysses.checkpoint.writing import copied
from titan_ulysses.config.load import load_config
from titan_ulysses.distributed.tensors import plain_pieces
from titan_ulysses.train.trainer import Trainer

ASYNC: Settings = {
    "parallelism.sequence_parallel_degree": 2,
    "checkpoint.async_mode": "async",
    "checkpoint.interval": 2,
    "checkpoint.keep_latest_k": 0,
    "training.steps": 6,
    "training.global_batch_size": 2,
}


def stored(run: Path) -> dict[str, Any]:
    """Of each checkpoint: what run.json says, with the hash of every piece of a tensor."""
    found = {}
    for folder in sorted((run / "checkpoints").iterdir()):
        told = json.loads((folder / "run.json").read_text())
        pieces = {name: entry.get("pieces") for name, entry in told.pop("files").items()}
        found[folder.name] = [pieces, {**told, "save_id": "", "checksum": ""}]
    return found


@pytest.mark.parametrize(
    ("shared", "optimizer"),
    [
        (True, "adamw8bit"),
        pytest.param(False, "adamw", marks=pytest.mark.slow),
        pytest.param(True, "adamw4bit", marks=pytest.mark.slow),
    ],
)
def test_the_same_checkpoints_as_without(shared: bool, optimizer: str, tmp_path: Path) -> None:
    config, outputs = write_run(tmp_path), tmp_path / "outputs"
    shape = load_config(config).model.config | {"hidden_size": 96}  # enough to be quantized
    settings = ASYNC | {
        "checkpoint.shared": shared,
        "optimizer.name": optimizer,
        "model.config": shape,
    }
    for name, mode in {"sync": "disabled", "async": "async"}.items():
        run_on_ranks(2, train, config, settings | {"job.name": name, "checkpoint.async_mode": mode})
    assert [*stored(outputs / "async")] == ["step-2", "step-4", "step-6"]
    assert stored(outputs / "async") == stored(outputs / "sync")
    assert learned(outputs / "async") == learned(outputs / "sync")
    # And they can be gone on from, in either mode.
    for name, mode in {"async": "disabled", "sync": "async"}.items():
        more = {"job.name": name, "checkpoint.async_mode": mode, "training.steps": 8}
        run_on_ranks(2, train, config, settings | more)
    assert learned(outputs / "async") == learned(outputs / "sync")
    assert len(learned(outputs / "sync")) == 8


# --- the steps go on ------------------------------------------------------------------------------


def train_while_writing(config: Path, settings: Settings) -> dict[str, list[int]]:
    """A run whose writer waits until the trainer is a step further; at which step each save began
    to be written, and at which step it ended.
    """
    seen: dict[str, list[int]] = {"began": [], "ended": [], "threads": []}
    write, run, made = writing.CheckpointWriter.write, Trainer._train, []

    def noted(trainer: Trainer) -> None:
        made.append(trainer)
        run(trainer)

    def slow(self: writing.CheckpointWriter, step: int, *args: Any) -> str | None:
        [trainer] = made
        seen["began"].append(trainer.state.step)
        seen["threads"].append(threading.current_thread() is threading.main_thread())
        deadline = time.monotonic() + 30
        while trainer.state.step < min(step + 1, 6) and time.monotonic() < deadline:
            time.sleep(0.001)
        seen["ended"].append(trainer.state.step)
        return write(self, step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing.CheckpointWriter, "write", slow)
        patch.setattr(Trainer, "_train", noted)
        train(config, settings)
    return seen


def test_steps_go_on_while_bytes_are_written(tmp_path: Path) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    for seen in run_on_ranks(2, train_while_writing, config, ASYNC):
        # Each save begins at its step, and is written when the next step is over; the last one
        # before the run ends.
        assert seen == {"began": [2, 4, 6], "ended": [3, 5, 6], "threads": [False] * 3}
    assert [*stored(run)] == ["step-2", "step-4", "step-6"]
    # What is written is what was there when the save began.
    at_once = {"job.name": "at-once", "checkpoint.async_mode": "disabled"}
    run_on_ranks(2, train, config, ASYNC | at_once)
    assert stored(run) == stored(run.parent / "at-once")


def what_is_written(folder: Path) -> list[float]:
    """What a copy holds, before and after the tensors have changed, with its memory used again."""
    tensors = {"a": {"x": torch.ones(4)}, "step": torch.tensor(1.0), "n": 3}
    copy = copied(tensors)
    tensors["a"]["x"].fill_(2)
    places = [piece.data_ptr() for piece in plain_pieces(copy["a"]["x"])]
    found = [copy["a"]["x"].sum().item()]
    again = copied(tensors, copy)
    assert places == [piece.data_ptr() for piece in plain_pieces(again["a"]["x"])]
    return [*found, again["a"]["x"].sum().item(), again["n"]]


def test_a_copy_is_of_its_moment(tmp_path: Path) -> None:
    assert what_is_written(tmp_path) == [4, 8, 3]


# --- a save that fails ----------------------------------------------------------------------------


def failing(config: Path, settings: Settings, *, times: int) -> tuple[str, list[str]]:
    """The refusal of a run whose disk is full this many times, or "", and its warnings."""
    said, publish, failed = [], writing.publish, []

    def full(*args: Any, **options: Any) -> None:
        if len(failed) < times:
            failed.append(1)
            raise OSError(28, "No space left on device")
        publish(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "publish", full)
        patch.setattr(Trainer, "_say", lambda self, text: said.append(f"{self.state.step}: {text}"))
        try:
            message = refusal(config, settings)
        except AssertionError:
            message = ""
    return message, [text for text in said if "WARNING" in text]


def test_a_save_that_fails_is_said_and_tried_again(tmp_path: Path) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    for message, warnings in run_on_ranks(2, partial(failing, config, ASYNC, times=1)):
        assert message == ""
        [warning] = warnings
        assert (
            "saving step 2 failed ([Errno 28] No space left on device). Trying once more."
            in warning
        )
        # At the next step, or when the next save is due, whichever is known first.
        assert warning[0] in "234"
    assert [*stored(run)] == ["step-2", "step-4", "step-6"]


def test_a_save_that_fails_twice_ends_the_run(tmp_path: Path) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    for message, warnings in run_on_ranks(2, partial(failing, config, ASYNC, times=2)):
        assert "saving step 2 failed ([Errno 28] No space left on device). free space" in message
        assert len(warnings) == 1
    assert list((run / "checkpoints").iterdir()) == []


def with_no_room(config: Path, settings: Settings) -> str:
    """The refusal of a run none of whose files may grow beyond 20,000 bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        return refusal(config, settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up_under_the_thread_that_writes(
    tmp_path: Path, undisturbed: list
) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    close_pools()  # the ranks of a new one have a small rendezvous file
    for message in run_on_ranks(2, with_no_room, config, ASYNC):
        assert "saving step 2 failed (" in message and "File too large" in message
        assert "free space or change job.dump_folder" in message
    assert list((run / "checkpoints").iterdir()) == []
    run_on_ranks(2, train, config, ASYNC)
    assert learned(run) == undisturbed


# --- stopped and killed ---------------------------------------------------------------------------


def stopped(config: Path, settings: Settings) -> None:
    """SIGTERM in the middle of step 3."""
    step = Trainer._step

    def signalled(trainer: Trainer, *args: Any) -> Any:
        if trainer.state.step == 2:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.1)
        return step(trainer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", signalled)
        train(config, settings)


def killed_while_writing(config: Path, settings: Settings) -> None:
    """SIGKILL to all ranks while the checkpoint of step 4 is written and step 5 or 6 is made."""
    write = storage.HashingWriter.write_data

    def dying(self: Any, *args: Any, **options: Any) -> Any:
        if "step-4" in str(self.path):
            write(self, *args, **options).wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.HashingWriter, "write_data", dying)
        train(config, settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float, float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_on_ranks(2, train, write_run(folder), ASYNC)
    return learned(folder / "outputs" / "run")


def test_sigterm_leaves_the_checkpoint_of_its_step(tmp_path: Path, undisturbed: list) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    run_on_ranks(2, stopped, config, ASYNC)
    assert [*stored(run)] == ["step-2", "step-3"]
    run_on_ranks(2, train, config, ASYNC)
    assert learned(run) == undisturbed


def test_a_kill_costs_nothing_but_that_save(tmp_path: Path, undisturbed: list) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    with pytest.raises(RankFailure, match="died with exit code -9"):
        run_on_ranks(2, killed_while_writing, config, ASYNC)
    names = sorted(folder.name for folder in (run / "checkpoints").iterdir())
    assert names == [".step-4.partial", "step-2"]
    run_on_ranks(2, train, config, ASYNC)
    assert learned(run) == undisturbed
    assert [*stored(run)] == ["step-2", "step-4", "step-6"]
