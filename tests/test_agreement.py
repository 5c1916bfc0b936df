"""What the ranks of a run must agree on, and how all of them end when one is lost.

Two ranks play two hosts: each gets its own host name, folder and options.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import run_on_ranks
from helpers.runs import Settings, learned, train, write_run
from test_checkpoint import RUN_STATE, Run, assert_same, error_of, flip, no_space, rewrite
from test_command_line import Launch, arguments
from titan_ulysses.checkpoint.dcp import Checkpointer
from titan_ulysses.checkpoint.initial import check_checkpoint
from titan_ulysses.distributed.mesh import build_mesh, set_timeout, timeout_of
from titan_ulysses.launch.failure import _lost_peer, goes_on

# A rank as on a host of its own: argv holds, for each rank, what it is to be.
DRIVER = """
import json, os, sys, time
rank = int(os.environ["RANK"])
me = json.loads(sys.argv[1])[rank]
os.chdir(me["folder"])
if me["apart"]:
    os.environ |= {"GROUP_RANK": str(rank), "GROUP_WORLD_SIZE": "2", "LOCAL_RANK": "0"}

from titan_ulysses.launch import run_store
from titan_ulysses.launch.failure import exit_on_error
from titan_ulysses.__main__ import run

run_store.host_name = lambda: me["host"]

def prepare():
    import transformers
    from titan_ulysses.train import trainer

    transformers.__version__ = me["transformers"] or transformers.__version__
    train_step, done = trainer.train_step, []

    def step(*args, **kwargs):
        done.append(None)
        if len(done) == me["hangs_at"]:
            print("hangs", flush=True)
            time.sleep(100)
        return train_step(*args, **kwargs)

    trainer.train_step = step

with exit_on_error():
    if me["transformers"] or me["hangs_at"]:
        prepare()
    run(me["arguments"])
"""
ONE_THREAD: Settings = {"lr_scheduler.decay_type": "constant", "lr_scheduler.warmup_steps": 0}
HOSTS = ("alpha", "beta")


class Hosts:
    """Two hosts of a rank each, with a folder each, that are started by scripts/launch.py."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, write_run(folder)
        self.folders = [folder / "a", folder / "b"]
        for one in self.folders:
            one.mkdir()
        (folder / "driver.py").write_text(DRIVER)
        self.started: list[Launch] = []

    def start(
        self,
        settings: Settings,
        *,
        second: Settings | None = None,
        names: tuple[str, str] = HOSTS,
        apart: bool = True,
        of_first: dict[str, Any] | None = None,
        **of_second: Any,
    ) -> Launch:
        """settings: of both hosts; second: further ones of the second host.

        apart: each host says what is wrong, though one launcher has started both.
        """
        ranks = [
            {
                "host": host,
                "folder": str(folder),
                "apart": apart,
                "transformers": "",
                "hangs_at": 0,
                "arguments": arguments(self.config, settings | more),
            }
            for host, folder, more in zip(names, self.folders, ({}, second or {}), strict=True)
        ]
        ranks[0] |= of_first or {}
        ranks[1] |= of_second
        said = self.folder / f"said-{len(self.started)}"
        self.started.append(Launch(self.folder / "driver.py", json.dumps(ranks), forks=said))
        return self.started[-1]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path)
    yield hosts
    for one in hosts.started:
        if one.process.poll() is None:
            one.kill()


# --- one config -----------------------------------------------------------------------------------


def test_another_config_and_other_packages(hosts: Hosts) -> None:
    """All that differs is named once, before anything is loaded or written."""
    other = {"training.steps": 7, "parallelism.sequence_parallel_degree": 2, "optimizer.lr": 0.5}
    may_differ = {"data.cache_folder": "cache", "activation_checkpoint.offload_folder": "buffers"}
    ended = hosts.start({}, second=other | may_differ, apart=False, transformers="9.9").end()
    import transformers

    assert ended == (
        2,
        "",
        "error: the ranks of this run were started with different settings:\n"
        "optimizer.lr = 0.003 on alpha, 0.5 on beta\n"
        "parallelism.sequence_parallel_degree = 1 on alpha, 2 on beta\n"
        "training.steps = 20 on alpha, 7 on beta\n"
        f'version of transformers = "{transformers.__version__}" on alpha, "9.9" on beta\n'
        "Start all hosts with the same config, options, packages and numbers.\n",
    )
    assert not (hosts.folder / "outputs").exists()


def test_bad_input_on_one_host(hosts: Hosts) -> None:
    """The other host does not wait: it says what the first one has said."""
    lost = hosts.folder / "lost.toml"
    launched = hosts.start({}, of_first={"arguments": ["--config", str(lost)], "hangs_at": 99})
    code, out, err = launched.end()
    assert (code, out) == (2, "")
    message = f"{lost}: no such file; correct the path in --config\n"
    assert sorted(err.splitlines(keepends=True)) == sorted(
        [f"error: {message}", f"error: rank 0 on alpha: {message}"]
    )


