"""Run torchrun, with one message where a run cannot start or goes wrong.

Takes torchrun's arguments, and adds what torchrun lacks:

- `--nproc-per-node auto` is a rank a GPU that torch can use, or two on a host without any. Ranks
  share the host's cores, and run beside their GPUs.
- Several hosts are checked before they wait for each other (precheck.py).
- Where a rank fails, the exit code is that of the rank, without the launcher's own traceback: the
  rank has already printed what is wrong, and forty lines about the launcher below would hide it.
- A signal is passed on to the ranks, which finish their step and save before they end. torchrun
  would kill them after 30 seconds.
- Where the link between hosts is cut, the launcher ends soon after its ranks. torchrun would wait
  for the other host for ever.
- Where a host joins an elastic run, the ranks save before they are started again.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

# The store of torch reports each connection that it loses; what that means is said here.
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "FATAL")

import torch.distributed.launcher.api as torch_launcher
from precheck import Meeting, meet
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import parse_args, parse_min_max_nnodes, run

from titan_ulysses.config.cli import parse_command_line
from titan_ulysses.config.load import load_config
from titan_ulysses.distributed.errors import UsageError, UserError, one_line
from titan_ulysses.launch.host import usable_cores, visible_gpus
from titan_ulysses.train.signals import HOSTS_CHANGE, RESTART

_DAY = 24 * 60 * 60
_TIMEOUT = 600.0
"""Seconds for which a host may be silent, where no config says so."""
_PATIENCE = 5
"""Seconds that the ranks of a run that has failed get to end."""


def main(argv: list[str]) -> int:
    # Wait for the ranks to end, since a step may take long. A second Ctrl-C ends them at once.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_DAY))
    # Silence torchrun's own reports, which only repeat the exit code of each rank.
    logging.disable(logging.ERROR)
    args, meeting = parse_args(argv), None
    try:
        set_ranks(args)
        meeting = meeting_of(args)
        met = prepare(args, meeting) if meeting else None
        torch_launcher.LocalElasticAgent = Agent
        run(args)
        del met  # the first host's store, which the others need until here
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except ChildFailedError as error:
        return _exit_code({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as stop:
        return 128 + stop.sigval
    except KeyboardInterrupt:  # before torchrun listens to signals
        return 128 + signal.SIGINT
    except (RendezvousError, DistError) as error:
        return _fail(_explain(error, meeting))
    return 0


# --- the ranks of this host -----------------------------------------------------------------------


def set_ranks(args: Any) -> None:
    """Set how many ranks this host has, how many threads each has, and on which cores they run.

    UserError for more ranks than GPUs, and for GPUs that torch cannot use.
    """
    gpus = visible_gpus()
    if args.nproc_per_node == "auto":
        args.nproc_per_node = str(gpus or 2)
    if args.nproc_per_node in ("cpu", "gpu", "xpu"):
        return  # torchrun's own words
    ranks = number_of(args.nproc_per_node, "NPROC (--nproc-per-node)", 1, 4096)
    cores = usable_cores()
    if 0 < gpus < ranks:
        raise UsageError(
            f"{ranks} ranks, and torch can use {gpus} GPU{'s' * (gpus > 1)} here: each rank needs "
            f"one of its own. Set NPROC={gpus}, or look at CUDA_VISIBLE_DEVICES"
        )
    # More threads than cores make all ranks wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // max(1, ranks))))
    # Where this process has only some of the cores, those beside a GPU may not be among them.
    if gpus and args.numa_binding is None and memory_nodes() > 1 and cores == os.cpu_count():
        # torchrun calls numactl.
        args.numa_binding = "node" if shutil.which("numactl") else None


def number_of(text: str, name: str, least: int, most: int) -> int:
    """Return a number of the command line. UserError if it is none, or out of these bounds."""
    number = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1
    if not least <= number <= most:
        raise UsageError(f"{name} is {text}: needs a number from {least} to {most}")
    return number


def memory_nodes() -> int:
    """Return how many NUMA nodes this host has."""
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))


# --- several hosts --------------------------------------------------------------------------------


def meeting_of(args: Any) -> Meeting | None:
    """Return what torchrun's arguments say of the hosts; None if there is only one.

    UserError for numbers that are none.
    """
    try:
        least, most = parse_min_max_nnodes(args.nnodes)
    except (ValueError, RuntimeError):
        raise UsageError(f"--nnodes {args.nnodes}: needs a number of hosts, or MIN:MAX") from None
    if most == 1 or args.standalone:
        return None
    settings = _rendezvous_settings(args)
    rank = int(args.node_rank)
    if args.rdzv_backend == "static":
        if least < most:
            raise UserError(f"--nnodes {args.nnodes}: an elastic run needs --rdzv-backend c10d")
        first, port = args.master_addr or "127.0.0.1", args.master_port or 29500
        if args.rdzv_endpoint:
            first, port = _endpoint(args.rdzv_endpoint, port)
    else:
        first, port = _endpoint(args.rdzv_endpoint, 29400)
        if "is_host" not in settings:
            return None  # torchrun guesses which host is the first one
        rank = 0 if settings["is_host"].lower() in ("1", "true") else max(rank, 1)
    return Meeting(
        least,
        most,
        rank,
        first,
        number_of(str(port), "the port of the first host", 1, 65535),
        interface=os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0],
        patience=number_of(settings.get("join_timeout", "600"), "WAIT (join_timeout)", 1, _DAY),
    )


def prepare(args: Any, meeting: Meeting) -> Any:
    """Let the hosts meet; then tell torchrun, gloo and NCCL which interface they use."""
    if sys.platform != "linux":  # interfaces and sockets are set as Linux has them
        raise UserError(f"--nnodes: runs on several hosts need Linux, and this is {sys.platform}")
    met = meet(meeting)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", met.interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={met.interface}")
    args.local_addr = args.local_addr or met.address
    keep_alive(silence_of([args.training_script, *args.training_script_args]))
    return met


def silence_of(command: list[str]) -> float:
    """Return comm.timeout_s of the command's config: how long a host may be silent.

    Its value "auto" is for ranks that compute; hosts keep in touch meanwhile. A config that cannot
    be read is left to the ranks, which say what is wrong with it.
    """
    script, *arguments = command
    if os.path.basename(script) != "train.py":
        return _TIMEOUT
    try:
        parsed = parse_command_line(arguments)
        chosen = load_config(parsed.config_path, parsed.overrides).comm.timeout_s
        return chosen if chosen > 0 else _TIMEOUT
    except (UserError, SystemExit):
        return _TIMEOUT


def keep_alive(silence: float) -> None:
    """End this process's connections once the other side has been silent for so many seconds.

    torchrun opens them in places that take no option, and reads from them without a timeout. So a
    thread looks for new ones.
    """

    def watch() -> None:
        while True:
            bound_silence(silence)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True, name="keep-alive").start()


def bound_silence(silence: float) -> None:
    """Set that bound on all TCP connections that are open now, on Linux."""
    options = (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, min(30, int(silence / 3)))),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, min(10, int(silence / 6)))),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence * 1000)),
    )
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # not a TCP socket, or closed since
            if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(number))) as connection:
                    for option in options:
                        connection.setsockopt(*option)


def _endpoint(text: str, default_port: int) -> tuple[str, int]:
    try:
        return parse_rendezvous_endpoint(text, default_port)
    except ValueError as error:
        raise UsageError(f"--rdzv-endpoint {text}: {one_line(error)}") from None


def _rendezvous_settings(args: Any) -> dict[str, str]:
    pairs = (pair.partition("=") for pair in args.rdzv_conf.split(",") if pair)
    return {key.strip(): value.strip() for key, _, value in pairs}


class Agent(LocalElasticAgent):
    """torchrun's agent, but ranks are stopped as the reason for it asks."""

    _remaining_restarts: int
    _patient: Any = None
    """The ranks' processes for which torchrun's own patience has been changed."""

    def _stop_workers(self, worker_group: Any, *args: Any, **kwargs: Any) -> None:
        if worker_group.state == WorkerState.HEALTHY:
            # Another host wants to join. The ranks finish the step and save, however long it takes.
            super()._shutdown(HOSTS_CHANGE, _DAY)
        else:
            self._shutdown()

    def _shutdown(self, death_sig: Any = None, timeout: int = _PATIENCE) -> None:
        """End the ranks: with the signal that this process has got, or because a rank has failed.

        A rank that waits for one that has failed cannot finish its step.
        """
        if death_sig is None:
            return super()._shutdown(signal.SIGTERM, _PATIENCE)
        if death_sig == signal.SIGTERM:
            # Schedulers send several. A second one would end this process while the ranks save.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        super()._shutdown(death_sig, timeout)

    def _monitor_workers(self, *args: Any, **kwargs: Any) -> Any:
        """Restart ranks that ask for it without counting that as a failure.

        They do so where they have saved because another host joins or leaves. Ranks that refuse
        their command line are not started again.
        """
        if self._pcontext is not self._patient and self._pcontext is not None:
            self._patient, close = self._pcontext, self._pcontext.close

            def close_soon(death_sig: Any = None, timeout: int = _PATIENCE) -> None:
                """A rank that is stopped does not end by SIGTERM; torchrun would wait for 30 s."""
                close(death_sig, timeout)

            self._pcontext.close = close_soon
        result = super()._monitor_workers(*args, **kwargs)
        if result.state == WorkerState.FAILED:
            codes = {failure.exitcode for failure in result.failures.values()}
            if codes == {RESTART}:
                self._remaining_restarts += 1
            elif 2 in codes:
                self._remaining_restarts = 0
        return result


