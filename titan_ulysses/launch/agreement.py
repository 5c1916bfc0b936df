"""What all ranks must agree on before the process group exists: config, packages, ranks, folder.

The ranks compare through torchrun's store, not by a collective: ranks that disagree about the mesh
would wait for each other in one for ever.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from titan_ulysses import __version__
from titan_ulysses.config.schema import KEYS_OF_A_HOST, Config
from titan_ulysses.config.toml import show
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.launch import run_store
from titan_ulysses.launch.watch import Watch

_LATE_SECONDS = 5.0
"""Seconds that rank 0 waits for further ranks when two already disagree."""
_FILE_SECONDS = 5.0
"""Seconds in which a file on a shared file system must be seen by all hosts."""
_POLL_SECONDS = 0.05

_meetings = itertools.count()
"""Numbers the meetings of these ranks: a program may make several trainers, one after the other."""


class Ranks:
    """The ranks of a run before the process group exists, and the host of each.

    With one rank, or without torchrun, there is nothing to agree on.
    """

    def __init__(self, config: Config):
        """Wait for all ranks; UserError on each of them if they do not agree.

        From here on, each rank ends when another one is lost: see `Watch`.
        """
        self.rank, size = run_store.rank_and_size()
        self.hosts = [run_store.host_name()] * size
        """The host of each rank. Hosts of the same name have torchrun's number behind it."""
        self.watch: Watch | None = None
        if not run_store.has_store():
            return
        self._timeout = config.comm.startup_timeout_s
        self._meeting = next(_meetings)
        self._store = run_store.first_connection(self._timeout)
        self.watch = Watch.started(self._timeout)
        self._agree(config)
        self.watch.hosts = self.hosts

    @property
    def own_host(self) -> str:
        return self.hosts[self.rank]

    def decide(self, name: str, value: Any, choose: Callable[[list[Any]], Any]) -> Any:
        """Return, on every rank, what `choose` makes on rank 0 of the values of all ranks.

        Values and result are JSON.
        """
        if self.watch is None:
            return choose([value])
        self._put(f"{name}/{self.rank}", value)
        if self.rank == 0:
            values = [self._await(f"{name}/{rank}", rank) for rank in range(len(self.hosts))]
            self._put(name, choose(values))
        return self._await(name, 0)

    def expect_one_folder(self, folder: Path, setting: str) -> None:
        """Raise UserError, on every rank, if a host sees another folder than rank 0 does.

        Rank 0 writes a file with a random name, and all ranks read it. The folder need not exist:
        the file is in the nearest folder above it that does, and is removed.
        """
        if len(set(self.hosts)) == 1:
            return
        above = [folder, *folder.absolute().parents]
        own_depth = next(depth for depth, path in enumerate(above) if path.is_dir())
        name, file = f".same-folder-{uuid.uuid4().hex}", None
        if self.rank == 0:
            file = above[own_depth] / name
            file.write_text(name)
        try:
            depth, name = self.decide("token", [own_depth, name], lambda values: values[0])
            # A host that has more of these folders than rank 0 has other ones.
            is_same = own_depth >= depth and _is_read(above[depth] / name, name)
            sees = self.decide("folder", is_same, lambda values: values)
        finally:
            if file:
                file.unlink(missing_ok=True)
        others = {host for host, one in zip(self.hosts, sees, strict=True) if not one}
        if others:
            raise UserError(
                f"{setting}: {folder} on {self.hosts[0]} is not the same folder as on "
                f"{', '.join(sorted(others))}. Name a folder that all hosts share, or set "
                "checkpoint.shared = false, with which each host keeps its own shards."
            )

    def _put(self, name: str, value: Any) -> None:
        run_store.put(self._store, f"{self._meeting}/{name}", value)

    def _await(self, name: str, rank: int, *, seconds: float | None = None) -> Any:
        """Return a value that `rank` puts into the store. UserError if it does not come in time."""
        deadline, pause = time.monotonic() + (seconds or self._timeout), _POLL_SECONDS
        # Not `store.wait`, which holds the store's connection and prints when it times out.
        name = f"{self._meeting}/{name}"
        while not run_store.is_there(self._store, name):
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank {rank} of {len(self.hosts)} has not arrived within "
                    f"comm.startup_timeout_s = {self._timeout:g} s. Is its host running?"
                )
            time.sleep(pause)
            pause = min(1.0, 1.2 * pause)
        return run_store.get(self._store, name)

    def _agree(self, config: Config) -> None:
        """Compare what this rank is to do with the other ranks, and learn their hosts.

        Most ranks give only a hash of it. Rank 0 reads one full text for each different hash.
        """
        text = json.dumps(_claims(config), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self._store.set(run_store.key(f"claims/{digest}"), text)
        claim = [run_store.node(), run_store.host_name(), digest]
        self._put(f"claim/{self.rank}", claim)
        if self.rank == 0:
            nodes, hosts, digests = zip(*self._all_claims(), strict=True)
            labels = _labels(nodes, hosts)
            texts = {d: json.loads(self._store.get(run_store.key(f"claims/{d}"))) for d in digests}
            problem = _difference(labels, [texts[digest] for digest in digests])
            self._put("claim", {"hosts": labels, "problem": problem})
        verdict = self._await("claim", 0)
        if verdict["problem"]:
            message, code = verdict["problem"]
            raise UserError(message, exit_code=code)
        self.hosts = verdict["hosts"]

    def _all_claims(self) -> list[list[str]]:
        """Return the claims of all ranks; of those that come soon, if some disagree already."""
        claims: list[list[str]] = []
        for rank in range(len(self.hosts)):
            disagree = len({digest for *_, digest in claims}) > 1
            try:
                seconds = _LATE_SECONDS if disagree else None
                claims.append(self._await(f"claim/{rank}", rank, seconds=seconds))
            except UserError:
                if not disagree:
                    raise
        return claims


def _claims(config: Config) -> dict[str, Any]:
    """Return what must be the same on all ranks, by name."""
    import torch
    import transformers

    own = set(KEYS_OF_A_HOST) | (set() if config.checkpoint.shared else {"job.dump_folder"})
    settings = {
        f"{section}.{key}": value
        for section, table in config.model_dump(mode="json").items()
        for key, value in table.items()
        if f"{section}.{key}" not in own
    }
    return settings | {
        "number of ranks": run_store.rank_and_size()[1],
        "number of hosts": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        "version of torch": str(torch.__version__),
        "version of transformers": transformers.__version__,
        "version of titan_ulysses": __version__,
        "version of Python": platform.python_version(),
    }


def _labels(nodes: Sequence[str], hosts: Sequence[str]) -> list[str]:
    """Return a name for each rank's host: its own, with torchrun's number where two are equal."""
    known = Counter(host for _, host in {*zip(nodes, hosts, strict=True)})
    return [
        f"{host} (node {node})" if known[host] > 1 else host
        for node, host in zip(nodes, hosts, strict=True)
    ]


def _difference(hosts: list[str], claims: list[dict[str, Any]]) -> tuple[str, int] | None:
    """Return a message that names what differs and an exit code, or None if nothing does."""
    lines, code = [], 1
    for name in dict.fromkeys(name for claim in claims for name in claim):
        on: dict[str, dict[str, None]] = {}
        for host, claim in zip(hosts, claims, strict=True):
            value = claim.get(name)
            on.setdefault("unset" if value is None else show(value), {})[host] = None
        if len(on) > 1:
            values = ", ".join(f"{value} on {' and '.join(names)}" for value, names in on.items())
            lines.append(f"{name} = {values}")
            code = 2 if "." in name else code
    if not lines:
        return None
    return "\n".join(
        [
            "the ranks of this run were started with different settings:",
            *lines,
            "Start all hosts with the same config, options, packages and numbers.",
        ]
    ), code


def _is_read(file: Path, text: str) -> bool:
    """Return whether the file holds the text, giving a network file system time to show it."""
    deadline = time.monotonic() + _FILE_SECONDS
    while True:
        try:
            if file.read_text() == text:
                return True
        except OSError:
            pass  # not there, or not yet
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
