"""SIGTERM and Ctrl-C during training, and hosts that join an elastic run.

Signals are noted and answered at once, whatever the main thread is doing.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

_STOPPING = (signal.SIGTERM, signal.SIGINT)
HOSTS_CHANGE = signal.SIGUSR1
"""The signal of scripts/launch.py where a host joins: save, and be started again with it."""
RESTART = 75
"""The exit code by which a rank asks the launcher to start it again: EX_TEMPFAIL."""
_PATIENCE = 1.0
"""Seconds within which a second signal counts as the first.

The launcher sends a signal on to its ranks, which may have received it already.
"""


class StopSignals:
    """A context that notes stop signals: `with StopSignals(tell) as signals: ...`.

    `signals.received` asks the loop to stop after its step, and `signals.hosts_change` to stop
    because another host joins, which ends this process but not the run. `tell(name)` is called
    once, on a thread of its own, as soon as the first signal arrives. Python's own handlers would
    wait until the main thread returns from its current call, such as a backward of minutes. After a
    Ctrl-C, a second one (or the signal that a launcher makes of it) more than a second later ends
    the process at once, with exit code 130. After a SIGTERM, further signals change nothing,
    because schedulers send several. In the main thread only.
    """

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell
        self._first: tuple[int, float] | None = None
        self.hosts_change = False

    @property
    def received(self) -> bool:
        return self._first is not None

    @property
    def interrupted(self) -> bool:
        """Whether it was Ctrl-C."""
        return self._first is not None and self._first[0] == signal.SIGINT

    def why_ended(self, step: int, *, saves: bool, another_host_joins: bool) -> tuple[str, bool]:
        """Return why the run stops after `step`, and whether to ask the launcher to start it again.

        The ranks of an elastic run ask for that if another host joins, and if a signal stops the
        ranks of another host only.
        """
        ended = f"{'saved' if saves else 'stopped'} after step {step}"
        elastic = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
        if another_host_joins:
            return f"Another host joins: {ended}, and all hosts start from there.", True
        if elastic and not self.received:
            return f"Another host was stopped by a signal: {ended}, and the others go on.", True
        goes_on = "The same command goes on from there." if saves else "Nothing is saved."
        return f"Stopped by a signal after step {step}. {goes_on}", False

    def __enter__(self) -> StopSignals:
        # The interpreter writes each signal's number to the socket when the signal arrives.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._socket_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {
            number: signal.signal(number, _nothing) for number in (*_STOPPING, HOSTS_CHANGE)
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._socket_before)
        self._writer.close()  # the thread reads what has arrived, and ends
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        while number := self._reader.recv(1):
            if number[0] in _STOPPING:
                self._receive(number[0])
            elif number[0] == HOSTS_CHANGE and not self.hosts_change:
                self.hosts_change = True
                with suppress(OSError):
                    self._tell(HOSTS_CHANGE.name)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = number, now
            with suppress(OSError):  # the output may be closed
                self._tell(signal.Signals(number).name)
        elif self._first[0] == signal.SIGINT and now - self._first[1] > _PATIENCE:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # show the cursor that a progress bar has hidden
            os._exit(128 + signal.SIGINT)


def describe_signal(name: str, part: str, *, saves: bool) -> str:
    """Return what a signal leads to, while the run is in `part`."""
    if name == HOSTS_CHANGE.name:
        name = "Notice that another host joins"
    then = "then saving a checkpoint" if saves else "and nothing is saved"
    again = " Ctrl-C again ends at once, without one." if name == "SIGINT" else ""
    return f"{name} received: stopping after {part}, {then}.{again}"


def _nothing(*_) -> None:
    """Do nothing. Without a Python handler, the interpreter would not take the signal."""
