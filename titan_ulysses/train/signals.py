"""SIGTERM and Ctrl-C while a run trains: noted, and answered at once, whatever the main thread is
doing.
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
_PATIENCE = 1.0
"""Seconds within which a second signal is the first one, sent by the launcher too."""


class StopSignals:
    """`with StopSignals(tell) as signals: ...`, where `signals.received` asks the loop to stop
    after its step.

    tell(name): called once, on a thread of its own, as soon as the first signal arrives. Python's
    own handlers wait until the main thread is back from what it has called, such as a backward of
    minutes. Ctrl-C a second time, or what a launcher makes of it, ends the process at once, with
    exit code 130. Any further SIGTERM changes nothing: schedulers send several. In the main thread
    only.
    """

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell
        self._first: tuple[int, float] | None = None

    @property
    def received(self) -> bool:
        return self._first is not None

    def __enter__(self) -> StopSignals:
        # The interpreter writes each signal's number to the socket when the signal arrives.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._socket_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _nothing) for number in _STOPPING}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._socket_before)
        self._writer.close()  # the thread reads all that has come, and ends
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        while number := self._reader.recv(1):
            if number[0] in _STOPPING:
                self._receive(number[0])

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = number, now
            with suppress(OSError):  # nobody is left to tell
                self._tell(signal.Signals(number).name)
        elif self._first[0] == signal.SIGINT and now - self._first[1] > _PATIENCE:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # a bar has hidden the cursor
            os._exit(128 + signal.SIGINT)


def _nothing(*_) -> None:
    """A handler: without one, the interpreter would not take the signal."""
