"""What a person sees of a run: its lines and bar on a terminal and in a log file, time left,
answers to signals.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from helpers.forked import start
from helpers.ranks import run_on_ranks
from helpers.runs import Settings, train, write_run
from titan_ulysses.observability import progress

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys, time
from pathlib import Path
import torch
from rich.console import Console
from titan_ulysses.observability import progress
from titan_ulysses.observability.metrics import MetricsLogger

progress._SLOW = 0.3
ranges = [(first, 5.0, 9) for first in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]
values = {"loss": 5.5, "grad_norm": 1.25, "lr": 1e-3, "tokens_per_second": 12345.0, "mfu": None}
values["peak_memory_gib"] = 0.5
values["collectives"] = {"all_to_all": {"calls": 8, "bytes": 4096}}
console = Console()
for mfu in (None, 0.4567):
    blocks = [torch.nn.Linear(2, 2) for _ in range(5)]
    work = progress.BlockWork(blocks, embedding_is_trained=True, checkpoint_every=0)
    logger = MetricsLogger(Path(sys.argv[1]), steps_done=0, total_steps=900, console=console)
    with progress.Progress(console, total=900, done=897, work=work) as shown:
        logger.log(0, {"validation_loss": 5.0, "validation_by_position": ranges})
        for step in (1, 2, 899):
            shown.begin(f"step {step}", tokens=3, trains=True, is_step=True)
            if step == 899:
                for block in blocks[:4]:
                    block(torch.zeros(3, 2))
                time.sleep(0.9)  # what is slow, and two of the bar's own refreshes
            shown.finish_step()
            logger.log(step, values | {"mfu": mfu})
            print("a plain line")
    logger.close()
"""


def on_terminal(folder: Path, columns: int) -> str:
    """All that the program writes to a terminal so wide."""
    (folder / "program.py").write_text(PROGRAM)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    terminal = {"terminal": os.ttyname(theirs), "TERM": "xterm"}
    process = start(folder / "said", folder / "program.py", folder, **terminal)
    written = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.05)[0]:
            written += os.read(ours, 65536)
    os.close(theirs)
    os.close(ours)
    assert process.returncode == 0, written.decode()
    return written.decode()


def screen(written: str, columns: int) -> list[str]:
    """The lines that a terminal of so many columns shows of it: as much of one as rich and a run
    need.
    """
    lines, row, column = [""], 0, 0
    for control, text in re.findall(r"(\x1b\[[?\d;]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", written):
        if control == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif control == "\r":
            column = 0
        elif control.endswith("A"):
            row -= int(control[2:-1] or 1)
        elif control.endswith("K"):
            assert control == "\x1b[2K"
            lines[row] = ""
        else:
            assert not control or control.endswith("m") or control in ("\x1b[?25l", "\x1b[?25h"), (
                repr(control)
            )
        for character in text:
            if column == columns:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + character + lines[row][column + 1 :]
            column += 1
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h")  # the cursor is there again
    return [line.rstrip() for line in lines]


VALIDATION = [
    "step   0/900  validation loss 5.0000  perplexity 148.41",
    "  by position: 0+ 5.000  4+ 5.000  16+ 5.000  64+ 5.000  256+ 5.000",
]


