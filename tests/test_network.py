"""A run that names no hub needs no network and asks for none, whatever library does the asking.

It runs in a network namespace of its own, which has nothing but loopback. The kernel counts there
every packet and every connection without a way out, those of torch's own sockets too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import learned, write_run

REPOSITORY = Path(__file__).resolve().parents[1]
CUT = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]

WITHIN = """
import fcntl, json, socket, struct, subprocess, sys

def turn_on(name):
    with socket.socket() as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", name.encode(), 0x1 | 0x40))

def without_a_way():
    "How often something was sent, or a connection begun, to where no route leads."
    lines = [line.split() for line in open("/proc/net/snmp")]
    names, values = (line for line in lines if line[0] == "Ip:")
    found = int(dict(zip(names, values))["OutNoRoutes"])
    six = dict(line.split() for line in open("/proc/net/snmp6"))
    return found + int(six["Ip6OutNoRoutes"])

turn_on("lo")
before = without_a_way()
ended = subprocess.run(sys.argv[1:], capture_output=True, text=True)
asked = without_a_way() - before
print(json.dumps({"code": ended.returncode, "err": ended.stderr[-3000:], "asked": asked}))
"""
ASKS = {
    "connect": "import socket; socket.create_connection(('192.0.2.1', 443), 2)",
    "datagram": "from socket import *; socket(type=SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    "not Python's": "import ctypes, socket, struct; c = ctypes.CDLL(None); "
    "a = struct.pack('=HH4s8x', 2, 443 << 8 & 0xffff, socket.inet_aton('192.0.2.1')); "
    "raise SystemExit(c.connect(c.socket(2, 1, 0), a, 16) and 1)",
}


def cut_off(*command: str | Path, **environment: str) -> dict[str, Any]:
    unset = ("HF_HUB_OFFLINE", "RANK", "WORLD_SIZE")
    clean = {name: value for name, value in os.environ.items() if name not in unset}
    clean |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [*CUT, sys.executable, "-c", WITHIN, *map(str, command)],
        capture_output=True,
        text=True,
        env=clean,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    tried = subprocess.run([*CUT, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no network namespace can be made here: {tried.stderr.strip()}")


@pytest.mark.parametrize("how", ASKS)
def test_the_kernel_hears_who_asks(how: str) -> None:
    found = cut_off(sys.executable, "-c", ASKS[how])
    assert found["code"] == 1 and found["asked"] > 0, found


def test_a_local_run_asks_nobody(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    launch = [sys.executable, REPOSITORY / "scripts" / "launch.py", "--standalone"]
    settings = ["--training.steps=2", "--lr_scheduler.warmup_steps=0", "--validation.enable=true"]
    settings += ["--checkpoint.export=true", "--parallelism.sequence_parallel_degree=2"]
    script = [REPOSITORY / "train.py", "--config", config]
    found = cut_off(*launch, "--nproc-per-node=2", *script, *settings, HOME=str(tmp_path))
    assert (found["code"], found["err"], found["asked"]) == (0, "", 0)
    assert len(learned(tmp_path / "outputs" / "run")) == 2
    assert (tmp_path / "outputs/run/export/model.safetensors").exists()