# --- one folder -----------------------------------------------------------------------------------

SEPARATE: Settings = ONE_THREAD | {"job.dump_folder": "outputs", "checkpoint.interval": 2}


def test_separate_folders_are_refused(hosts: Hosts) -> None:
    (hosts.folders[1] / "outputs").mkdir()
    code, out, err = hosts.start(SEPARATE, apart=False).end()
    assert (code, out) == (1, "")
    assert err == (
        "error: job.dump_folder = outputs: outputs/run on alpha is not the same folder as on "
        "beta. Name a folder that all hosts share, or set checkpoint.shared = false, with which "
        "each host keeps its own shards.\n"
    )
    assert not list(hosts.folders[0].iterdir()) and not any(hosts.folders[1].rglob("*.*"))


@pytest.mark.slow
def test_each_host_keeps_its_shards(hosts: Hosts) -> None:
    """A resumed run is exact, from the last step that both have; on other hosts it is refused."""
    runs = [folder / "outputs" / "run" for folder in hosts.folders]
    settings = SEPARATE | {"checkpoint.shared": False, "training.steps": 4}
    left_over = runs[1] / "checkpoints" / ".step-9.partial"
    left_over.mkdir(parents=True)
    code, _, err = hosts.start(settings).end()
    assert (code, err) == (0, "")
    assert not left_over.exists()
    for rank, run in enumerate(runs):
        step = run / "checkpoints" / "step-4"
        told = json.loads((step / "run.json").read_text())
        assert told["host"] == HOSTS[rank]
        assert told["hosts"] == {
            host: {"ranks": [n], "files": [".metadata", f"__{n}_0.distcp"]}
            for n, host in enumerate(HOSTS)
        }
        assert {file.name for file in step.iterdir()} == {
            "run.json",
            *told["hosts"][HOSTS[rank]]["files"],
        }

    shutil.rmtree(runs[1] / "checkpoints" / "step-4")
    refused = hosts.start(settings, names=("alpha", "gamma")).end()
    assert refused[0] == 1 and refused[2].count("error:") == 2
    assert (
        "step-2 was saved with checkpoint.shared = false by alpha (ranks 0) and beta (ranks 1). "
        "This run is alpha (ranks 0) and gamma (ranks 1)" in refused[2]
    )

    code, _, err = hosts.start(settings | {"training.steps": 6}).end()
    assert (code, err) == (0, "")
    together = write_run(hosts.folder / "together")
    run_on_ranks(2, train, together, ONE_THREAD | {"training.steps": 6})
    expected = learned(hosts.folder / "together" / "outputs" / "run")
    assert learned(runs[0]) == expected


def save_on_two_hosts(folder: Path) -> dict[str, Any]:
    """Two replicas, so that each host needs all of the model in its own folder."""
    rank = dist.get_rank()
    own = folder / HOSTS[rank]
    run, found = Run((2, 1, 1)).train(1), {}
    checkpointer = Checkpointer(own, keep=0, hosts=HOSTS)
    checkpointer.save(1, run.model, run.optimizer, RUN_STATE)
    expected = run.whole()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(torch, "save", no_space)
        found["full"] = error_of(lambda: checkpointer.save(2, run.model, run.optimizer, RUN_STATE))
    found["steps"] = sorted(path.name for path in own.iterdir())
    resumed = Run((2, 1, 1), seed=1)
    checkpointer.load(1, resumed.model, resumed.optimizer)
    assert_same(resumed.whole(), expected)
    resumed.train(1)
    run.train(1)
    assert_same(resumed.whole(), run.whole())

    shards = Run((1, 1, 2)).train(1)
    checkpointer.save(3, shards.model, shards.optimizer, RUN_STATE)
    other = Run((2, 1, 1), seed=1)
    before = other.whole()
    found["mesh"] = error_of(lambda: checkpointer.load(3, other.model, other.optimizer))
    assert_same({name: x for name, x in other.whole().items() if name in before}, before)
    checkpointer.save(4, run.model, run.optimizer, RUN_STATE)
    if rank == 1:
        flip(own / "step-4" / "__1_0.distcp", 5000)
    found["told"] = []
    both = Checkpointer(own, keep=0, hosts=HOSTS, say=found["told"].append)
    assert both.load_newest([1, 4], resumed.model, resumed.optimizer)[0] == 1
    both.set_damaged_aside()
    dist.barrier()
    checkpointer.save(4, run.model, run.optimizer, RUN_STATE)
    edit_save_id(own / "step-4") if rank == 1 else None
    found["parts"] = error_of(lambda: both.load_newest([4], resumed.model, resumed.optimizer))

    shared = Checkpointer(own, keep=0)
    found["shared"] = error_of(lambda: shared.load(3, other.model, other.optimizer))
    found["initial"] = error_of(lambda: check_checkpoint(str(own / "step-3")))
    return found


def edit_save_id(step: Path) -> None:
    """As if the folder of another run had been copied here."""
    rewrite(step, save_id="another")


