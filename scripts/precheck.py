"""Before the rendezvous of several hosts: will they meet, and if not, why not?

torchrun waits in silence where a name, an interface, a port or the number of hosts is wrong. Here
each host finds its own address, and the first host opens the store of the rendezvous, in which all
hosts say how they were started. What is wrong is one message, in seconds. A host that is merely
late is waited for, and the others say so.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import json
import os
import socket
import struct
import sys
import time
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed import PrefixStore, TCPStore

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.launch.run_store import within

_SILENCE = 5.0
"""Seconds of waiting after which a host says what it waits for."""
_AGAIN = 60.0
"""Seconds after which it says so again."""
_ANSWER = 10.0
"""Seconds that a launcher needs at most to answer a connection."""
_SIOCGIFADDR = 0x8915
_KEYS = "titan_ulysses/hosts"


class Meeting(NamedTuple):
    """What one host was told of the hosts of a run."""

    least: int
    """Hosts that the run needs to start; fewer than `most` in an elastic run."""
    most: int
    rank: int
    """Which host this is. In an elastic run only 0, the first one, has a meaning."""
    first: str
    """Name or address of the first host."""
    port: int
    interface: str = ""
    """Network interface between the hosts; "" chooses the one that leads to the first host."""
    patience: float = 600.0
    """Seconds to wait for hosts that are late."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_elastic(self) -> bool:
        return self.least < self.most

    @property
    def hosts(self) -> str:
        return f"{self.least}:{self.most}" if self.is_elastic else str(self.most)

    @property
    def endpoint(self) -> str:
        return f"{self.first}:{self.port}"


class Met(NamedTuple):
    interface: str
    address: str
    """This host's address on the interface."""
    store: TCPStore
    """On the first host, the rendezvous uses its server, so it must be kept."""


def meet(meeting: Meeting) -> Met:
    """Return when all hosts that the run needs are there; raise UserError if they cannot meet."""
    if not 0 <= meeting.rank < meeting.most:
        raise UserError(
            f"RANK {meeting.rank} of {meeting.hosts} hosts: ranks count from 0, so the last one is "
            f"{meeting.most - 1}"
        )
    if meeting.interface:
        check_interface(meeting)
    deadline = time.monotonic() + meeting.patience
    address = resolve(meeting, deadline)
    check_first(meeting, address)
    interface, own = own_address(meeting, address)
    store = open_store(meeting) if meeting.is_first else reach_store(meeting, address, deadline)
    agree(store, meeting, deadline)
    return Met(interface, own, store)


# --- names and interfaces -------------------------------------------------------------------------


def interfaces() -> dict[str, list[str]]:
    """Return the addresses of each network interface of this host, IPv4 before IPv6."""
    found: dict[str, list[str]] = {}
    for _, name in socket.if_nameindex():
        found[name] = []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            try:
                request = struct.pack("256s", name.encode()[:15])
                reply = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
                found[name].append(socket.inet_ntoa(reply[20:24]))
            except OSError:
                pass  # no IPv4 address
    try:
        with open("/proc/net/if_inet6") as lines:
            for line in lines:
                digits, _, _, scope, _, name = line.split()
                if scope in ("00", "10"):  # global or loopback, not link-local
                    found.setdefault(name, []).append(str(ipaddress.IPv6Address(int(digits, 16))))
    except OSError:
        pass  # no IPv6
    return found


def resolve(meeting: Meeting, deadline: float) -> str:
    """Return the address of the first host.

    In a Kubernetes pod a name resolves once the pod that has it is up, so it is waited for.
    """
    say = _Waiting(meeting)
    while True:
        try:
            return str(
                socket.getaddrinfo(meeting.first, meeting.port, type=socket.SOCK_STREAM)[0][4][0]
            )
        except OSError as error:
            reason = f"does not resolve on {_own_name()} ({error.strerror or error})"
        except UnicodeError:
            reason = "is not the name of a host"
        if "KUBERNETES_SERVICE_HOST" not in os.environ or time.monotonic() > deadline:
            raise UserError(
                f"the first host, {meeting.first}, {reason}. Give its address, as in 10.0.0.1, or "
                "add the name to /etc/hosts on every host"
            )
        say(f"its name {reason}")
        time.sleep(1)