def test_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that end between words, above one bar; what others print has a line of its own."""
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    written = on_terminal(tmp_path, 80)
    shown = screen(written, 80)
    expected = []
    for more in ([], ["MFU 45.7%"]):
        expected += VALIDATION
        for number in ("  1", "  2", "899"):
            step = (
                f"step {number}/900  loss 5.5000  grad 1.250  lr 1.00e-03  12,345 tok/s  peak 0.50 "
                "GiB"
            )
            expected += [step, *more, "a plain line"]
        expected += ["bar"]
    bar = r"^900 of 900 steps ━+ elapsed 0:00:0\d, left 0:00:00$"
    assert [re.sub(bar, "bar", line) for line in shown if line] == expected
    # Three of the fifteen that five blocks do, forward and backward; of the fourth nobody knows
    # that it is done.
    assert re.search(r"step 899 of 900\x1b\[0m  20% .*elapsed 0:00:0\d, left 0:00:\d\d", written)


def test_in_a_log_file(tmp_path: Path) -> None:
    """No control codes, no bar, no line broken."""
    (tmp_path / "program.py").write_text(PROGRAM)
    process = start(tmp_path / "said", tmp_path / "program.py", tmp_path, TERM="xterm")
    written, err = process.communicate()
    assert process.returncode == 0, err
    assert "\x1b" not in written and "\r" not in written and "━" not in written
    assert [line for line in written.splitlines() if line != "a plain line"][:3] == [
        *VALIDATION,
        "step   1/900  loss 5.5000  grad 1.250  lr 1.00e-03  12,345 tok/s  peak 0.50 GiB",
    ]
    assert written.splitlines()[-2].endswith("  peak 0.50 GiB  MFU 45.7%")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    last = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    assert last["mfu"] == pytest.approx(0.4567)
    assert (last["collectives/all_to_all/calls"], last["collectives/all_to_all/bytes"]) == (8, 4096)
    assert last["validation_by_position/from_000"] == last["validation_by_position/from_512"] == 5


# --- how long it takes ----------------------------------------------------------------------------


class Clock:
    """A time.monotonic that stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_time_left_at_any_length_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of ten minutes, after a first one of fifteen; a validation between them is part of
    their time.
    """
    clock = Clock(monkeypatch)
    work = SimpleNamespace(done=0, training=8, forward=2, take=lambda: None)
    shown = progress.Progress(Console(), total=100, done=10, work=work)
    shown.begin("validation at step 10", tokens=50)
    clock.now += 300
    assert shown.seconds_left(clock.now) is None
    shown.begin("step 11", tokens=50, trains=True, is_step=True)
    clock.now, work.done = clock.now + 90, 40  # of 400
    assert shown.fraction == 0.1 and shown.seconds_left(clock.now) == pytest.approx(90 * 900 - 90)
    clock.now += 810
    shown.finish_step()
    assert shown.seconds_left(clock.now) == pytest.approx(89 * 900)
    for step in range(12, 16):
        shown.begin(f"step {step}", tokens=50, trains=True, is_step=True)
        work.done = 0
        clock.now += 540
        shown.finish_step()
        shown.begin(f"validation at step {step}", tokens=50)
        work.done = 50
        assert shown.fraction == 0.5  # of what goes through two blocks, and not back
        clock.now += 60
    shown.begin("step 16", tokens=50, trains=True, is_step=True)
    work.done = 200
    found = shown.seconds_left(clock.now)
    assert found == pytest.approx(84.5 * (540 + 3 * 600) / 4)
    assert (
        progress.duration(found) == "13:43:52" and progress.duration(10**6) == "11 days, 13:46:40"
    )


def parts_of_a_run(config: Path, settings: Settings) -> list[tuple[str, int, int]]:
    """(part, work that was done, work that was expected) of a run on what it takes for a terminal;
    [] on rank 1.
    """
    from titan_ulysses.train import trainer

    found = []

    class Watched(progress.Progress):
        def begin(self, part: str, **kinds) -> None:
            if self._work and self.part:
                found.append((self.part, self._work.take(), self._expected))
            super().begin(part, **kinds)

    before, trainer.Progress, os.environ["FORCE_COLOR"] = trainer.Progress, Watched, "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train(config, settings)
    finally:
        trainer.Progress = before
        del os.environ["FORCE_COLOR"]
    return found


@pytest.mark.parametrize("case", ["checkpoints", "segments, the first frozen", "none"])
def test_work_within_a_step_and_a_validation(case: str, tmp_path: Path) -> None:
    """2 micro-batches of 2 x 16 tokens a rank, and 2 held-out ones; three blocks; a backward counts
    twice.
    """
    settings: Settings = {
        "parallelism.sequence_parallel_degree": 2,
        "model.config.num_hidden_layers": 3,
    }
    settings |= {
        "training.steps": 2,
        "lr_scheduler.warmup_steps": 1,
        "validation.enable": True,
        "validation.steps": 1,
    }
    settings |= {"validation.interval": 2, "checkpoint.enable": False}
    passes = 3 + 3 + 2 * 3
    if case == "none":
        settings["activation_checkpoint.mode"], passes = "none", 3 + 2 * 3
    elif case == "segments, the first frozen":  # the third block is a segment of its own
        settings |= {
            "activation_checkpoint.every": 2,
            "model.freeze": ["model.embed*", "model.layers.[01].*"],
        }
        passes = 3 + 1 + 2
    shown, nothing = run_on_ranks(2, parts_of_a_run, write_run(tmp_path), settings)
    assert nothing == []  # blocks are watched where somebody looks
    validation, step = [3 * 2 * 2 * 16] * 2, [passes * 2 * 2 * 16] * 2
    parts = ["validation at step 0", "step 1", "step 2", "validation at step 2"]
    assert shown == [(part, *(step if part.startswith("step") else validation)) for part in parts]


# --- signals --------------------------------------------------------------------------------------

BUSY = """
import hashlib, sys, time
from titan_ulysses.train.signals import StopSignals

with StopSignals(lambda name: print(name, time.monotonic(), flush=True)) as signals:
    print("go", flush=True)
    # One call, as of torch: no handler runs meanwhile.
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[1]))
    print(signals.received, time.monotonic(), flush=True)
"""


@pytest.fixture
def busy() -> Iterator[Callable[[int], subprocess.Popen]]:
    """A process that works on so many hashes, some million a second."""
    started: list[subprocess.Popen] = []

    def start(hashes: int) -> subprocess.Popen:
        command = [sys.executable, "-c", BUSY, str(hashes)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
        assert started[-1].stdout.readline() == "go\n"
        time.sleep(0.1)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_signal_is_answered_at_once(busy: Callable[[int], subprocess.Popen]) -> None:
    """Whatever the main thread is doing; a second SIGTERM, of a scheduler, changes nothing."""
    process = busy(3 * 10**6)
    process.terminate()
    name, told = process.stdout.readline().split()
    process.terminate()
    received, over = process.stdout.readline().split()
    assert (name, received) == ("SIGTERM", "True") and float(over) - float(told) > 0.2
    assert process.wait(timeout=30) == 0


def test_ctrl_c_twice_ends_at_once(busy: Callable[[int], subprocess.Popen]) -> None:
    process = busy(2 * 10**9)  # half an hour
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().startswith("SIGINT ")
    process.send_signal(signal.SIGINT)  # the launcher's, of the same Ctrl-C
    time.sleep(1.2)
    assert process.poll() is None
    process.terminate()  # what torchrun makes of the second one
    assert process.wait(timeout=30) == 130