def test_what_a_host_holds(tmp_path: Path) -> None:
    for found in run_on_ranks(2, save_on_two_hosts, tmp_path):
        assert "saving step 2 failed (" in found["full"] and "No space left" in found["full"]
        assert found["steps"] == ["step-1"]
        assert "step-3 was saved with checkpoint.shared = false on another mesh" in found["mesh"]
        assert "Resume that run with checkpoint.shared = false" in found["shared"]
        assert "__1_0.distcp: the bytes" in found["told"][0]
        assert "Resuming from step 1" in found["told"][0]
        assert "save_id on beta belongs to a different save than on alpha" in found["parts"]
        assert found["initial"].startswith("checkpoint.initial_load_path = ")


# --- lost ranks, links and stores -----------------------------------------------------------------

QUICK: Settings = {"comm.timeout_s": 8.0}


@pytest.mark.slow  # test_hang.py has one on one host
def test_a_rank_that_does_not_answer(hosts: Hosts) -> None:
    """Both end: one waits in a collective, the other one outside of any."""
    launched = hosts.start(QUICK, hangs_at=3)
    launched.wait_for(hosts.folder / "outputs" / "run", 2)
    since = time.monotonic()
    code, _, err = launched.end(timeout=60)
    assert time.monotonic() - since < 8 + 10
    assert code == 1 and "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == 2  # one of each host, which may find out at the same time
    for line in lines:
        told = line.removeprefix("error: ").removeprefix("rank 0 on alpha: ")
        assert told.startswith(
            "rank 1 on beta is at work on something else: it is in step 3, step ("
        )
        assert ". Rank 0 waited for it in step 3, all_reduce (" in told
        assert ", longer than comm.timeout_s. The same command goes on from the last " in told


@pytest.mark.slow  # test_two_hosts.py kills the host of a store
def test_a_store_that_dies(hosts: Hosts) -> None:
    """torchrun's agent is gone: each host says so, though one rank is not in a collective."""
    launched = hosts.start(QUICK, hangs_at=3)
    launched.wait_for(hosts.folder / "outputs" / "run", 2)
    ranks = launched.ranks()
    os.kill(launched.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 8 + 10
    while alive := [rank for rank in ranks if Path(f"/proc/{rank}").exists()]:
        if time.monotonic() > deadline:
            for rank in alive:
                os.kill(rank, signal.SIGKILL)
        time.sleep(0.05)
    _, _, err = launched.end()
    lines = err.splitlines()
    assert len(lines) == 2 and "Traceback" not in err
    assert all(
        line.endswith("The same command goes on from the last checkpoint.") for line in lines
    )
    assert sum("is gone or out of reach: its store at port" in line for line in lines) >= 1


def timeouts_of_a_mesh() -> tuple[set[float], set[float]]:
    mesh = build_mesh(replicate=2, timeout=50.0)
    parts = (mesh.world, mesh.fsdp, mesh.batch, mesh.loss)
    groups = [group for part in parts for group in part.get_all_groups()]
    first = {timeout_of(group) for group in groups}
    set_timeout(600.0)
    return first, {timeout_of(group) for group in groups}


def test_a_timeout_is_that_of_every_group() -> None:
    assert run_on_ranks(2, timeouts_of_a_mesh) == [({50.0}, {600.0})] * 2


LOST = {
    "[..gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:5123": "on 10.0.0.2 "
    "died without a message",
    "[..gloo/transport/tcp/pair.cc:538] Read error [fe80::1]:5: Connection reset by peer": "died",
    "[..unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation to complete": "has not "
    "answered",
    "[..pair.cc:525] Read error [10.0.0.2]:51: Connection timed out": "10.0.0.2 has not answered",
    "NCCL error: ncclRemoteError: A call failed possibly due to a network error": "died",
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1)": "not answered",
    "Failed to recv, got 0 bytes. Connection was likely closed.": "its store at port 29500",
    "The client socket has timed out after 2000ms while trying to connect": "rank 0 on one is "
    "stopped, or is gone",
}


@pytest.mark.parametrize("text", LOST)
def test_errors_of_a_lost_peer(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "one")
    monkeypatch.setenv("MASTER_PORT", "29500")
    try:
        try:
            raise RuntimeError(text)
        except RuntimeError as inner:
            raise RuntimeError("in backward") from inner
    except RuntimeError as error:
        assert LOST[text] in _lost_peer(error)[0]
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        if "socket has timed out" in text:
            assert "the first host, one, is gone or out" in _lost_peer(error)[0]


def test_how_a_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchrun restarts the ranks, nobody is asked for a command."""
    assert goes_on() == "The same command goes on from the last checkpoint."
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "10")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "9")
    assert "by itself" in goes_on()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "10")
    assert "The same command" in goes_on()


def test_other_errors_are_of_no_lost_peer() -> None:
    assert not _lost_peer(RuntimeError("The size of tensor a must match"))[0]
    assert not _lost_peer(ValueError("Connection reset by peer"))[0]
