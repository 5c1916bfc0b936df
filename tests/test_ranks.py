"""The helper that all multi-process tests stand on: it must report every way in which ranks fail,
and end them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import RankFailure, RankTimeout, close_pools, run_on_ranks

_TESTS = Path(__file__).resolve().parent


def describe(*values: object, **named: object) -> dict[str, object]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return {
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "backend": dist.get_backend(),
        "threads": torch.get_num_threads(),
        "environment": [os.environ[name] for name in names],
        "port_is_set": os.environ["MASTER_PORT"].isdigit(),
        "arguments": (values, named),
    }


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor * (dist.get_rank() + 1)
    dist.all_reduce(tensor)
    return tensor


def raise_on_rank_1_while_rank_0_waits() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason of rank 1")
    time.sleep(600)


def raise_on_every_rank() -> None:
    raise KeyError(f"reason {dist.get_rank()}")


def leave_on_rank_1(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "exit":
            os._exit(7)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit("SystemExit is caught")
    dist.barrier()


def sleep_forever() -> None:
    time.sleep(600)


def wait_for_rank_0() -> None:
    dist.barrier()


def hang() -> None:
    sleep_forever() if dist.get_rank() == 0 else wait_for_rank_0()


def return_what_cannot_travel() -> object:
    return lambda: None


def make_a_group(times: int = 1) -> None:
    for _ in range(times):
        dist.barrier(group=dist.new_group([0, 1]))


def destroy_the_group() -> None:
    dist.destroy_process_group()


def kill_parent_and_stay_busy() -> None:
    if dist.get_rank() == 0:
        os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
        sleep_forever()
    wait_for_rank_0()


def assert_gone(pids: list[int]) -> None:
    """Our own children: gone means dead and reaped, so that not even a zombie answers to the
    pid.
    """
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code that imports from tests/. Its ranks inherit its output, so this returns only when
    they are gone too.
    """
    environment = {**os.environ, "PYTHONPATH": str(_TESTS), "CUDA_VISIBLE_DEVICES": "3"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, env=environment
    )


def test_each_rank_has_its_own_result_and_environment() -> None:
    described = run_on_ranks(2, describe, 1, "two", three=[3])
    for rank, result in enumerate(described):
        assert result == {
            "rank": rank,
            "world_size": 2,
            "backend": "gloo",
            "threads": 1,
            "environment": [str(rank), "2", str(rank), "2", "127.0.0.1"],
            "port_is_set": True,
            "arguments": ((1, "two"), {"three": [3]}),
        }


def test_all_reduce_of_large_tensors_by_value() -> None:
    tensor = torch.arange(1_000_000, dtype=torch.float64)  # far more than a pipe buffers
    for result in run_on_ranks(2, sum_over_ranks, tensor):
        assert torch.equal(result, 3 * tensor)
        assert not result.is_shared()


def test_ranks_are_reused_and_calls_are_cheap() -> None:
    pids = run_on_ranks(2, os.getpid)
    assert len({os.getpid(), *pids}) == 3
    start = time.monotonic()
    for _ in range(100):
        assert run_on_ranks(2, os.getpid) == pids
    assert time.monotonic() - start < 5.0


def test_what_cannot_be_sent_is_refused_without_losing_the_ranks() -> None:
    pids = run_on_ranks(2, os.getpid)
    with pytest.raises(Exception, match="pickle|local object"):
        run_on_ranks(2, lambda: None)
    assert run_on_ranks(2, os.getpid) == pids


def test_exception_on_one_rank_while_the_other_is_stuck() -> None:
    pids = run_on_ranks(2, os.getpid)
    start = time.monotonic()
    with pytest.raises(RankFailure, match="the reason of rank 1") as caught:
        run_on_ranks(2, raise_on_rank_1_while_rank_0_waits)
    assert time.monotonic() - start < 10.0
    assert list(caught.value.failures) == [1]
    assert "in raise_on_rank_1_while_rank_0_waits" in caught.value.failures[1]
    assert "killed: ranks [0]" in str(caught.value)
    assert_gone(pids)


def test_hang_shows_the_stack_of_every_rank() -> None:
    pids = run_on_ranks(2, os.getpid)
    with pytest.raises(RankTimeout, match=r"ranks \[0, 1\] still running after 3 s") as caught:
        run_on_ranks(2, hang, timeout=3)
    for rank, innermost in enumerate(("sleep_forever", "wait_for_rank_0")):
        assert f"in {innermost}\n" in caught.value.stacks[rank]
        assert "in hang\n" in caught.value.stacks[rank]
        assert caught.value.stacks[rank].rstrip() in str(caught.value)
    assert_gone(pids)


def test_every_failing_rank_is_reported() -> None:
    with pytest.raises(RankFailure) as caught:
        run_on_ranks(2, raise_on_every_rank)
    for rank in range(2):
        assert f"KeyError: 'reason {rank}'" in caught.value.failures[rank]
        assert f"--- rank {rank} ---" in str(caught.value)


@pytest.mark.parametrize(
    ("how", "report"),
    [("exit", "exit code 7"), ("kill", "exit code -9"), ("sys.exit", "SystemExit is caught")],
)
def test_death_of_a_rank(how: str, report: str) -> None:
    run_on_ranks(2, os.getpid)
    start = time.monotonic()
    with pytest.raises(RankFailure, match=report) as caught:
        run_on_ranks(2, leave_on_rank_1, how)
    assert time.monotonic() - start < 10.0
    assert report in caught.value.failures[1]


