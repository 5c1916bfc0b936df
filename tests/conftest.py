"""What all tests share: the import path, the markers `slow` and `gpu`, and a summary that names
what was skipped.
"""

from __future__ import annotations

import compileall
import gc
import os
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Tiny matrices: more threads would only wait for each other, for ever where another process has
# their core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_TESTS = Path(__file__).resolve().parent
for _folder in (_TESTS.parent, _TESTS):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs only with --slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; runs only with -m gpu")
    if not _asks_for_gpu(config):
        # All other tests are of a CPU and of gloo: a mesh that finds a GPU would be a CUDA mesh.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if sys.dont_write_bytecode and not hasattr(config, "workerinput"):
        # The tests start a hundred processes, each of which would compile the package again.
        compileall.compile_dir(_TESTS.parent / "titan_ulysses", quiet=2)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files that wait beside files that compute: see helpers/schedule.py."""
    if config.getoption("dist") != "loadfile":
        return None
    from helpers.schedule import OneWaits

    return OneWaits(config, log)


def _asks_for_gpu(config: pytest.Config) -> bool:
    chosen = config.getoption("-m")
    return "gpu" in chosen and "not gpu" not in chosen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    why_not = None
    if not _asks_for_gpu(config):
        why_not = "gpu: run with -m gpu, on a machine with a CUDA device"
    elif not _has_cuda():
        why_not = "gpu: torch sees no CUDA device"
    for item in items:
        if item.get_closest_marker("gpu") and why_not:
            item.add_marker(pytest.mark.skip(reason=why_not))
        elif item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays for ever: the collector need not look through it again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the skipped tests by reason, without -rs: a test nobody sees skipped is a test nobody
    runs. Likewise for tests of two hosts on a machine that cannot have two.
    """
    from helpers.hosts import without_namespaces

    ran = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    of_hosts = any("test_two_hosts.py" in report.nodeid for report in ran)
    if of_hosts and (lacking := without_namespaces()):
        terminalreporter.section("two hosts")
        terminalreporter.line(f"both were this machine, on loopback: {lacking}")
    names_by_reason: dict[str, Counter[str]] = defaultdict(Counter)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        names_by_reason[reason.removeprefix("Skipped: ")][report.nodeid.split("[")[0]] += 1
    if not names_by_reason:
        return
    terminalreporter.section("skipped tests")
    for reason, names in names_by_reason.items():
        terminalreporter.line(f"{names.total()} skipped: {reason}")
        listed = ", ".join(
            name if count == 1 else f"{name} (x{count})" for name, count in names.items()
        )
        terminalreporter.line(
            textwrap.fill(
                listed,
                width=118,
                initial_indent="  ",
                subsequent_indent="  ",
                break_on_hyphens=False,
            )
        )


@pytest.fixture(scope="module", autouse=True)
def rank_pools() -> Iterator[None]:
    """End the processes of `run_on_ranks` with the file: idle ones take time from the next."""
    yield
    from helpers.ranks import close_pools

    close_pools()


@pytest.fixture(scope="session")
def observe(tmp_path_factory: pytest.TempPathFactory):
    """An `Observer` of whole runs, which remembers them: see observed.py."""
    from helpers.observed import Observer

    return Observer(tmp_path_factory.mktemp("observed"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
