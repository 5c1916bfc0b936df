"""What all tests share: the import path, the markers `slow`, `gpu` and `cuda`, the option `--cuda`,
and a summary that names what was skipped.
"""

from __future__ import annotations

import compileall
import functools
import gc
import os
import re
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
_DEVICE = _TESTS / "cuda" / "site"
for _folder in (_TESTS.parent, _TESTS):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--cuda",
        action="store_true",
        help="run the tests that ask for a CUDA device on that of tests/cuda, which needs no card",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cuda"):
        _load_device(config)
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs only with --slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; runs with -m gpu or --cuda")
    config.addinivalue_line("markers", "card(why): of those of gpu, one that needs a real one")
    config.addinivalue_line(
        "markers",
        "cuda(only=False, slow=False, never=''): runs with --cuda too. only: not without it. slow: "
        "takes long there, so that it wants --slow. never: why it, of a file that does, does not",
    )
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


_OF_DEVICE = "gpu or cuda"
_no_device = pytest.StashKey[str]()


def _load_device(config: pytest.Config) -> None:
    """Load the device of tests/cuda here, before torch, and let each process that starts do so.

    Without -m, the tests run that ask for a device.
    """
    sys.path.insert(0, str(_DEVICE))
    import fakecuda
    from fakecuda import build

    torch = build.torch_folder()
    if refused := build.why_refused(torch):
        raise pytest.UsageError(f"--cuda: {refused}")
    config.option.markexpr = config.option.markexpr or _OF_DEVICE
    config.stash[_no_device] = build.why_not(torch)
    if not config.stash[_no_device]:
        fakecuda.load()
        os.environ.update(fakecuda.environment())
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --cuda, do not import the files that have no test of the device: most of them."""
    if config.option.markexpr != _OF_DEVICE or not collection_path.match("test_*.py"):
        return None
    return None if re.search(r"mark\.(gpu|cuda)\b", collection_path.read_text()) else True


def _asks_for_gpu(config: pytest.Config) -> bool:
    chosen = config.getoption("-m")
    return config.getoption("--cuda") or ("gpu" in chosen and "not gpu" not in chosen)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if why := _why_skipped(config, item):
            item.add_marker(pytest.mark.skip(reason=why))


def _why_skipped(config: pytest.Config, item: pytest.Item) -> str:
    """Why a test does not run here; "" if it does."""
    on_device, slow = config.getoption("--cuda"), config.getoption("--slow")
    cuda, card = item.get_closest_marker("cuda"), item.get_closest_marker("card")
    if on_device and config.stash[_no_device]:
        return f"cuda: {config.stash[_no_device]}"
    if on_device and card:
        return f"gpu: needs a card: {card.args[0]}"
    if on_device and cuda and cuda.kwargs.get("never"):
        return f"cuda: {cuda.kwargs['never']}"
    if on_device and cuda and cuda.kwargs.get("slow") and not slow:
        return "cuda: slow there: run with --slow"
    if not on_device and cuda and cuda.kwargs.get("only"):
        return "cuda: run with --cuda"
    if item.get_closest_marker("gpu") and not _asks_for_gpu(config):
        return "gpu: run with -m gpu, on a machine with a CUDA device"
    if item.get_closest_marker("gpu") and not _has_cuda():
        return "gpu: torch sees no CUDA device"
    if item.get_closest_marker("slow") and not slow:
        return "slow: run with --slow"
    return ""


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


@functools.cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