def test_death_between_calls_is_reported_and_the_call_after_works() -> None:
    [pid] = run_on_ranks(1, os.getpid)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankFailure, match="exit code -9"):
        run_on_ranks(1, os.getpid)
    assert run_on_ranks(1, os.getpid) != [pid]


@pytest.mark.parametrize(
    ("fn", "report"),
    [(return_what_cannot_travel, "<locals>"), (destroy_the_group, "destroyed the default process")],
)
def test_results_that_cannot_be_used(fn, report: str) -> None:
    with pytest.raises(RankFailure, match=report):
        run_on_ranks(1, fn)


def test_close_pools_leaves_no_process() -> None:
    pids = run_on_ranks(1, os.getpid)
    close_pools()
    assert_gone(pids)


@pytest.fixture(scope="module")
def with_few_files() -> subprocess.CompletedProcess[str]:
    """A process that may open few files, ends with a rank alive, and prints what GPUs that sees."""
    return run_python(
        "import resource, test_ranks; from helpers import ranks;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096));"
        "[ranks.run_on_ranks(2, test_ranks.make_a_group) for _ in range(25)];"
        "print(ranks.run_on_ranks(1, test_ranks.visible_gpus))"
    )


def test_groups_of_earlier_calls_do_not_exhaust_open_files(with_few_files) -> None:
    assert with_few_files.returncode == 0, with_few_files.stderr


def test_ranks_with_many_groups_are_replaced() -> None:
    """Their threads would take the processor from those of later calls."""
    [before, _] = run_on_ranks(2, os.getpid)
    for _ in range(5):
        run_on_ranks(2, make_a_group, 10)
    assert run_on_ranks(2, os.getpid)[0] != before


def test_ranks_that_are_idle_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once others are called."""
    [before] = run_on_ranks(1, os.getpid)
    run_on_ranks(2, os.getpid)
    assert run_on_ranks(1, os.getpid) == [before]
    monkeypatch.setattr("helpers.ranks._IDLE_SECONDS", 0.0)
    assert run_on_ranks(1, os.getpid) == [before]
    run_on_ranks(2, os.getpid)
    assert run_on_ranks(1, os.getpid) != [before]


class Worker:
    """Of pytest-xdist."""

    def send_runtest_some(self, indices: list[int]) -> None:
        pass


def test_one_worker_takes_the_files_that_wait() -> None:
    """And then, as the others, those that compute."""
    pytest.importorskip("xdist")
    from helpers import schedule

    waiting = [f"tests/test_{name}.py" for name in schedule.WAITING]
    assert all((_TESTS.parent / file).exists() for file in waiting)
    computing = [f"tests/test_{name}.py" for name in ("loss", "lora", "nf4")]
    files = [computing[0], waiting[1], computing[1], waiting[0], computing[2]]
    one, other = Worker(), Worker()
    scheduler = schedule.OneWaits.__new__(schedule.OneWaits)
    scheduler.workqueue = OrderedDict((file, {f"{file}::test": False}) for file in files)
    scheduler.assigned_work = {one: {}, other: {}}
    scheduler.registered_collections = dict.fromkeys((one, other), [f"{f}::test" for f in files])
    for worker in (one, other, one, other, one):
        scheduler._assign_work_unit(worker)
    assert [*scheduler.assigned_work[one]] == [*waiting[:2], computing[2]]
    assert [*scheduler.assigned_work[other]] == computing[:2]


def test_ranks_end_at_exit(with_few_files) -> None:
    # gloo ranks see no GPU, whatever the parent sees.
    found = with_few_files.returncode, with_few_files.stdout, with_few_files.stderr
    assert found == (0, "['']\n", "")


def visible_gpus() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_busy_ranks_end_when_the_parent_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    finished = run_python(
        "import test_ranks; test_ranks.run_on_ranks(2, test_ranks.kill_parent_and_stay_busy)"
    )
    assert finished.returncode == -signal.SIGKILL, finished.stderr
    assert not list(tmp_path.glob("ranks-*"))


def test_skipped_tests_are_named_by_reason(tmp_path: Path) -> None:
    """GPUs are hidden from tests and from what they start, unless -m gpu asks for them."""
    (tmp_path / "test_sample.py").write_text(
        "import os, pytest\n"
        "print('hidden' if os.environ['CUDA_VISIBLE_DEVICES'] == '' else 'visible')\n"
        "@pytest.mark.gpu\ndef test_on_gpu(): pass\n"
        "@pytest.mark.slow\n@pytest.mark.parametrize('n', [1, 2])\ndef test_long(n): pass\n"
    )
    options = ["-s", "-p", "conftest", "-W", "error", "--rootdir", str(tmp_path), str(tmp_path)]
    code = f"import pytest, sys; sys.exit(pytest.main({options!r} + %r))"
    without, with_slow = run_python(code % []), run_python(code % ["--slow", "-m", "not gpu"])
    with_gpu = run_python(code % ["-m", "gpu"])
    for finished, seen in ((without, "hidden"), (with_slow, "hidden"), (with_gpu, "visible")):
        assert finished.returncode == 0 and f"\n{seen}\n" in finished.stdout, finished.stdout
    reason = "gpu: run with -m gpu, on a machine with a CUDA device"
    assert f"1 skipped: {reason}\n  test_sample.py::test_on_gpu\n" in without.stdout
    assert "2 skipped: slow: run with --slow\n  test_sample.py::test_long (x2)\n" in without.stdout
    assert "2 passed, 1 deselected" in with_slow.stdout
    assert "1 skipped: gpu: torch sees no CUDA device" in with_gpu.stdout
