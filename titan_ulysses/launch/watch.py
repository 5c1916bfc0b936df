"""Watches the other ranks of a run through torchrun's store, so that no rank waits for a lost one.

A collective ends by itself when another rank is lost. A rank that waits for something else, or for
the GPU, does not. So each rank has two threads that ask the store every second whether a rank has
failed, and say that this one is alive. Rank 0 also reads what the others say.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar

from titan_ulysses.launch import failure, heartbeat, run_store

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_SECONDS = 1.0
"""Seconds between two questions of a rank; more where many ranks ask."""
_RANKS_PER_SECOND = 500
_REFUSED_SECONDS = 5
"""Seconds after which a store counts as gone whose host refuses connections to it."""


class Watch:
    """The watching threads of this rank, which end it when another one is lost.

    That is when a rank has failed, or when the store has not answered, or a rank has not said that
    it is alive, for `timeout_s` seconds. Seconds count only while this process runs: a process that
    was stopped for a while does not take the others for lost.
    """

    _started: ClassVar[Watch | None] = None

    @classmethod
    def started(cls, timeout_s: float) -> Watch:
        """Return the watch of this process with this timeout. Start it if there is none."""
        if cls._started is None:
            cls._started = cls(timeout_s)
        cls._started.timeout_s = timeout_s
        return cls._started

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self.hosts: list[str] = []
        """The host of each rank, once all ranks are there. Rank 0 then listens to them."""
        rank, size = run_store.rank_and_size()
        self._rank, self._size = rank, size
        self._interval = max(_SECONDS, size / _RANKS_PER_SECOND)
        self._answers = 0
        self._refused = 0
        self._heard: dict[int, tuple[dict[str, Any], int]] = {}
        for work in (self._ask, self._count_silence):
            threading.Thread(target=work, daemon=True).start()

    def _ask(self) -> None:
        """Ask the store again and again. A call may take minutes where the link is down."""
        store = None
        while True:
            try:
                store = store or run_store.connect()
                if failure.failures(store):
                    failure.end_like_the_first(store)
                heartbeat.beat(store, self._rank)
                if self._rank == 0 and self.hosts:
                    self._listen(store)
                self._answers += 1
                self._refused = 0
            except ConnectionRefusedError:
                self._refused += 1
            except (OSError, RuntimeError):
                store = None  # connect again; the other thread counts the seconds
            time.sleep(self._interval)

    def _listen(self, store: TCPStore) -> None:
        """End this rank if another one has said nothing for too long."""
        for rank, value in enumerate(heartbeat.read(store, self._size)):
            heard, silent = self._heard.get(rank, ({}, 0))
            silent = silent + 1 if value == heard else 0
            self._heard[rank] = value, silent
            if silent * self._interval > self.timeout_s:
                failure.end(
                    f"error: rank {rank} on {self.hosts[rank]} has given no sign of life for "
                    f"{self.timeout_s:g} s{heartbeat.describe_silent(value)}: it is stopped, its "
                    f"host is gone, or the network to it. {failure.goes_on()}",
                    1,
                    hang=True,
                )

    def _count_silence(self) -> None:
        """End this rank if the store has not answered for too long."""
        answers, silent = 0, 0.0
        while silent <= self.timeout_s and self._refused * self._interval < _REFUSED_SECONDS:
            time.sleep(_SECONDS)
            silent = silent + _SECONDS if self._answers == answers else 0.0
            answers = self._answers
        failure.end(f"error: {failure.store_is_gone()}", 1)
