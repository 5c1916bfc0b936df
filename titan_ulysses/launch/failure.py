"""How a run fails: one message on each host, an exit code for the cause, and no rank left waiting.

The first rank that fails counts itself in torchrun's store, prints what is wrong, and leaves the
message there. The other ranks see that (watch.py), and the first of each other host repeats it.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.launch import heartbeat, run_store

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_SIGNS = {
    "ended": (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Software caused connection abort",
        "ncclRemoteError",
        "remote process exiting",
    ),
    "store": (
        "client socket has timed out",
        "client socket has failed to connect",
        "Failed to recv, got 0 bytes",
        "failed to recv, got 0 bytes",
        "Socket Timeout",
        "Connection was likely closed",
    ),
    "silent": (
        "Timed out waiting",
        "Connection timed out",
        "timed out connecting",
        "timeout connecting",
        "No route to host",
        "Network is unreachable",
        "Host is down",
        "Wait timeout",
        "wait timeout after",
        "Watchdog caught collective operation timeout",
        "NCCL communicator was aborted",
        "Connection refused",
    ),
}
"""Texts in torch's and NCCL's errors where another rank has ended, where torchrun's store cannot be
reached, and where another rank does not answer; the first that matches counts. Torch has no types
for these errors. The texts are those of c10d and gloo in torch 2.13, the system's names of errors,
and texts of NCCL, which have not been seen on a GPU.
"""

_BEAT_SECONDS = 2.5
"""Seconds in which the heart of a rank that is alive beats; more where many ranks ask the store."""
_DIED = "died without a message (out of memory?)"
_ANSWER_SECONDS = 4.0
"""Seconds that a failing rank gives the store to answer."""
_MESSAGE_SECONDS = 3.0
"""Seconds that a rank waits for the message of the rank that failed first."""

_FIRST_SECONDS = 2.0
"""Seconds that a rank whose connection was closed gives the one that closed it to say why."""

_PRINT_SECONDS = 1.0
"""Seconds that the first rank to fail gives another one of its host to print why. torchrun ends all
ranks as soon as one has ended."""

_LINGER_SECONDS = 5.0
"""Seconds for which those stay at most with whom the store ends, so that the others can hear."""

_OLD_SECONDS = 120.0

_CONTROLS = {code: f"\\x{code:02x}" for code in {*range(32), *range(127, 160)} - {*b"\n\t"}}
"""Characters that a terminal obeys. A message may hold a path or a setting that has them."""

_ending = threading.Lock()
"""Held by the thread that ends this process."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Run the program in this context, which turns an error into a message and an exit code.

    Bad input, errors of the operating system and the loss of another rank end it with a message,
    other errors with a traceback. Only one rank of each host prints. Exit codes: 2 for a command
    line or TOML file that cannot be used, 130 for Ctrl-C, 1 for any other error.
    """
    if run_store.rank_and_size()[1] > 1:
        # Read when torch is imported. Without it, c10d prints a traceback for each lost connection.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        yield
        leave_together()
    except UserError as error:
        end(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        # This is before the first step or after the last; in between, the trainer saves and stops.
        end("Interrupted.", 130)
    except OSError as error:
        end(f"error: {of_system(error)}", 1)
    except Exception as error:
        lost, hang = _lost_peer(error)
        end(f"error: {lost}" if lost else traceback.format_exc(), 1, hang=hang)


def of_system(error: OSError) -> str:
    """Return an error of the operating system in words, with what to do."""
    what = f"{error.filename or 'input/output'}: {error.strerror or error}"
    remedies = {
        (errno.ENOSPC, errno.EDQUOT): "the disk is full. Free space, lower "
        "checkpoint.keep_latest_k, or name another job.dump_folder",
        (errno.EACCES, errno.EPERM, errno.EROFS): "this is a permission error. Make it readable "
        "and writable for this user, or name another job.dump_folder",
        (errno.EMFILE, errno.ENFILE): "too many files are open. Raise the limit, as with "
        "`ulimit -n 65536`",
    }
    found = (remedy for numbers, remedy in remedies.items() if error.errno in numbers)
    remedy = next(found, None)
    return f"{what}: {remedy}." if remedy else what


def goes_on() -> str:
    """Return how the run goes on after a rank was lost: torchrun restarts it, or the user does."""
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if attempt < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        return "The run goes on from the last checkpoint by itself, with the hosts that are there."
    return "The same command goes on from the last checkpoint."


def store_is_gone() -> str:
    """Return the message for a store that does not answer."""
    host, port = run_store.address()
    who = f"the first host, {host}," if run_store.has_agent_store() else f"rank 0 on {host}"
    stopped = "" if run_store.has_agent_store() else " is stopped, or"
    return (
        f"{who}{stopped} is gone or out of reach: its store at port {port} does not answer. "
        f"{goes_on()}"
    )


def _lost_peer(error: BaseException) -> tuple[str, bool]:
    """Return the message for an error that the loss of another rank has caused, and whether that
    rank may be alive; "" for other errors.

    The beats of ranks say which one is lost. On the same host there is no time to ask: torchrun
    ends all ranks of a host as soon as one has ended.
    """
    sign, where = _sign_of(error)
    try:
        if sign == "ended":
            asks = not _another_has_failed() and where and run_store.has_store()
            if asks and (who := heartbeat.describe_dead(_BEAT_SECONDS)):
                return f"{who} {_DIED}: the process or its host is gone. {goes_on()}", False
            return f"another rank{where} {_DIED}. {goes_on()}", False
        if sign == "silent":
            if run_store.has_store() and (who := heartbeat.describe_hang(error, _BEAT_SECONDS)):
                return f"{who}, longer than comm.timeout_s. {goes_on()}", True
            what = "has not answered within comm.timeout_s: its host is gone, or the network to it"
            return f"another rank{where} {what}. {goes_on()}", True
    except ConnectionError:
        pass  # the store does not answer either
    return (store_is_gone() if sign else ""), sign == "silent"


def _sign_of(error: BaseException | None) -> tuple[str | None, str]:
    """Return which of `_SIGNS` an error or one of its causes has, and where the other rank is, as
    " on 10.0.0.2".
    """
    while error is not None:
        # All of torch's own errors of this kind are RuntimeErrors. An OSError has another source.
        text = str(error) if isinstance(error, RuntimeError) else ""
        for kind, texts in _SIGNS.items():
            if any(sign in text for sign in texts):
                found = re.search(r"\[(\d+\.\d+\.\d+\.\d+|[0-9a-f]*:[0-9a-f:]+)\]", text)
                is_other = found is not None and found[1] not in ("127.0.0.1", "::1")
                return kind, f" on {found[1]}" if is_other else ""
        error = error.__cause__ or error.__context__
    return None, ""


def _another_has_failed() -> bool:
    """Return whether a rank has counted itself as failed, or does so soon.

    A rank that has lost another one closes all of its connections. The ranks at their other ends
    may notice that before it has said what is wrong.
    """

    def wait() -> bool:
        store = run_store.connect()
        while not failures(store):
            time.sleep(0.05)
        return True

    return bool(run_store.within(_FIRST_SECONDS, wait))


def leave_together(code: int = 0) -> None:
    """End this process when all ranks have done their work.

    The interpreter's own shutdown is skipped: it takes two seconds for what torch and transformers
    import, and threads of a process group may abort a rank during it whose peer has already ended.
    """
    if "torch" not in sys.modules:
        return  # --help and --print-config do not import it
    import torch.distributed as dist

    if dist.is_initialized():
        # The barrier fails on a rank whose peer has already ended; that rank is only late.
        with suppress(Exception):
            dist.barrier()
    else:
        sys.stdout.flush()  # OSError where what was printed cannot be written
    _ending.acquire()  # the store may go now, and nobody needs to hear of it
    _exit(code)


def _print(message: str) -> None:
    with suppress(OSError, ValueError):  # the reader of the output may be gone
        print(message.translate(_CONTROLS), file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _exit_when_heard(store: TCPStore, code: int) -> NoReturn:
    """Exit after a failure that the store knows of, and that this rank has counted.

    The store ends with rank 0 if that runs it, else with the ranks of its host. So these stay until
    the others have heard. A rank that cannot find the store would blame the first host.
    """
    hosts, size = int(os.environ.get("GROUP_WORLD_SIZE", "1")), run_store.rank_and_size()[1]
    first_ones = [run_store.key(f"failures/{node}") for node in range(hosts)]
    hosts_store = run_store.hosts_store()

    def others_have_heard() -> bool:
        time.sleep(0.2)  # a rank that has counted itself may still be reading why
        while failures(store) < size if hosts_store else not store.check(first_ones):
            time.sleep(0.2)
        return True

    if hosts_store or (run_store.node() == "0" and hosts > 1):
        run_store.within(_LINGER_SECONDS, others_have_heard)
    _exit(code)


def end(message: str, code: int, *, hang: bool = False) -> NoReturn:
    """End this rank at once with a message, unless another rank of this host has printed one.

    The message of the rank that failed first counts, and so does its exit code. A pending
    collective must not delay the exit. hang: another rank hangs, so that all ranks that can leave
    their stacks in the run's folder.
    """
    _ending.acquire()  # never released: a second thread waits here until the process ends
    if hang and (folder := heartbeat.write_stacks()):
        message = f"{message} The stacks of all ranks are in {folder}."
    message = message.rstrip()
    rank, size = run_store.rank_and_size()
    if size == 1:
        _print(message)
        _exit(code)
    import torch.distributed  # noqa: F401  it may take longer than the store has time to answer

    def count() -> tuple[TCPStore, int, int]:
        store = run_store.connect()
        return store, *_count(store)

    answer = run_store.within(_ANSWER_SECONDS, count)
    if answer is None:  # the store is gone, so that hosts cannot know of each other
        if not run_store.leads_host():
            time.sleep(1)  # the launcher ends the first rank as soon as another one has ended
        if _is_first_to_speak():  # the first rank may be the one that is stopped
            _print(message)
        _exit(code)
    store, ranks, ranks_of_host = answer
    first: dict[str, Any] | None
    if ranks == 1:
        first = {"rank": rank, "message": message, "code": code, "hang": hang}
        first |= {"host": run_store.host_name(), "node": run_store.node()}
        run_store.within(_ANSWER_SECONDS, lambda: run_store.put(store, "first failure", first))
    else:
        first = run_store.within(_ANSWER_SECONDS + _MESSAGE_SECONDS, lambda: _first_failure(store))
    # Of two ranks that fail at once, one may be the first of the run and the other the first of the
    # host. Which one prints must depend on one counter alone.
    if ranks_of_host == 1:
        _speak(_repeated(first) if first and first["message"] != message else message)
    elif ranks == 1:
        time.sleep(_PRINT_SECONDS)
    _exit_when_heard(store, first["code"] if first else code)


def end_like_the_first(store: TCPStore) -> NoReturn:
    """End this rank because another one has failed, with the message and exit code of that one."""
    _ending.acquire()

    def ask() -> tuple[dict[str, Any] | None, int]:
        return _first_failure(store), _count(store)[1]

    lost = None, 1 if run_store.leads_host() else 2
    first, ranks_of_host = run_store.within(_ANSWER_SECONDS + _MESSAGE_SECONDS, ask) or lost
    if first and first.get("hang"):
        heartbeat.write_stacks()
    if ranks_of_host == 1:
        # Without a message, the first rank was ended before it could say why.
        _speak(_repeated(first) if first else f"error: another rank has failed. {goes_on()}")
    _exit_when_heard(store, first["code"] if first else 1)


def failures(store: TCPStore) -> int:
    """Return how many ranks have failed, by themselves or because another one has."""
    return store.add(run_store.key("failures"), 0)


def _count(store: TCPStore) -> tuple[int, int]:
    """Count this rank as failed; return which one it is of the run, and which one of its host."""
    names = ("failures", f"failures/{run_store.node()}")
    of_run, of_host = (store.add(run_store.key(name), 1) for name in names)
    return of_run, of_host


def _speak(message: str) -> None:
    """Print the message of this host. A rank of it that the store does not answer hears of it."""
    _is_first_to_speak()
    _print(message)


def _is_first_to_speak() -> bool:
    """Return whether no other rank of this host has asked this, without the store.

    The ranks of a host have the same parent, and their run a port of its own. torchrun starts them
    again with both.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    run = (os.getppid(), os.environ.get("MASTER_PORT", ""), run_store.node(), attempt)
    name = f"titan_ulysses-{'-'.join(map(str, run))}.said"
    path = os.path.join(tempfile.gettempdir(), name)
    # Those of earlier runs: one may have had the same numbers.
    for earlier in Path(tempfile.gettempdir()).glob("titan_ulysses-*.said"):
        with suppress(OSError):
            if time.time() - earlier.stat().st_mtime > _OLD_SECONDS:
                earlier.unlink()
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return run_store.leads_host()
    return True


def _first_failure(store: TCPStore) -> dict[str, Any] | None:
    """Return what the rank that failed first has left in the store, if it comes soon."""
    deadline = time.monotonic() + _MESSAGE_SECONDS
    while not run_store.is_there(store, "first failure"):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)
    return run_store.get(store, "first failure")


def _repeated(first: dict[str, Any]) -> str:
    """Return the message of the rank that failed first, for another rank to print.

    On another host it names the rank and its host, and of a traceback it is the end. A message in
    which all ranks agree is repeated as it is.
    """
    message: str = first["message"]
    if first["node"] == run_store.node():
        return message
    if message.startswith("Traceback"):
        message = message.splitlines()[-1]
    if message.startswith("error: the ranks of this run"):
        return message
    return f"error: rank {first['rank']} on {first['host']}: {message.removeprefix('error: ')}"
