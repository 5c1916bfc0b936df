"""What is left on a terminal, and in a log file, of a run's lines and bar."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys, time
from pathlib import Path
from rich.console import Console
from titan_ulysses.metrics import MetricsLogger

ranges = [(first, 5.0, 9) for first in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]
values = {"loss": 5.5, "grad_norm": 1.25, "lr": 1e-3, "tokens_per_second": 12345.0, "mfu": None, "peak_memory_gib": 0.5}
console = Console()
for mfu in (None, 0.4567):
    logger = MetricsLogger(Path(sys.argv[1]), steps_done=0, total_steps=900, console=console)
    logger.log(0, {"validation_loss": 5.0, "validation_by_position": ranges})
    for step in (1, 2, 899):
        logger.log(step, values | {"mfu": mfu})
        time.sleep(0.15)  # longer than the bar's own refresh
        print("a plain line")
    logger.close()
"""


def on_terminal(folder: Path, columns: int) -> str:
    """All that the program writes to a terminal so wide."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, folder],
        env=environment | {"TERM": "xterm", "PYTHONPATH": str(ROOT)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side has closed
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0, written.decode()
    return written.decode()


def screen(written: str, columns: int) -> list[str]:
    """The lines that a terminal of so many columns shows of it: as much of one as rich and a run need."""
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
            assert not control or control.endswith("m") or control in ("\x1b[?25l", "\x1b[?25h"), repr(control)
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


def test_on_a_terminal(tmp_path: Path) -> None:
    """Lines that end between words, above one bar; what others print has a line of its own."""
    shown = screen(on_terminal(tmp_path, 80), 80)
    expected = []
    for more in ([], ["MFU 45.7%"]):
        expected += VALIDATION
        for number in ("  1", "  2", "899"):
            step = f"step {number}/900  loss 5.5000  grad 1.250  lr 1.00e-03  12,345 tok/s  peak 0.50 GiB"
            expected += [step, *more, "a plain line"]
        expected += ["bar"]
    assert [re.sub("^training .*━.* 899/900 ETA .*", "bar", line) for line in shown if line] == expected


def test_in_a_log_file(tmp_path: Path) -> None:
    """No control codes, no bar, no line broken."""
    with open(tmp_path / "log", "w") as file:
        subprocess.run(
            [sys.executable, "-c", PROGRAM, tmp_path],
            stdout=file,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
        )
    written = (tmp_path / "log").read_text()
    assert "\x1b" not in written and "\r" not in written and "━" not in written
    assert [line for line in written.splitlines() if line != "a plain line"][:3] == [
        *VALIDATION,
        "step   1/900  loss 5.5000  grad 1.250  lr 1.00e-03  12,345 tok/s  peak 0.50 GiB",
    ]
    assert written.splitlines()[-2].endswith("  peak 0.50 GiB  MFU 45.7%")
