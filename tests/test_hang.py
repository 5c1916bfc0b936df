"""Ranks that hang: the others end in time, and say who, where it was, and what they waited for. And
one run in a folder.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.forked import start
from helpers.ranks import run_on_ranks
from helpers.runs import Settings, learned, refusal, train, write_run
from test_command_line import Launch
from titan_ulysses.launch import lock as lock_module
from titan_ulysses.launch.failure import _print, of_system
from titan_ulysses.launch.run_store import host_name
from titan_ulysses.train import trainer as trainer_module

REPOSITORY = Path(__file__).resolve().parents[1]

DRIVER = """
import os
import signal
import sys
import time

config, how = sys.argv[1:]
rank = int(os.environ["RANK"])

from titan_ulysses.train import trainer
from titan_ulysses.config.load import load_config
from titan_ulysses.launch.failure import exit_on_error

train_step, steps = trainer.train_step, 0

def endless():
    while True:
        time.sleep(0.01)

def hang(*args, **options):
    global steps
    steps += 1
    if rank == 1 and steps == 3:
        time.sleep(1.5)  # until its heart has beaten in this step
        open(f"{os.path.dirname(config)}/hung", "w").write(str(time.time()))
        endless() if how == "loops" else os.kill(os.getpid(), signal.SIGSTOP)
    return train_step(*args, **options)

trainer.train_step = hang
with exit_on_error():
    trainer.Trainer(load_config(config, {"comm.timeout_s": 3.0}.items())).train()
"""


@pytest.mark.parametrize("how", ["loops", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named(how: str, tmp_path: Path) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    (tmp_path / "driver.py").write_text(DRIVER)
    launched = Launch(tmp_path / "driver.py", config, how, forks=tmp_path / "said")
    code, _, err = launched.end()
    seconds = time.time() - float((tmp_path / "hung").read_text())
    assert code == 1, err
    assert seconds < 3 + 10
    what = "is at work on something else" if how == "loops" else "gives no sign of life"
    where = r"(endless|hang) \(\S+driver\.py:\d+\), called by \w+ \(.+?\)"
    message = rf"error: rank 1 on \S+ {what}: it is in step 3, " + where
    waited = r"\. Rank 0 waited for it in step 3, \w+ \(.+?\), called by \w+ \(.+?\), longer"
    by_beats = (
        rf"error: rank 1 on \S+ has given no sign of life for 3 s \(it was in step 3, {where}"
    )
    assert re.search(f"{message}{waited}|{by_beats}", err), err
    assert len(err.splitlines()) == 1
    assert f"The stacks of all ranks are in {run / 'stacks'}." in err
    assert "train_step" in (run / "stacks" / "rank-0.txt").read_text()
    if how == "loops":
        assert "endless" in (run / "stacks" / "rank-1.txt").read_text()


HOSTS_THE_STORE = """
import os, sys, time
from titan_ulysses.launch import failure, run_store
from titan_ulysses.launch.watch import Watch

rank = int(os.environ["RANK"])
store = run_store.first_connection(60.0)
run_store.put(store, f"there/{rank}", True)
while not run_store.is_there(store, f"there/{1 - rank}"):
    time.sleep(0.05)
Watch.started(100.0)
if rank == 0:
    failure.end("error: rank 1 is at work on something else", 7)
while True:
    time.sleep(0.01)
"""


def test_the_rank_that_runs_the_store_stays_until_all_have_heard(tmp_path: Path) -> None:
    """Without a launcher that ends the others. They would look for the store for seconds, and then
    blame its host.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    started = []
    for rank in "01":
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TORCHELASTIC_RUN_ID": "none"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        environment |= {"RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", HOSTS_THE_STORE]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, stderr=pipe, text=True))
    with started[0], started[1]:
        said = started[0].communicate(timeout=60)[1]
        since = time.monotonic()
        of_the_other = started[1].communicate(timeout=60)[1]
    assert said == "error: rank 1 is at work on something else\n" and of_the_other == ""
    assert [one.returncode for one in started] == [7, 7]
    assert time.monotonic() - since < 3, "it looked for the store"


SLOW_DRIVER = """
import sys, time
from titan_ulysses.train import trainer
from titan_ulysses.config.load import load_config
from titan_ulysses.launch.failure import exit_on_error

train_step, steps = trainer.train_step, []

def slow(*args, **options):
    steps.append(1)
    if len(steps) == 2:
        print("slow", flush=True)
        time.sleep(100)
    return train_step(*args, **options)

trainer.train_step = slow
with exit_on_error():
    trainer.Trainer(load_config(sys.argv[1])).train()
"""


def test_ctrl_c_of_one_process_saves_and_ends_as_a_shell_expects(tmp_path: Path) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    options = ["--config", config, "--training.steps=100000", "--checkpoint.interval=100000"]
    running = start(tmp_path / "said", REPOSITORY / "train.py", *options)
    running.wait_for("step      2/100000")
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)
    assert running.returncode == 130
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [
        f"step-{learned(run)[-1][0]}"
    ]


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """In the middle of a step that would take minutes. The lock goes with the process."""
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    (tmp_path / "driver.py").write_text(SLOW_DRIVER)
    running = start(tmp_path / "said", tmp_path / "driver.py", config, PYTHONPATH=str(REPOSITORY))
    running.wait_for("slow\n")
    running.send_signal(signal.SIGINT)
    running.wait_for("SIGINT received: stopping after step 2")
    time.sleep(1.3)
    assert running.poll() is None
    since = time.monotonic()
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=20)
    assert running.returncode == 130 and time.monotonic() - since < 5
    assert "process" in (run / ".lock").read_text(), "it did not shut down cleanly"
    run_on_ranks(1, train, config, SHORT)
    assert len(learned(run)) == 3