# --- what is said at the end ----------------------------------------------------------------------


def _fail(message: str, code: int = 1) -> int:
    print(f"error: {message}.", file=sys.stderr)
    return code


def _explain(error: Exception, meeting: Meeting | None) -> str:
    """Return what an error of torchrun's rendezvous means for the user."""
    where = f"the first host, {meeting.endpoint}" if meeting else "the launcher's own store"
    if isinstance(error, RendezvousTimeoutError):
        hosts = f"{meeting.least} hosts" if meeting else "all hosts"
        return f"not {hosts} came in time. See what the others say"
    if isinstance(error, RendezvousClosedError):
        return f"the run at {where} has ended. Start it again on all hosts"
    return (
        f"lost the connection to {where}: it has ended, or the network between is cut "
        f"({one_line(error.__cause__ or error)}). The run goes on from its last checkpoint when it "
        "is started again on all hosts"
    )


def _exit_code(codes: dict[int, int]) -> int:
    """Return the exit code for the run, from those of its ranks by rank.

    It is the code of the first rank that exited by itself, since that rank has printed what is
    wrong. A negative code is the signal that ended a rank. Where all ranks were ended by signals,
    none has printed anything. Then the first rank whose signal is not the launcher's own SIGTERM is
    reported here, and the code is 1.
    """
    if own := next((code for code in codes.values() if code > 0), None):
        return own
    rank = next(
        (rank for rank, code in codes.items() if code != -signal.SIGTERM), next(iter(codes))
    )
    name = signal.Signals(-codes[rank]).name
    return _fail(
        f"rank {rank} was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    )


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if sys.stdout.isatty():
        # A rank that was killed while it showed a progress bar has left the cursor hidden.
        print("\x1b[?25h", end="")
    sys.stdout.flush()
    sys.stderr.flush()
    # While the interpreter shuts down, threads of torchrun's store may abort the launcher.
    os._exit(code)
