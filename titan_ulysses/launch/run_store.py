"""What the ranks of a run know of each other without a process group, through torchrun's store.

The store is the TCPStore at MASTER_ADDR:MASTER_PORT. The keys of a run contain torchrun's restart
count, because the store outlives the ranks that it restarts.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.distributed import TCPStore

T = TypeVar("T")

_CONNECT_SECONDS = 2.0
"""Seconds to wait for a connection to a store that has answered before."""

_AGENT_SECONDS = 30.0
"""Seconds to wait for the store of torchrun's agent. A link may be down for a while."""

_hosted: list[TCPStore] = []
"""The store that rank 0 itself runs, where torchrun's agent does not. It lives as long as it."""


def host_name() -> str:
    """Return the name of this host, as messages and checkpoints name it."""
    return socket.gethostname()


def rank_and_size() -> tuple[int, int]:
    """Return this rank and the number of ranks, before there is a process group."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def leads_host() -> bool:
    """Return whether this rank is the first one of its host."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def node() -> str:
    """Return torchrun's number of this host."""
    return os.environ.get("GROUP_RANK", "0")


def has_store() -> bool:
    """Return whether torchrun has started several ranks, which then have a store."""
    return rank_and_size()[1] > 1 and "TORCHELASTIC_RUN_ID" in os.environ


def has_agent_store() -> bool:
    """Return whether torchrun's agent on the first host runs the store, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def hosts_store() -> bool:
    """Return whether this process runs the store, which ends with it."""
    return bool(_hosted)


def address() -> tuple[str, int]:
    """Return the address of the store: a host and a port."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def key(name: str) -> str:
    """Return the store's key of `name`, which neither torchrun nor an earlier attempt uses.

    Where rank 0 runs the store, each attempt has a store of its own. The count must not be part of
    the key then: it counts the restarts of each host, and a host that joins later is at 0.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if has_agent_store() else 0
    return f"titan_ulysses/{attempt}/{name}"


def first_connection(timeout_s: float) -> TCPStore:
    """Return a connection to the store, waiting for the store as long as `timeout_s` seconds.

    With torchrun's TORCH_DISABLE_SHARE_RDZV_TCP_STORE, rank 0 runs the store, and the process group
    takes the same one later.
    """
    from torch.distributed import TCPStore

    (host, port), (rank, size) = address(), rank_and_size()
    hosts_it = rank == 0 and not has_agent_store()
    if has_agent_store():
        # It was there before the ranks were: if it refuses, the first host has ended.
        timeout_s = min(timeout_s, _AGENT_SECONDS)
    store = TCPStore(
        host,
        port,
        size,
        is_master=hosts_it,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=hosts_it,
    )
    if hosts_it:
        _hosted.append(store)
    return store


def connect() -> TCPStore:
    """Return a new connection to the store, at once. Raise OSError or RuntimeError without one.

    A store that has accepted the connection and says nothing holds the caller: see `within`.
    """
    from torch.distributed import TCPStore

    # TCPStore itself would ask a port that refuses for as long as its timeout.
    socket.create_connection(address(), timeout=_CONNECT_SECONDS).close()
    wait = timedelta(seconds=_CONNECT_SECONDS)
    return TCPStore(*address(), is_master=False, timeout=wait, wait_for_workers=False)


def within(seconds: float, ask: Callable[[], T]) -> T | None:
    """Return what `ask` returns, or None if it fails or takes longer than this.

    A call to a store over a dead link returns only when the system gives up, after minutes.
    """
    answer: list[T] = []

    def run() -> None:
        try:
            answer.append(ask())
        except Exception:
            return  # no answer

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None


def put(store: TCPStore, name: str, value: Any) -> None:
    store.set(key(name), json.dumps(value))


def get(store: TCPStore, name: str) -> Any:
    """Return a value that is there; see `is_there`."""
    return json.loads(store.get(key(name)))


def is_there(store: TCPStore, name: str) -> bool:
    return store.check([key(name)])