def check_interface(meeting: Meeting) -> None:
    """Check that the named interface is there and has an address."""
    there = interfaces()
    if meeting.interface not in there:
        raise UserError(
            f"{_own_name()} has no network interface {meeting.interface}. It has {_in_words(there)}"
        )
    if not there[meeting.interface]:
        raise UserError(
            f"the network interface {meeting.interface} of {_own_name()} has no address. The "
            f"interfaces are {_in_words(there)}"
        )


def own_address(meeting: Meeting, first: str) -> tuple[str, str]:
    """Return the interface that leads to the other hosts, and this host's address on it."""
    there = interfaces()
    if meeting.interface:
        return meeting.interface, there[meeting.interface][0]
    # A datagram socket that is connected sends nothing, but has the address of the route.
    # Where a host's own name is loopback, take the default route: 192.0.2.1 is nobody's address.
    target = "192.0.2.1" if _is_loopback(first) and meeting.is_first else first
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as route:
        try:
            route.connect((target, 9))
            address = route.getsockname()[0]
        except OSError:
            address = ""
    for name, addresses in there.items():
        if address in addresses:
            return name, address
    raise UserError(
        f"{_own_name()} has no route to the first host, {meeting.first}. Name the interface "
        f"between the hosts; there are {_in_words(there)}"
    )


def check_first(meeting: Meeting, address: str) -> None:
    """Check that the address of the first host is one that the others reach."""
    everywhere = interfaces()
    if any(_is_loopback(own) for own in everywhere.get(meeting.interface, [])):
        return  # hosts that are one machine, as in the tests
    if _is_loopback(address):
        if not meeting.is_first:
            raise UserError(
                f"the first host, {meeting.first}, resolves to {address} on {_own_name()}, which "
                "is this host itself. Give the first host's address on the network, or correct "
                "/etc/hosts"
            )
        return  # the first host reaches itself by any name
    mine = address in [own for addresses in everywhere.values() for own in addresses]
    if meeting.is_first and not mine and not _binds(address):
        raise UserError(
            f"{_own_name()} was started as the first host (RANK 0), but {meeting.first} is "
            f"{address}, which is no address of it. It has {_in_words(everywhere)}"
        )


def _binds(address: str) -> bool:
    """Return whether it is an address of this host, also a second one of an interface."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _in_words(there: dict[str, list[str]]) -> str:
    return ", ".join(f"{name} ({there[name][0]})" if there[name] else name for name in there)


def _own_name() -> str:
    return socket.gethostname()


# --- the port -------------------------------------------------------------------------------------


def open_store(meeting: Meeting) -> TCPStore:
    """Open the port on the first host: the server of the rendezvous, which torchrun then shares."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", meeting.port))
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise UserError(
            f"port {meeting.port} of {_own_name()} "
            f"{'is taken by another program' if taken else f'cannot be opened ({error.strerror})'}"
            f". Give all hosts another one, as in {meeting.first}:{meeting.port + 1}"
        ) from None
    return TCPStore(
        meeting.first,
        meeting.port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=30),
    )


def reach_store(meeting: Meeting, address: str, deadline: float) -> TCPStore:
    """Connect to the first host, as soon as it is there."""
    say = _Waiting(meeting)
    while reason := _does_not_answer(address, meeting.port):
        if time.monotonic() > deadline:
            raise UserError(
                f"the first host, {meeting.endpoint}, has not answered {_own_name()} for "
                f"{meeting.patience:.0f} s: {reason}"
            )
        say(reason)
        time.sleep(0.5)

    def connect() -> TCPStore:
        return TCPStore(
            meeting.first,
            meeting.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=_ANSWER),
        )

    # A program that listens and says nothing would keep the connection waiting for ever.
    store = within(_ANSWER, connect)
    if store is None:
        raise UserError(
            f"{meeting.endpoint} answers, but is not a launcher: another program has this port. "
            "Give all hosts another one"
        )
    return store


def _does_not_answer(address: str, port: int) -> str:
    """Return why, or "" if something listens."""
    try:
        socket.create_connection((address, port), timeout=3).close()
    except ConnectionRefusedError:
        return "nothing listens there: it is not started yet, or with another port"
    except TimeoutError:
        return "no answer at all: a firewall, or a host that is down"
    except OSError as error:
        return f"{error.strerror or error}: no route, or a firewall"
    return ""