# --- one run in a folder --------------------------------------------------------------------------

SHORT: Settings = {"training.steps": 3, "checkpoint.interval": 3}
HOLDER = """
import sys, time
from pathlib import Path
from titan_ulysses.launch.lock import RunLock
lock = RunLock(Path(sys.argv[1]), say=print)
lock.acquire()
print("held", flush=True)
time.sleep(100)
"""


def test_one_run_in_a_folder(tmp_path: Path) -> None:
    """The lock of a run that is killed is gone with it."""
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    run.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(run)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        [message] = run_on_ranks(1, refusal, config, SHORT)
        assert message.startswith(f"{run}: another run is at work in this folder (process ")
        assert f"process {holder.pid} on {host_name()}, since 20" in message
        assert sorted(path.name for path in run.iterdir()) == [".lock"]
        (run / ".lock").unlink()
        [message] = run_on_ranks(1, refusal, config, SHORT)
        assert message.startswith(f"{run}: another run is at work in this folder. ")
        holder.send_signal(signal.SIGKILL)
    run_on_ranks(1, train, config, SHORT)
    assert len(learned(run)) == 3
    # A run that has ended lets the next one in, from another process.
    assert (run / ".lock").read_text() == ""
    run_on_ranks(2, train, config, SHORT | {"training.steps": 4})
    assert len(learned(run)) == 4


def test_a_run_writes_through_no_link(tmp_path: Path) -> None:
    """What lies under the names of its lock and of its temporary files is not followed."""
    config, run, own = write_run(tmp_path), tmp_path / "outputs" / "run", tmp_path / "own"
    (run / "checkpoints").mkdir(parents=True)
    (own / "folder").mkdir(parents=True)
    (own / "file").write_text("mine")
    (run / ".lock").symlink_to(own / "file")
    [message] = run_on_ranks(1, refusal, config, SHORT)
    assert message.startswith(
        f"{run / '.lock'} is a symbolic link, but a run writes only to files inside"
    )
    (run / ".lock").unlink()
    (run / ".config.toml.partial").symlink_to(own / "file")
    (run / "checkpoints" / ".step-3.partial").symlink_to(own / "folder")
    run_on_ranks(1, with_link_again, config, SHORT, run / "checkpoints" / ".step-3.partial")
    assert (own / "file").read_text() == "mine" and not [*(own / "folder").iterdir()]
    assert not (run / "checkpoints" / "step-3").is_symlink()
    assert (run / "checkpoints" / "step-3" / "run.json").exists()


def with_link_again(config: Path, settings: Settings, link: Path) -> None:
    """A run during which somebody makes the link again, that its start has removed."""
    target, save = link.readlink(), trainer_module.Trainer.save

    def save_through(self: trainer_module.Trainer) -> None:
        link.symlink_to(target)
        save(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "save", save_through)
        train(config, settings)


def test_what_a_lock_cannot_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    other = {"host": "elsewhere", "process": 7, "since": "2026-01-01 00:00:00"}
    (tmp_path / ".lock").write_text(json.dumps(other))
    lock = lock_module.RunLock(tmp_path, say=said.append)
    lock.acquire()
    assert len(said) == 1 and "(process 7 on elsewhere, since 2026-01-01" in said[0]
    assert json.loads((tmp_path / ".lock").read_text())["host"] == host_name()
    lock.release()

    def without_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock_module.fcntl, "lockf", without_locks)
    lock.acquire()
    assert "its file system has no locks: it is unknown whether another run is at" in said[1]


# --- nothing left ---------------------------------------------------------------------------------


def exhausted(config: Path, settings: Settings, on: str) -> str:
    def too_much(*_: object, **__: object) -> None:
        if on == "GPU":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        torch.empty(2**55, dtype=torch.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "train_step", too_much)
        return refusal(config, settings)


@pytest.mark.parametrize("on", ["GPU", pytest.param("host", marks=pytest.mark.slow)])
def test_out_of_memory_says_what_to_lower(on: str, tmp_path: Path) -> None:
    settings = SHORT | {"plan.enforce": True, "plan.host_memory_gib": 64.0}  # so that there is one
    [message] = run_on_ranks(1, exhausted, write_run(tmp_path), settings, on)
    assert message.startswith(f"out of {on} memory in step 1 (")
    assert "lower training.seq_len or training.local_batch_size" in message
    assert "What the plan says is alive at the peak:\n" in message


def test_a_message_gives_a_terminal_no_orders(capsys: pytest.CaptureFixture[str]) -> None:
    _print("error: a\x1b]0;b\x07\n\tc\u009b é")
    assert capsys.readouterr().err == "error: a\\x1b]0;b\\x07\n\tc\\x9b é\n"


def test_errors_of_the_system_say_what_to_do() -> None:
    full = of_system(OSError(28, "No space left on device", "/a/metrics.jsonl"))
    assert full.startswith("/a/metrics.jsonl: No space left on device: the disk is full. ")
    assert "lower checkpoint.keep_latest_k" in full
    assert "this is a permission error" in of_system(PermissionError(13, "Permission denied", "/a"))
    assert of_system(FileNotFoundError(2, "No such file", "/a")) == "/a: No such file"
