"""Says on standard error what is being planned, and on a terminal how far it is.

Standard output has the plan alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY = 0.25
"""Seconds between two states of the line."""


class _Line:
    """The last line of a terminal, which is written again and again. Off until `shown`."""

    def __init__(self) -> None:
        self.is_shown = False
        self.about = ""
        self._next = 0.0
        self._is_dirty = False

    def is_due(self) -> bool:
        """Return whether `show` should be called. Cheap enough for every operation."""
        return self.is_shown and time.monotonic() >= self._next

    def show(self, text: str) -> None:
        self._next, self._is_dirty = time.monotonic() + _EVERY, True
        print(f"\r\x1b[2K{self.about}{text}"[:100], end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._is_dirty:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._is_dirty = False


LINE = _Line()


@contextmanager
def shown(what: str) -> Iterator[None]:
    """Print what is being planned, and show the progress of all simulations in this context."""
    print(f"planning {what}", file=sys.stderr, flush=True)
    LINE.is_shown = sys.stderr.isatty()
    try:
        yield
    finally:
        LINE.clear()
        LINE.is_shown, LINE.about = False, ""