# --- who is there ---------------------------------------------------------------------------------


def agree(store: Any, meeting: Meeting, deadline: float) -> None:
    """Wait for the hosts that the run needs; raise UserError, on all hosts, if they do not agree.

    Each host numbers itself and writes how it was started. The first one reads all of that, and
    writes its verdict, which is "" if they agree.
    """
    keys = PrefixStore(_KEYS, store)
    try:
        if meeting.is_first:
            verdict = _judge(keys, meeting, deadline)
            keys.set("verdict", verdict)
        else:
            verdict = _report(keys, meeting, deadline)
    except RuntimeError:
        raise UserError(
            f"the first host, {meeting.endpoint}, ended before all hosts were there"
        ) from None
    if verdict and meeting.is_first:
        _let_them_read(keys)
    if verdict:
        raise UserError(verdict)


def _judge(keys: Any, meeting: Meeting, deadline: float) -> str:
    say, came = _Waiting(meeting), {0: _own_name()}
    keys.set("hosts", json.dumps([meeting.hosts, _own_name()]))
    number = 1
    while number < meeting.least:
        if time.monotonic() > deadline:
            return (
                f"{number} of {meeting.hosts} hosts came within {meeting.patience:.0f} s: "
                f"{', '.join(came.values())}"
            )
        if not keys.check([f"host/{number}"]):
            missing = [rank for rank in range(meeting.most) if rank not in came]
            say(
                f"{number} of {meeting.hosts} hosts are there, missing: "
                + ("any other" if meeting.is_elastic else ", ".join(map(str, missing)))
            )
            time.sleep(0.1)
            continue
        rank, name, hosts = json.loads(keys.get(f"host/{number}"))
        if hosts != meeting.hosts:
            return _disagreement(meeting.hosts, _own_name(), hosts, name)
        if rank in came and not meeting.is_elastic:
            return f"{came[rank]} and {name} were both started as host {rank}"
        came[number if meeting.is_elastic else rank] = name
        number += 1
    return ""


def _report(keys: Any, meeting: Meeting, deadline: float) -> str:
    number = keys.add("came", 1)
    report = [meeting.rank, _own_name(), meeting.hosts]
    keys.set(f"host/{number}", json.dumps(report))
    say = _Waiting(meeting)
    while not keys.check(["verdict"]):
        if time.monotonic() > deadline + 10:  # the first host speaks at its own deadline
            return f"not all hosts came within {meeting.patience:.0f} s"
        say("it answers, and waits for other hosts")
        time.sleep(0.1)
    verdict = keys.get("verdict").decode()
    keys.add("read", 1)
    if verdict:
        return verdict
    hosts, first = json.loads(keys.get("hosts"))
    if hosts != meeting.hosts:
        return _disagreement(hosts, first, meeting.hosts, _own_name())
    if not meeting.is_elastic and number >= meeting.most:
        return (
            f"the run at {meeting.endpoint} has all of its {meeting.most} hosts: {_own_name()} was "
            "started twice, or has ended while the others have not noticed yet"
        )
    return ""


def _disagreement(hosts: str, first: str, others: str, name: str) -> str:
    return (
        f"{first} was started for {hosts} hosts, {name} for {others}. Give all of them the same "
        "number"
    )


def _let_them_read(keys: Any) -> None:
    """Wait until all that came know the verdict, because the store ends with this host."""
    end = time.monotonic() + 5
    while keys.add("read", 0) < keys.add("came", 0) and time.monotonic() < end:
        time.sleep(0.1)


class _Waiting:
    """Says what a host waits for: after seconds, where the reason is another one, then rarely."""

    def __init__(self, meeting: Meeting):
        self._meeting, self._told = meeting, ""
        self._start = time.monotonic()
        self._next = self._start + _SILENCE

    def __call__(self, reason: str) -> None:
        now = time.monotonic()
        if now < self._next and (not self._told or reason == self._told):
            return
        self._told, self._next = reason, now + _AGAIN
        first = f"the first host, {self._meeting.endpoint}"
        whom = "the other hosts" if self._meeting.is_first else first
        print(
            f"{_own_name()} waits for {whom} ({now - self._start:.0f} of "
            f"{self._meeting.patience:.0f} s): {reason}.",
            file=sys.stderr,
            flush=True,
        )
